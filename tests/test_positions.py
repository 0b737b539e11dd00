"""Gates that decide at positions of their own, beside others that decide where the fit looks."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from bake.archs import find_arch
from bake.checkpoint import Checkpoint
from bake.directions import Directions
from bake.errors import ProbesError
from bake.fit.kept import ramp_key
from bake.fit.run import Fitted, fit
from bake.model import LiveModel
from bake.pipeline import fit_of
from bake.plan import Plan, make_plan
from bake.prepare import prepare, run_of
from bake.prompts import Prompt, Splits
from bake.recipe import Fit, OwnDecision, Recipe, load_recipe
from tests.test_block import WIDE
from tests.test_given_probes import saved
from tests.through_disk import drawn, recipe_of
from tests.tiny import write_place, write_tiny
from tests.word_fit import WORDS, ByWord, word_prompts

Spec = Mapping[str, object]
APART: Spec = {"op": "gate", "layers": [1], "strength": -1.0, "ridge": 1e-2}
ORDERED: Spec = {"op": "gate", "layers": [1, 2], "strength": -1.0, "ordered": True}
BLOCK: Spec = {"op": "gate", "form": "block", "layers": [1], "strength": -2.0, "closed": 80.0}
LAST = {"template": 1, "answer": 0}
GIVEN = Directions({layer: drawn(layer, 32) for layer in range(3)})


def asked(*edits: Spec, **fit: object) -> Recipe:
    return recipe_of(*edits).model_copy(update={"fit": Fit.model_validate(fit)})


def planned(folder: Path, recipe: Recipe) -> Plan:
    base = Checkpoint.open(folder)
    return make_plan(recipe, base, find_arch(base.config, "config.json", base.tensors))


def fitted(
    folder: Path,
    recipe: Recipe,
    directions: Directions | None = GIVEN,
    counts: list[int] | None = None,
) -> Fitted:
    base = Checkpoint.open(folder)
    model = LiveModel.load(folder, find_arch(base.config, "config.json", base.tensors))
    prompts = {role: word_prompts(word) for role, word in WORDS.items()}
    passages = tuple(Prompt(f"w40 w{n} w42", "text", "en") for n in range(4))
    texts = Splits(passages, passages, passages)
    judge = ByWord(frozenset({WORDS["target"], WORDS["protected"]}))
    plan = planned(folder, recipe)
    done = counts.append if counts is not None else lambda _: None
    return fit(model, base, plan, recipe, prompts, texts, judge, done, directions)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    write_tiny("llama", folder, **WIDE)
    return folder


def kept(found: Fitted, number: int) -> dict[str, torch.Tensor]:
    start = f"edits.{number}."
    return {
        name.removeprefix(start): one for name, one in found.kept.items() if name.startswith(start)
    }


@pytest.mark.parametrize(
    ("spec", "others"),
    [
        *product((APART, ORDERED), ({}, {"question": "shut"}, {"weights": "doubt"})),
        (BLOCK, {}),
    ],
    ids=str,
)
def test_an_edit_with_positions_is_that_of_a_recipe_with_them(
    wide: Path, spec: Spec, others: dict[str, Any]
) -> None:
    """To the bit, and the gate beside it is what it is without: each sees its own tokens."""
    question = {name: one for name, one in others.items() if name == "question"}
    weights = {name: one for name, one in others.items() if name == "weights"}
    beside: Spec = {"op": "gate", "layers": [0], "sites": ["mlp"], "strength": -1.0}
    alone = fitted(wide, asked(spec, positions=LAST | question, **weights))
    without = fitted(wide, asked(beside, **weights))
    both = fitted(wide, asked(spec | {"positions": LAST | question}, beside, **weights))
    assert kept(alone, 0)
    for name, one in kept(alone, 0).items():
        assert torch.equal(kept(both, 0)[name], one)
    for name, one in kept(without, 0).items():
        assert torch.equal(kept(both, 1)[name], one)
    for name, openings in alone.openings.items():
        assert both.openings[name] == openings
    # And at the fit's positions it is another one.
    plain = fitted(wide, asked(spec, **weights))
    for name, one in kept(alone, 0).items():
        assert (kept(plain, 0)[name] - one).norm() > 1e-3 * one.norm()


def test_directions_are_where_the_fit_looks(tiny_llama: Path) -> None:
    without = fitted(tiny_llama, asked(APART), None)
    found = fitted(tiny_llama, asked(APART | {"positions": LAST}), None)
    assert torch.equal(found.directions.vectors[1], without.directions.vectors[1])
    assert found.kept.keys() == without.kept.keys()


def test_gates_that_decide_at_the_same_tokens_share_a_pass(tiny_llama: Path) -> None:
    other = APART | {"layers": [2]}
    shown = sum(len(word_prompts(word)) for word in WORDS.values()) + 4
    answers = shown - 4

    def passes(*edits: Spec, **fit: object) -> int:
        counts: list[int] = []
        fitted(tiny_llama, asked(*edits, **fit), GIVEN, counts)
        return (sum(counts) - answers) // shown

    same = {"positions": {"template": 6, "answer": 10, "question": "free"}}
    assert passes(APART, other) == passes(APART, other | same) == 1
    last = {"positions": LAST}
    assert passes(APART, other | last) == passes(APART | last, other | last) == 2
    assert passes(APART | last, other | {"positions": {"answer": 3}}) == 3


PLACE = """\
model: model
prompts: {target: target.txt, protected: protected.txt, lookalike: null, general: general.txt}
edits: []
evaluate: {runtimes: [transformers]}
runtimes: [transformers]
"""


@pytest.mark.parametrize(
    "edits",
    [
        (APART,),
        (APART, BLOCK | {"positions": LAST}),
        (ORDERED | {"positions": LAST | {"question": "shut"}}, APART | {"positions": LAST}),
        (APART | {"positions": LAST | {"question": "shut"}}, ORDERED),
    ],
    ids=str,
)
def test_a_bar_ends_where_it_was_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edits: Sequence[Spec]
) -> None:
    roles = ("target", "protected", "general")
    write_place(tmp_path, PLACE, roles)
    for number, role in enumerate(roles, 1):
        lines = (f"w{number} w{n} w{n + 7}" for n in range(20, 50))
        (tmp_path / f"{role}.txt").write_text("\n".join(lines))
    totals: list[int] = []

    @contextmanager
    def counted(_: str, total: int, __: bool) -> Iterator[Callable[[int], None]]:
        done: list[int] = []
        yield done.append
        totals.extend((total, sum(done)))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bake.pipeline.progress", counted)
    monkeypatch.setattr("bake.fit.run.MINIMUM", 0)
    ready = prepare(load_recipe("recipe.yaml", overrides=[f"edits={json.dumps(edits)}"]).recipe)
    fit_of(ready, LiveModel.load(ready.base.folder, ready.arch), ByWord(frozenset({"w1", "w2"})))
    assert totals and totals[0] == totals[1]


def test_what_a_killed_fit_left_is_of_its_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_place(tmp_path, PLACE, ("target", "protected", "general"))
    monkeypatch.chdir(tmp_path)
    chosen: Sequence[Spec] = (APART, APART | {"positions": LAST}, APART | {"positions": {}})
    first, other, same = (
        run_of(
            prepare(load_recipe("recipe.yaml", overrides=[f"edits={json.dumps([one])}"]).recipe), {}
        )
        for one in chosen
    )
    assert first == same != other


def test_what_is_left_out_is_the_fits() -> None:
    recipe = asked(
        *(APART, APART | {"positions": {"answer": 2}}, APART | {"positions": LAST}),
        positions={"template": 3, "question": "shut", "direction": -2},
        answers={"tokens": 4},
    )
    found = [recipe.decides(one) for one in recipe.edits if one.op == "gate"]
    assert [(one.template, one.answer, one.question) for one in found] == [
        (3, 10, "shut"),
        (3, 2, "shut"),
        (1, 0, "shut"),
    ]
    assert recipe.answered == 10
    longer = APART | {"positions": {"answer": 12}}
    assert asked(APART, longer, answers={"tokens": 4}).answered == 12


def test_answers_are_as_long_as_any_gate_reads(tiny_llama: Path) -> None:
    longer: Sequence[Spec] = [APART | {"positions": {"answer": 20}}]
    found = fitted(tiny_llama, asked(*longer))
    alone = fitted(tiny_llama, asked(APART, positions={"answer": 20}))
    for name, one in alone.kept.items():
        assert torch.equal(found.kept[name], one)
    shorter = fitted(tiny_llama, asked(APART, positions={"answer": 16}))
    assert any(not torch.equal(shorter.kept[name], one) for name, one in alone.kept.items())


def test_the_plan_says_where_a_gate_decides(wide: Path) -> None:
    plan = planned(wide, asked(ORDERED, BLOCK | {"positions": LAST}))
    assert plan.notes == ("edits.1: decides at positions of its own: template 1, answer 0",)


def test_ramps_of_a_file_have_no_positions(wide: Path, tmp_path: Path) -> None:
    ramps = kept(fitted(wide, asked(BLOCK)), 0)
    path = saved(tmp_path, {name.replace("edits.0.", ""): one for name, one in ramps.items()})
    recipe = asked(BLOCK | {"positions": LAST, "probes": path})
    with pytest.raises(ProbesError, match=r"^edits\.0\.positions: .* leave one out$"):
        fitted(wide, recipe)
    # A condition from a file has its edges fitted, and so somewhere.
    conditions = saved(tmp_path, {"probe.1": ramps[ramp_key(0, 1).removeprefix("edits.0.")][0]})
    found = [
        fitted(wide, asked(BLOCK | {"probes": conditions} | own)).kept[ramp_key(0, 1)]
        for own in ({}, {"positions": LAST})
    ]
    assert not torch.equal(*found)


def test_positions_are_frozen_and_a_key() -> None:
    first, second = (asked(APART, positions={"direction": one}).fit.positions for one in (-1, -3))
    assert first.decision() == second.decision() == first.decision(OwnDecision())
    assert len({first.decision(), second.decision(), second.decision(OwnDecision(answer=1))}) == 2
