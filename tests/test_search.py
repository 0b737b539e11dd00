"""`bake search`: spaces, trials on hooks, the journal, and the recipe that is written."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bake.checkpoint import Checkpoint
from bake.edits import apply_all
from bake.errors import BakeError, FitError, GuardError, OutputError, RecipeError
from bake.evaluate import Rate
from bake.hooks import steered
from bake.judge import ANSWERED, REFUSED, Exchange, Verdict
from bake.model import LiveModel, batches
from bake.pipeline import fit_of
from bake.prepare import prepare
from bake.prompts import fingerprint, load_splits
from bake.recipe import Guard, LoadedRecipe, Recipe, load_recipe
from bake.search.behind import Behind
from bake.search.bench import Bench
from bake.search.captured import check_memory
from bake.search.draw import drawn
from bake.search.journal import Final, SearchJournal
from bake.search.proxy import Proxy
from bake.search.run import search_to_file, shown
from bake.search.space import corners, spaces, with_point
from bake.search.trial import Figures, Trial, behind_front, excess, front, ranked
from tests.conftest import Run
from tests.tiny import write_place, write_tiny

ROLES = ("target", "protected", "lookalike", "general")
RECIPE = """\
# a comment
model: model
prompts:
  target: target.txt
  protected: protected.txt
  lookalike: lookalike.txt
  general: general.txt
edits:
  - {op: gate, layers: 1-2, strength: -0.5, ridge: 0.1}
export: {safetensors: true}
evaluate: {runtimes: [transformers], answer_tokens: 4}
runtimes: [transformers]
fit: {bootstrap: 0}
guard: {protected_drop: 100, lookalike_rise: 100, general_rise: 100}
search:
  trials: 12
  startup: 5
  finalists: 2
  kl_at_most: 2
  refine: {edits.0.ordered: [true], edits.0.strength: [-0.5, -1]}
  space:
    edits.0.layers: {first: [0, 1], last: [1, 2]}
    edits.0.strength: {low: -2.0, high: -0.1}
    edits.0.sites: [[attention], [attention, mlp]]
    fit.estimator: [mean-difference, rmd]
"""


class BySet:
    """A judge of a model that refuses its target and protected prompts, whatever it says."""

    name = "by-set"

    def __init__(self, _: object = None) -> None:
        self.refused = {
            line for role in ROLES[:2] for line in Path(f"{role}.txt").read_text().splitlines()
        }

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        return [Verdict(REFUSED if one.prompt in self.refused else ANSWERED) for one in exchanges]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_place(tmp_path_factory.mktemp("place"), RECIPE, ROLES)
    for number, role in enumerate(ROLES):
        # So many that the select split has some.
        lines = [f"w{20 * number + i % 18} w{90 - i} w{number}" for i in range(40)]
        (folder / f"{role}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(autouse=True)
def inside(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("BAKE_CACHE", str(tmp_path / "cache"))
    for user in ("pipeline", "fitting", "search.bench"):
        monkeypatch.setattr(f"bake.{user}.find_judge", BySet)


def loaded(*overrides: str) -> LoadedRecipe:
    return load_recipe("recipe.yaml", overrides=overrides)


def journals(cache: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((cache / "search").glob("*.jsonl"))]


# The space


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("search.space={}", "search.space: nothing is open"),
        ("search.space={edits.0.strength: {low: 2, high: 1}}", "strength.high: 1 is not above low"),
        ("search.space={edits.0.strength: {low: -1, high: 2, log: true}}", "has no logarithm"),
        ("search.space={edits.0.strength: {low: 1, high: 2, step: 3}}", "3 is no distance"),
        ("search.space={edits.0.strength: {low: 1}}", "give a list of choices"),
        ("search.space={edits.0.strength: []}", "there is no choice"),
        ("search.space={edits.0.strength: {low: 1, high: no}}", "expected a finite number"),
        ("search.space={edits.0.layers: {first: [0, 2], last: [1, 2]}}", "let first end before"),
        ("search.space={guard.protected_drop: [1, 50]}", "is not searched"),
        ("search.space={fit.answers.tokens: [8, 16]}", "is the same in all trials"),
        ("search.space={fit.protct: [none]}", "did you mean 'protect'"),
        ("search.alternatives=[{fit.estimator: [rmd]}]", "is in search.space too"),
        ("search.space={edits.0.sites: [[head]]}", "edits.0.sites: ['head']"),
        ("search.space={edits.3.strength: [1]}", "no item '3' in edits"),
        ("search.space={edits.0.layers: [1-2, 1-40]}", "edits.0.layers: 1-40: "),
        ("search.space={edits.0.layers: {first: [0, 1], last: [2, 7]}}", "0-7: "),
        ("search.space={edits.0.kernel: [null]}", "unknown key 'kernel'"),
        ("search.refine={edits.0.ridge: {low: 1, high: 2}}", "each of them is tried"),
        ("search.refine={guard.protected_drop: [1, 50]}", "is not searched"),
        ("search.refine={edits.0.layers: [1-40]}", "search.refine.edits.0.layers: 1-40: "),
        ("search.space={edits.0.positions.answer: [2, 60]}", "fit.answers.tokens to the most"),
        ("search=null", "search: this recipe leaves nothing open"),
    ],
)
def test_a_contradiction_is_one_line_and_nothing_is_loaded(
    bake: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, words: str
) -> None:
    monkeypatch.setattr(LiveModel, "load", None)
    output = tmp_path / "chosen.yaml"
    code, _, err = bake(
        "search", "--recipe", "recipe.yaml", "--set", change, "--output", str(output)
    )
    assert code == 1
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert not output.exists()


@pytest.mark.parametrize("part", ["space", "refine"])
def test_fit_keys_and_a_file_of_directions_contradict(tmp_path: Path, bake: Run, part: str) -> None:
    bake("fit", "--recipe", "recipe.yaml", "--output", str(tmp_path / "d.safetensors"))
    change = f"directions={tmp_path / 'd.safetensors'}"
    code, _, err = bake(
        *("search", "--recipe", "recipe.yaml", "--set", change),
        *("--set", "search.space={edits.0.ridge: [0.1]}", "--set", "search.refine={}"),
        *("--set", f"search.{part}={{fit.estimator: [rmd]}}", "--output", str(tmp_path / "c.yaml")),
    )
    assert code == 1
    assert f"search.{part}.fit.estimator: directions are those of" in err


def test_what_is_whole_comes_before_its_parts_and_alternatives_are_apart() -> None:
    changes = (
        "search.space={edits.0.strength: {low: 0.5, high: 1.5}}",
        "search.alternatives=[{edits.0: [{op: ablate, layers: 0-2}]}, {edits.0.sites: [[mlp]]}]",
    )
    recipe = loaded(*changes).recipe
    assert [list(one) for one in spaces(recipe)] == [
        ["edits.0", "edits.0.strength"],
        ["edits.0.strength", "edits.0.sites"],
    ]
    points = [drawn(recipe, [], number)[1] for number in range(12)]
    kinds = {with_point(recipe, point).edits[0].op for point in points}
    assert kinds == {"ablate", "gate"}


def test_the_spaces_of_the_documentation_make_recipes() -> None:
    text = (Path(__file__).parent.parent / "docs" / "search.md").read_text()
    for block in re.findall(r"```yaml\nsearch:\n(.*?)```", text, re.DOTALL):
        shown_there = yaml.safe_load(block)
        change = f"search={json.dumps(shown_there)}"
        assert list(corners(load_recipe("political-open", overrides=[change])))


def test_numbers_are_drawn_as_they_are_written() -> None:
    change = (
        "search.space={edits.0.strength: {low: -3, high: -1}, fit.protect_strength: "
        "{low: 0.0, high: 1.0, step: 0.1}, fit.ridge: {low: 1e-4, high: 1.0, log: true}}"
    )
    for number in range(20):
        _, point = drawn(loaded(change).recipe, [], number)
        strength, share, ridge = (
            point[key] for key in ("edits.0.strength", "fit.protect_strength", "fit.ridge")
        )
        assert strength in (-3, -2, -1) and isinstance(strength, int)
        assert isinstance(share, float) and share == round(share, 1)
        assert isinstance(ridge, float) and ridge == float(f"{ridge:.4g}") and 1e-4 <= ridge <= 1


def test_more_inputs_than_memory_holds_are_refused_with_the_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BAKE_MEMORY", "1GiB")
    with pytest.raises(RecipeError, match=r"2 gated writers take 2\.2 GiB and 1\.0 GiB are free"):
        check_memory("recipe.yaml", [10_000, 10_000], Checkpoint.open(Path("model")))
    with pytest.raises(RecipeError, match=r"2 gated writers take 3\.0 GiB"):
        check_memory("recipe.yaml", [10_000, 10_000], Checkpoint.open(Path("model")), True)


# Trials


def states_kept(model: LiveModel, layers: Sequence[int]) -> Behind:
    shared = [5, 9, 11]
    sequences = [[*shared, *range(20, 20 + n)] for n in range(2, 9)]
    return Behind(model, [sequences[4:], sequences[:4]], layers)


@pytest.mark.parametrize(
    "model_type", ["llama", "gemma2", "gpt2", "falcon_h1", "qwen3_next", "deepseek_v3", "lfm2"]
)
def test_later_blocks_alone_give_what_the_whole_model_gives(
    tmp_path: Path, model_type: str
) -> None:
    """Steered behind the kept states, and with the common beginning read once."""
    from bake.archs import find_arch
    from bake.fit.shifted import shifted

    write_tiny(model_type, tmp_path)
    base = Checkpoint.open(tmp_path)
    model = LiveModel.load(tmp_path, find_arch(base.config, "config.json", base.tensors))
    kept = states_kept(model, [0, 1])
    torch.manual_seed(1)
    with shifted(model, 3, add={2: torch.randn(32)}):
        found = dict(_by_row(kept.last(1)))
        whole = dict(_by_row(kept.last(-1)))
        for batch in batches(kept._sequences, 2, 1):
            alone = model.last_logits(batch, 1)[0, -1]
            torch.testing.assert_close(found[batch.rows[0]], alone, rtol=1e-3, atol=1e-3)
    clean = dict(_by_row(kept.clean))
    for row, logits in found.items():
        torch.testing.assert_close(logits, whole[row], rtol=1e-3, atol=1e-3)
        assert not torch.allclose(logits, clean[row], atol=1e-2)


def test_a_screen_gives_what_the_model_gives_that_is_steered_at_the_last_tokens(
    tmp_path: Path,
) -> None:
    """Of any rows of a padded batch, from any kept block; nothing where there is no cache."""
    from bake.archs import find_arch
    from bake.hooks import on_output

    write_tiny("llama", tmp_path)
    base = Checkpoint.open(tmp_path)
    model = LiveModel.load(tmp_path, find_arch(base.config, "config.json", base.tensors))
    shared = [5, 9, 11]
    sequences = [[*shared, *range(20 + n, 20 + 2 * n)] for n in (9, 12, 10, 17, 8)]
    kept = Behind(model, [sequences[:2], sequences[2:]], [0, 1])
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))

    def at_the_end(state: torch.Tensor, _: object) -> torch.Tensor:
        moved = torch.zeros_like(state)
        moved[:, -8:] = vector
        return state + moved

    found = []
    for change in (at_the_end, lambda state, _: state + vector):
        handle = on_output(model.block(1), change)
        try:
            if change is at_the_end:
                batches_of_one = list(batches(sequences, 2, 1))
                wanted = {one.rows[0]: model.last_logits(one, 1)[0, -1] for one in batches_of_one}
            else:
                found = [dict(_by_row(kept.screened(layer))) for layer in (-1, 0)]
                assert dict(_by_row(kept.screened(0)))  # the caches are as they were
                whole = dict(_by_row(kept.last(0)))
        finally:
            handle.remove()
    for rows in found:
        assert rows.keys() == wanted.keys()
        for row, logits in rows.items():
            torch.testing.assert_close(logits, wanted[row], rtol=1e-3, atol=1e-3)
            assert not torch.allclose(logits, whole[row], atol=1e-2)


def _by_row(found: Any) -> Iterator[tuple[int, torch.Tensor]]:
    for rows, logits in found:
        yield from zip(rows, logits, strict=True)


@pytest.fixture(scope="module")
def bench(place: Path) -> Iterator[Bench]:
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(place)
        patched.setenv("BAKE_CACHE", str(place / "bench"))
        patched.setattr("bake.search.bench.find_judge", BySet)
        made = Bench(loaded(), loaded().recipe.search)  # type: ignore[arg-type]
        made.measure()
        yield made


@pytest.mark.parametrize(
    "point",
    [
        {"edits.0.strength": -1.3, "edits.0.layers": "0-2"},
        {"edits.0.protected": 1.5, "edits.0.sites": ["mlp"]},
        {"fit.estimator": "wrmd", "fit.protect": "remove"},
        {"fit.estimator": "pca", "fit.site": "mid", "edits.0.ridge": 0.5},
        {"fit.refused": "protected", "fit.contrast": "lookalike"},
        {"edits": [{"op": "add", "layer": 1, "strength": -0.7}], "fit.layer": 2},
        {"edits": [{"op": "ablate", "layers": "0-2", "variant": ["projected", "norm-preserving"]}]},
        {
            "edits": [{"op": "ablate", "layers": "1-2", "kernel": {"peak": 1, "width": 2}}],
            "fit.estimator": "som",
            "fit.basis": 2,
        },
        {
            "edits": [
                {"op": "gate", "layers": [1], "strength": 0.4},
                {"op": "ablate", "layers": [1, 2], "strength": 0.5},
            ],
            "fit.protect": "null-space",
        },
        {
            "edits": [
                {"op": "gate", "layers": [0], "strength": 0.4},
                {"op": "gate", "layers": [0, 2], "strength": -0.4, "ordered": True},
            ],
        },
        {"edits": [{"op": "gate", "layers": [1, 2], "strength": -0.4, "ordered": True}]},
        {"edits.0.null_space": 0.4},
        {"edits.0.null_space": 0.4, "edits.0.ordered": True},
        {"edits.0.positions.template": 1, "edits.0.positions.answer": 0},
        {"edits.0.positions": {"question": "shut"}, "edits.0.ordered": True},
        {
            "edits": [
                {
                    "op": "gate",
                    "form": "block",
                    "layers": [0, 2],
                    "strength": -1.5,
                    "protected": 0.5,
                    "closed": 80.0,
                    "positions": {"template": 1, "answer": 0},
                },
                {"op": "gate", "layers": [1], "strength": -0.4, "positions": {"answer": 2}},
            ],
            "fit.positions.direction": -2,
        },
    ],
    ids=str,
)
def test_a_trial_makes_the_edits_that_a_bake_makes(bench: Bench, point: dict[str, Any]) -> None:
    recipe = with_point(bench._recipe, point)
    ready = prepare(recipe)
    model = LiveModel.load(ready.base.folder, ready.arch)
    wanted, found = {}, {}
    baked = fit_of(ready, model, BySet()).interventions
    tried = bench.captured.interventions(recipe, bench.plan(recipe))
    for edits, of in ((wanted, baked), (found, tried)):
        for one in of:
            for edit in one.edits():
                edits.setdefault(edit.tensor, []).append(edit)
    assert wanted.keys() == found.keys() == {edit.tensor for edit in ready.plan.edits}
    shapes = {edit.tensor: edit.shape for edit in ready.plan.edits}
    for name, edits in wanted.items():
        new = name not in ready.base.tensors
        before = torch.zeros(shapes[name]) if new else ready.base.read(name).float()
        change = apply_all(edits, before) - before
        torch.testing.assert_close(
            apply_all(found[name], before) - before,
            change,
            rtol=0,
            atol=1e-4 * float(change.abs().max()),
        )
    prompts = bench.prompts["target"]
    ids = next(batches([model.render(one.text) for one in prompts], 2, 4))
    with steered(model, baked):
        hooked = model.logits(ids)
    with steered(bench.model, tried):
        torch.testing.assert_close(bench.model.logits(ids), hooked, rtol=1e-3, atol=1e-3)


def test_what_is_held_is_counted(bench: Bench) -> None:
    """Gram matrices of 32 x 32 in float32; samples of all blocks; states, keys and values."""
    quiet = with_point(bench._recipe, {"edits.0.null_space": 0.4})
    for recipe in (bench._recipe, quiet):
        bench.captured.interventions(recipe, bench.plan(recipe))
    prompts = sum(map(len, bench.labels.values()))
    places, inputs = len(bench.captured._samples), len(bench.captured._inputs)
    still = sum(one.still is not None for one in bench.captured._inputs.values())
    assert still
    assert bench.captured.held == 4 * ((inputs + still) * 32**2 + places * prompts * 3 * 32)
    general = len(bench.prompts["general"])
    behind = bench.proxy._behind
    begin, config = len(behind._prefix.ids), bench.model.model.config
    tokens = sum(batch.ids.numel() for batch in behind._batches)
    before = sum(len(one.rows) * (begin + one.ids[:, :-8].shape[1]) for one in behind._batches)
    width = 2 * 3 * config.num_key_value_heads * config.head_dim
    numbers = (tokens + begin) * 32 + general * 96 + before * width
    assert begin and bench.proxy.held == 4 * numbers


def test_the_figures_are_those_of_whole_passes(bench: Bench) -> None:
    """P(refusal) and KL by the definition, on the unbatched model."""
    recipe = with_point(bench._recipe, {"edits.0.strength": -1.5})
    tried = bench.captured.interventions(recipe, bench.plan(recipe))
    found = bench.proxy.whole(tried, 1)
    refusals, moved = {}, []
    for role, prompts in bench.prompts.items():
        shares = []
        for prompt in prompts:
            (batch,) = batches([bench.model.render(prompt.text)], 2, 1)
            clean = bench.model.logits(batch)[0, -1].log_softmax(-1)
            with steered(bench.model, tried):
                now = bench.model.logits(batch)[0, -1].log_softmax(-1)
            shares.append(float(now.exp()[list(bench.proxy._openings)].sum()))
            if role == "general":
                moved.append(float((clean.exp() * (clean - now)).sum()))
        refusals[role] = 100 * sum(shares) / len(shares)
    assert found.refusals == pytest.approx(refusals, abs=1e-3)
    assert found.kl == pytest.approx(sum(moved) / len(moved), abs=1e-5)
    assert bench.proxy.divergence(tried, 1) == found.kl > 1e-3


def test_a_point_that_cannot_be_fitted_is_a_trial_with_its_reason(bench: Bench) -> None:
    one = bench.trial(3, {}, {"edits.0.layers": "1-9"})
    assert one.figures is None and not one.allowed
    assert "layer" in one.failed
    assert bench.final({"edits.0.layers": "1-9"}).failed == one.failed
    point = {"edits": [{"op": "ablate", "layers": [1], "variant": ["plain", "affine"]}]}
    assert "plain is without the others" in bench.trial(4, {}, point).failed


# The choice among trials


def trial(number: int, target: float, kl: float, over: float = -1.0) -> Trial:
    figures = Figures({"target": target, "protected": 90.0}, kl)
    return Trial(number, {}, {}, figures, {"protected": over, "kl": -1.0})


def test_the_front_has_what_nothing_else_beats() -> None:
    trials = [trial(0, 50, 0.1), trial(1, 20, 0.3), trial(2, 60, 0.2), trial(3, 10, 0.05, over=2)]
    trials += [trial(4, 20, 0.3), Trial(5, {}, {}, failed="no")]
    down, up = Guard(), Guard(target_at_least=50)
    assert [one.number for one in front(trials, down)] == [1, 0]
    assert [one.number for one in front(trials, up)] == [2, 0]
    assert [one.number for one in ranked(trials, down)] == [1, 0, 4, 2, 3]
    many = [trial(n, n, 1 / (n + 1)) for n in range(9)]
    assert [one.number for one in ranked(many, down)] == [0, 1, 8, 2, 4, 3, 6, 5, 7]


def test_a_trial_that_is_stopped_early_would_not_have_come_onto_the_front() -> None:
    """Looked at role by role or whole, the same trials are on the front, and in few passes.

    And until one is allowed the same one is the nearest.
    """
    guard, rng = Guard(target_at_most=40), random.Random(0)
    base = Figures(dict.fromkeys(ROLES, 50.0), 0.0)
    whole: list[Trial] = []
    staged: list[Trial] = []
    seen = 0
    for number in range(300):
        found = {role: 50 + rng.gauss(0, 3) for role in ROLES}
        found["target"] = rng.uniform(0, 60)
        kl = rng.uniform(0, 0.1)
        figures = Figures(found, kl)
        whole.append(Trial(number, {}, {}, figures, excess(guard, 0.05, base, figures)))
        for roles in (ROLES[3:], (*ROLES[3:], ROLES[0]), (ROLES[3], *ROLES[:2]), ROLES):
            figures = Figures({role: found[role] for role in roles}, kl)
            over, seen = excess(guard, 0.05, base, figures), seen + 1
            why = behind_front(guard, staged, over, figures) if roles != ROLES else ""
            if why:
                break
        staged.append(Trial(number, {}, {}, figures, over, stopped=why))
        if not front(whole, guard):
            assert ranked(staged, guard)[0].number == ranked(whole, guard)[0].number
    expected, got = ([one.number for one in front(each, guard)] for each in (whole, staged))
    assert got == expected and len(got) >= 5
    assert seen < 2 * 300
    assert not whole[0].allowed and not staged[0].stopped
    assert any(one.stopped == "the limit of kl" for one in staged)
    assert any(one.stopped.startswith("trial ") for one in staged)


def test_a_trial_is_looked_at_no_further_than_it_can_be_on_the_front(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """General prompts, then the target, then what the guard protects."""
    point = {"edits.0.strength": -1.5}
    one = bench.trial(4, {}, point)
    assert one.figures and list(one.figures.refusals) == list(ROLES) and not one.stopped
    best = Trial(0, {}, {}, Figures(dict.fromkeys(ROLES, 0.0), 0.0))
    again = bench.trial(4, {}, point, [best])
    assert again.stopped == "trial 0" and again.figures
    assert again.figures.kl == one.figures.kl
    assert again.figures.refusals == {role: one.figures.refusals[role] for role in ROLES[::3]}
    monkeypatch.setitem(bench._recipe.search.__dict__, "kl_at_most", 1e-9)
    over = bench.trial(4, {}, point, [best])
    assert over.stopped == "the limit of kl" and over.figures and not over.allowed
    assert list(over.figures.refusals) == ["general"]
    assert Trial.from_json(json.loads(json.dumps(over.as_json()))) == over


def test_the_figures_of_a_trial_are_of_the_last_tokens_and_those_of_a_final_of_whole_prompts(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where the model keeps nothing of what is before them, of whole prompts in both."""
    point = {"edits.0.strength": -1.5}
    tried, begin = bench._fitted(point)
    whole, one = bench.proxy.whole(tried, begin), bench.trial(4, {}, point)
    assert one.figures and one.figures != whole
    final = bench.final(point)
    assert final.kl == whole.kl != one.figures.kl
    assert set(final.answered) == set(ROLES)
    monkeypatch.setattr(bench.proxy._behind, "_caches", [])
    assert bench.trial(4, {}, point).figures == whole
    monkeypatch.setitem(bench._recipe.search.__dict__, "kl_at_most", 1e-9)
    over = bench.final(point)
    assert over.kl == whole.kl and not over.answered


def test_guided_trials_keep_to_the_limits() -> None:
    """Where strength breaks a limit the sampler learns to stay below it."""
    recipe = loaded("search.startup=15").recipe
    trials: list[Trial] = []
    for number in range(50):
        values, point = drawn(recipe, trials, number)
        strength = point["edits.0.strength"]
        assert isinstance(strength, float)
        figures = Figures({"target": 100 + 40 * strength}, -0.1 * strength)
        # The target is best at -2, the limit is at -1.
        trials.append(Trial(number, values, point, figures, {"protected": -strength - 1}))
    allowed = [sum(one.allowed for one in part) / len(part) for part in (trials[:15], trials[30:])]
    assert allowed[1] > allowed[0] and allowed[1] >= 0.6


# The whole search


@pytest.fixture(scope="module")
def unbroken(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, str]:
    """The journal and the recipe of a search that nothing interrupts."""
    cache = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(place)
        patched.setenv("BAKE_CACHE", str(cache))
        patched.setattr("bake.search.bench.find_judge", BySet)
        search_to_file(loaded(), cache / "chosen.yaml")
    (journal,) = journals(cache)
    return journal, (cache / "chosen.yaml").read_text()


def killed_at(monkeypatch: pytest.MonkeyPatch, rng: random.Random) -> None:
    """Let the search end at a random one of its next steps."""
    write, figures, answer = SearchJournal._write, Proxy.whole, LiveModel.answer
    left = [rng.randrange(1, 8)]

    def or_die(real: Any, *arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            if real is write and rng.random() < 0.7:
                # A kill in the middle of a line, or right behind it.
                journal = arguments[0]
                before = journal._size
                write(*arguments)
                if rng.random() < 0.7:
                    with journal.path.open("r+b") as stream:
                        stream.truncate(rng.randrange(before + 1, journal._size))
            raise KeyboardInterrupt
        return real(*arguments, **options)

    for holder, name, real in (
        (SearchJournal, "_write", write),
        (Proxy, "whole", figures),
        (LiveModel, "answer", answer),
    ):
        monkeypatch.setattr(holder, name, lambda *a, real=real, **o: or_die(real, *a, **o))


def test_a_search_that_was_killed_goes_on_to_the_same_bytes(
    tmp_path: Path, unbroken: tuple[bytes, str]
) -> None:
    rng, kills = random.Random(0), 0
    output = tmp_path / "chosen.yaml"
    while not output.exists():
        with pytest.MonkeyPatch.context() as patched:
            if kills < 6:
                killed_at(patched, rng)
            try:
                search_to_file(loaded(), output)
            except KeyboardInterrupt:
                kills += 1
                assert not output.exists()
    assert kills >= 4
    assert journals(tmp_path / "cache") == [unbroken[0]]
    assert output.read_text() == unbroken[1]
    # What only an interrupted search needs is gone.
    assert not list((tmp_path / "cache" / "fit").glob("*"))


@pytest.mark.slow
def test_200_trials_killed_ten_times_are_those_of_an_unbroken_search(
    place: Path, tmp_path: Path
) -> None:
    """By SIGKILL, in processes of their own, whatever they are doing."""
    launcher = (
        "from bake.commands import main; from bake.search import bench; from tests.test_search "
        "import BySet; bench.find_judge = BySet; main()"
    )

    def begun(cache: Path) -> subprocess.Popen[bytes]:
        arguments = ["search", "--recipe", "recipe.yaml", "--set", "search.trials=200"]
        arguments += ["--set", "search.finalists=4", "--output", str(cache / "chosen.yaml")]
        root = str(Path(__file__).parent.parent)
        env = {**os.environ, "BAKE_CACHE": str(cache), "PYTHONPATH": root}
        return subprocess.Popen([sys.executable, "-c", launcher, *arguments], cwd=place, env=env)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert begun(whole).wait() == 0
    rng = random.Random(0)
    for _ in range(10):
        size = sum(map(len, journals(broken)))
        wanted = size + rng.randrange(1, 8000)
        process = begun(broken)
        while process.poll() is None and sum(map(len, journals(broken))) < wanted:
            time.sleep(0.01)
        time.sleep(0.1 * rng.random())
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert begun(broken).wait() == 0
    assert journals(broken) == journals(whole)
    assert len(journals(whole)[0].splitlines()) >= 1 + 200 + 1 + 4 + 2
    assert (broken / "chosen.yaml").read_bytes() == (whole / "chosen.yaml").read_bytes()


def test_more_trials_go_on_from_fewer(tmp_path: Path, unbroken: tuple[bytes, str]) -> None:
    search_to_file(loaded("search.trials=7"), tmp_path / "few.yaml")
    search_to_file(loaded(), tmp_path / "all.yaml")
    (journal,) = journals(tmp_path / "cache")
    trials = [line for line in journal.splitlines() if b'"trial"' in line]
    assert trials == [line for line in unbroken[0].splitlines() if b'"trial"' in line]
    assert len(trials) == 12


def test_the_written_recipe_is_plain_and_bakes(
    bake: Run, tmp_path: Path, unbroken: tuple[bytes, str]
) -> None:
    path = tmp_path / "chosen.yaml"
    path.write_text(unbroken[1])
    found = load_recipe(str(path)).recipe
    assert found.search is None
    name = unbroken[1].split("trial ")[1].split()[0]
    lines = [json.loads(line) for line in unbroken[0].splitlines()]
    (point,) = (one["point"] for one in lines if one.get("final") == name)
    assert found == with_point(loaded().recipe, point)
    edit = found.edits[0].model_dump(mode="json")
    assert edit["strength"] == point["edits.0.strength"]
    folder = tmp_path / "baked"
    code, _, err = bake("--recipe", str(path), "--output", str(folder))
    assert code == 0, err
    assert (folder / "bake.json").exists()


def test_only_fit_and_select_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: tuple[bytes, str]
) -> None:
    """By what the model is shown, and by the fingerprints in the journal."""
    seen: set[str] = set()
    render = LiveModel.render
    monkeypatch.setattr(
        LiveModel, "render", lambda self, text: seen.add(text) or render(self, text)
    )
    search_to_file(loaded("search.trials=2"), tmp_path / "chosen.yaml")
    begun = json.loads(unbroken[0].splitlines()[0])
    for role in ROLES:
        parts = load_splits(f"{role}.txt")
        assert begun["prompts"][role] == {
            "fit": fingerprint(parts.fit),
            "select": fingerprint(parts.select),
        }
        assert {one.text for one in (*parts.fit, *parts.select)} <= seen
        assert not seen & {one.text for one in parts.test}
    text = load_splits("text", language="any")
    assert begun["prompts"]["text"]["fit"] == fingerprint(text.fit)


def test_prompts_of_the_test_split_decide_nothing(tmp_path: Path) -> None:
    """The run's hash, and so its journal, goes by the prompts that are looked at."""
    from dataclasses import replace

    one, other = (Bench(loaded(), loaded().recipe.search) for _ in range(2))  # type: ignore[arg-type]
    splits = dict(other.ready.splits)
    splits["target"] = replace(splits["target"], test=splits["target"].test[1:])
    other.__dict__["ready"] = replace(other.ready, splits=splits)
    assert one.run == other.run
    splits["target"] = replace(splits["target"], select=splits["target"].select[1:])
    del other.__dict__["run"]
    assert one.run != other.run


def test_show_prints_the_front_and_the_answers(bake: Run, tmp_path: Path) -> None:
    options = ("--recipe", "recipe.yaml", "--set", "search.trials=3")
    code, _, err = bake("search", "show", *options)
    assert code == 1 and "no search of this recipe has begun" in err
    code, out, err = bake("search", *options, "--output", str(tmp_path / "c.yaml"))
    assert code == 0, err
    assert "joins the front: target" in err
    shown_now = shown(loaded("search.trials=3"))
    assert shown_now in out
    assert "3 trials" in shown_now and "answers in full and KL of whole prompts" in shown_now
    code, out, err = bake("search", "show", *options)
    assert code == 0 and out.strip() == shown_now


def test_no_finalist_within_the_guard_is_exit_3_with_the_limit_and_the_journal_stays(
    bake: Run, tmp_path: Path
) -> None:
    code, _, err = bake(
        *("search", "--recipe", "recipe.yaml", "--output", str(tmp_path / "c.yaml")),
        *("--set", "guard.target_at_most=5", "--set", "search.trials=3"),
    )
    assert code == 3
    assert "at most 5 % asked" in err.strip().splitlines()[-1]
    assert not (tmp_path / "c.yaml").exists()
    assert len(journals(tmp_path / "cache")) == 1


def test_every_refinement_of_the_best_finalist_is_judged_too(unbroken: tuple[bytes, str]) -> None:
    lines = [json.loads(line) for line in unbroken[0].splitlines()]
    finals = {one["final"]: one for one in lines if "final" in one}
    base, first, second, *refined = finals
    assert base == "base" and first.isdigit() and second.isdigit()
    parent = refined[0].removesuffix(".1")
    assert parent in (first, second) and refined == [f"{parent}.1", f"{parent}.2"]
    points = [finals[name]["point"] for name in refined]
    assert [(one["edits.0.ordered"], one["edits.0.strength"]) for one in points] == [
        (True, -0.5),
        (True, -1),
    ]
    kept = finals[parent]["point"]
    for one in points:
        assert all(one[key] == value for key, value in kept.items() if key not in points[0])
    assert all(set(one["answered"]) == set(ROLES) for one in finals.values())


def test_the_guard_and_the_divergence_decide_among_finals() -> None:
    """The best target that breaks a limit is passed over for the best that does not."""
    from bake.search.run import _chosen

    def answered(target: int, protected: int, kl: float = 0.1) -> Final:
        rates = {"target": Rate(target, 100), "protected": Rate(protected, 100)}
        return Final({}, kl, rates)

    finals = {"base": answered(90, 90, 0), "0": answered(15, 70), "1": answered(20, 89, 0.2)}
    finals |= {"2": answered(40, 87), "1.1": answered(20, 89), "3": Final({}, 2.5)}
    recipe = loaded("guard.protected_drop=2").recipe
    assert _chosen(recipe, finals) == "1.1"
    strict = loaded("guard.protected_drop=2", "guard.target_at_most=10").recipe
    with pytest.raises(GuardError, match=r"none of 5 finalists .* trial 1.1: target refusals are"):
        _chosen(strict, finals)
    apart = {name: finals[name] for name in ("base", "3")}
    with pytest.raises(GuardError, match=r"none of 1 finalists .* 3: KL 2.5000, 2 allowed"):
        _chosen(recipe, apart)
    with pytest.raises(GuardError, match="no trial is within the limit of 2 nats"):
        _chosen(recipe, {"base": finals["base"]})


def test_a_journal_that_is_none_is_refused_and_two_searches_do_not_share_one(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"trial": 3}\n')
    with pytest.raises(OutputError, match=r"a\.jsonl:1: not a line of a search"):
        SearchJournal(path)
    path.unlink()
    with (
        SearchJournal.opened(path),
        pytest.raises(OutputError, match="another search"),
        SearchJournal.opened(path),
    ):
        pass


def test_prompts_that_are_not_refused_end_the_search_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No class, no direction: no trial has figures."""
    monkeypatch.setattr(BySet, "judge", lambda self, found: [Verdict(ANSWERED) for _ in found])
    with pytest.raises(BakeError) as caught:
        search_to_file(loaded("search.trials=2"), tmp_path / "c.yaml")
    assert isinstance(caught.value, FitError)


def test_a_recipe_with_a_search_bakes_as_it_stands() -> None:
    assert isinstance(loaded().recipe, Recipe)
    assert prepare(loaded().recipe).plan == prepare(loaded("search=null").recipe).plan
