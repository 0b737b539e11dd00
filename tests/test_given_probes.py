"""Gates whose probes come from a file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bake.archs import find_arch
from bake.checkpoint import Checkpoint
from bake.directions import Directions
from bake.errors import FitError, ProbesError
from bake.fit.given import given_probes
from bake.fit.kept import ramp_key
from bake.fit.run import fit, needs_prompts
from bake.judge import Exchange, Judge, Verdict
from bake.model import LiveModel
from bake.plan import Plan, make_plan
from bake.prompts import Prompt, Splits
from bake.recipe import Recipe
from tests.test_block_gate import WIDE, gating
from tests.through_disk import recipe_of
from tests.tiny import write_tiny
from tests.word_fit import WORDS, ByWord, word_fit, word_prompts

RANK_ONE = {"op": "gate", "layers": [1], "strength": -1.0, "ridge": 1e-2, "protected": 1.0}
FIRST = "probe.model.layers.1.self_attn.o_proj"


def planned(folder: Path, recipe: Recipe) -> Plan:
    base = Checkpoint.open(folder)
    return make_plan(recipe, base, find_arch(base.config, "config.json", base.tensors))


def saved(folder: Path, tensors: Mapping[str, Tensor]) -> str:
    path = folder / "probes.safetensors"
    save_file({name: one.contiguous() for name, one in tensors.items()}, path)
    return str(path)


class Nobody:
    """A judge of a fit that shows no prompt."""

    name = "nobody"

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        raise AssertionError(exchanges)


def blocks(
    folder: Path, edit: Mapping[str, object], directions: Directions | None = None
) -> dict[str, Tensor]:
    """What a fit of a block gate on a tiny model keeps; from given directions without a prompt."""
    recipe = recipe_of(edit)
    base = Checkpoint.open(folder)
    arch = find_arch(base.config, "config.json", base.tensors)
    model = LiveModel.load(folder, arch)
    prompts = {role: word_prompts(word) for role, word in WORDS.items()}
    passages = tuple(Prompt(f"w40 w{n} w42", "text", "en") for n in range(4))
    refused = frozenset({WORDS["target"], WORDS["protected"]})
    judge: Judge = ByWord(refused) if directions is None else Nobody()
    plan, texts = make_plan(recipe, base, arch), Splits(passages, passages, passages)
    found = fit(model, base, plan, recipe, prompts, texts, judge, directions=directions)
    assert len(found.interventions) == 1
    return dict(found.kept)


def test_probes_of_a_bake_give_the_same_gates(tiny_llama: Path, tmp_path: Path) -> None:
    """What a fit kept, under the names that it has there and without the edit's number."""
    _, fitted = word_fit(tiny_llama, recipe_of(RANK_ONE))
    # Those of another edit do not count.
    others = {name.replace("edits.0", "edits.7"): one + 1 for name, one in fitted.kept.items()}
    bare = {name.removeprefix("edits.0."): one for name, one in fitted.kept.items()}
    for tensors in ({**fitted.kept, **others}, bare):
        given = recipe_of(RANK_ONE | {"probes": saved(tmp_path, tensors)})
        _, again = word_fit(tiny_llama, given)
        assert set(again.kept) == set(fitted.kept)
        for name, probe in fitted.kept.items():
            assert torch.equal(again.kept[name], probe)
        assert not again.openings  # nothing was fitted
    plan = planned(tiny_llama, given)
    assert plan.notes == (f"edits.0: its probes are those of {tmp_path}/probes.safetensors",)
    found = given_probes(given, plan)
    assert not needs_prompts(plan, given, fitted.directions, found)
    assert needs_prompts(plan, given, None, found)
    assert needs_prompts(plan, given, fitted.directions)


def test_a_block_gate_takes_its_ramps_or_what_they_read(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path, **WIDE)
    spec = dict(gating(1, closed=80.0))
    fitted = blocks(tmp_path, spec)[ramp_key(0, 1)]
    given = spec | {"probes": saved(tmp_path, {"edits.0.ramp.1": fitted})}
    for directions in (None, Directions({1: torch.ones(32)})):
        assert torch.equal(blocks(tmp_path, given, directions)[ramp_key(0, 1)], fitted)
    # The fitted probe as a vector of another length: but for the constant it is read again.
    given = spec | {"probes": saved(tmp_path, {"probe.1": 7 * fitted[0]})}
    probe, constant = blocks(tmp_path, given)[ramp_key(0, 1)]
    torch.testing.assert_close(constant, fitted[1])

    def across(row: Tensor) -> Tensor:
        return row - (row @ constant) / (constant @ constant) * constant

    assert float(torch.cosine_similarity(across(probe), across(fitted[0]), 0)) > 0.999
    given = spec | {"probes": saved(tmp_path, {"probe.1": -fitted[0]})}
    with pytest.raises(FitError, match=r"probe\.1: reads .* turn its sign"):
        blocks(tmp_path, given)


WRONG: Mapping[str, tuple[Mapping[str, Tensor], str]] = {
    "missing": ({}, r"o_proj: there is no such tensor, which edits\.0 needs; add it"),
    "width": (
        {FIRST: torch.ones(5)},
        r"o_proj: has the shape \[5\], and edits\.0 needs \[32\]; give probes of this model",
    ),
    "finite": ({FIRST: torch.full((32,), float("nan"))}, "o_proj: holds numbers that are not fin"),
    "zeros": ({FIRST: torch.zeros(32)}, "o_proj: a probe of zeros reads nothing"),
    "type": ({FIRST: torch.ones(32, dtype=torch.int64)}, "o_proj: is of type I64"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_file_of_probes(tiny_llama: Path, tmp_path: Path, case: str) -> None:
    tensors, message = WRONG[case]
    path = saved(tmp_path, {"other": torch.ones(2), **tensors})
    recipe = recipe_of(RANK_ONE | {"probes": path})
    with pytest.raises(ProbesError, match=message) as caught:
        given_probes(recipe, planned(tiny_llama, recipe))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no such file; give"), (b"{}", "give a safetensors file of probes")],
)
def test_a_file_that_holds_no_probes(
    tiny_llama: Path, tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "probes.safetensors"
    if content is not None:
        path.write_bytes(content)
    recipe = recipe_of(RANK_ONE | {"probes": str(path)})
    with pytest.raises(ProbesError, match=message):
        given_probes(recipe, planned(tiny_llama, recipe))
