"""The block gate: one more block adds where its probe says so, on every row that offers a block."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import one_hot
from transformers.activations import ACT2FN

from bake.activations import Conversation
from bake.carriers.blank import blank_block
from bake.errors import ArchitectureError, FitError, ManifestError
from bake.export.layout import patch_gguf
from bake.fit.kept import built_again, opening_key, ramp_key
from bake.fit.ramp import (
    BINS,
    FOLDS,
    HIGH,
    LOW,
    NARROWEST,
    Shown,
    edges,
    gate_readings,
    ramps_of,
    readings,
)
from bake.fit.run import fit
from bake.gguf_file import GGUFFile
from bake.hooks import on_output, steered
from bake.llama import LlamaModel
from bake.model import Batch, LiveModel
from bake.ops.block_gate import STEEP, BlockGate, mlp_input, ramp
from bake.plan import check_gguf, make_plan
from bake.prompts import Prompt, Splits
from bake.recipe import Gate
from tests.test_block import IN_LLAMA_CPP, VARIANTS, WIDE, adding, edits_of, lost, opened
from tests.through_disk import BATCH, drawn, effect_lost, interventions, recipe_of
from tests.tiny import write_tiny
from tests.tiny_gguf import write_tiny_gguf
from tests.word_fit import WORDS, ByWord, word_prompts

F32, Q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0
# Rows that differ in what a gate needs: activation, norm in front, behind, fused, multipliers.
CHOSEN = (
    *("llama", "gelu", "gemma2", "gemma3_text", "olmo2", "phi3", "granite", "falcon_h1"),
    *("stablelm-parallel", "qwen3_moe-mixed"),
)


def gating(*layers: int, **others: object) -> dict[str, object]:
    return {"op": "gate", "form": "block", "layers": list(layers), "strength": 3.0} | others


@pytest.mark.parametrize("variant", CHOSEN)
def test_the_block_is_the_hook(tmp_path: Path, variant: str) -> None:
    """Whatever the probes read: with a ramp for protected prompts too."""
    model_type, changes = VARIANTS[variant]
    folder = tmp_path / "base"
    write_tiny(model_type, folder, **WIDE | changes)
    recipe = recipe_of(gating(0, 1, protected=0.5))
    share, after = lost(folder, recipe, tmp_path / "out")
    assert share < 1e-4
    assert after.model.config.num_hidden_layers == opened(folder)[0].config["num_hidden_layers"] + 2


@pytest.mark.slow
@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - set(CHOSEN)))
def test_the_block_is_the_hook_on_the_other_rows(tmp_path: Path, variant: str) -> None:
    test_the_block_is_the_hook(tmp_path, variant)


@pytest.mark.parametrize(
    "model_type",
    [one if one == "llama" else pytest.param(one, marks=pytest.mark.slow) for one in IN_LLAMA_CPP],
)
@pytest.mark.parametrize("kind", [F32, Q8_0], ids=["f32", "q8_0"])
def test_llama_cpp_runs_the_gate(
    tmp_path: Path, model_type: str, kind: GGMLQuantizationType
) -> None:
    """The patched GGUF in llama.cpp itself, against the hooked checkpoint."""
    changes, limit = IN_LLAMA_CPP[model_type]
    folder, source, output = tmp_path / "base", tmp_path / "base.gguf", tmp_path / "out.gguf"
    write_tiny(model_type, folder, **WIDE | {"num_hidden_layers": 4} | changes)
    base, arch = opened(folder)
    write_tiny_gguf(base, arch, source)
    recipe = recipe_of(gating(1, 2, protected=0.5), runtimes=["transformers", "llama.cpp"])
    plan, gguf = make_plan(recipe, base, arch), GGUFFile.open(source)
    check_gguf(plan, base, arch, gguf)
    patch_gguf(
        plan, arch, base.config, gguf, edits_of(base, arch, recipe), output, edited_type=kind
    )
    model = LiveModel.load(folder, arch)
    before = model.logits(BATCH)
    with steered(model, interventions(base, arch, recipe)):
        hooked = model.logits(BATCH)
    with LlamaModel(output, context=16, parallel=1, threads=2) as llama:
        rows = [torch.from_numpy(llama.logits(ids.tolist())) for ids in BATCH.ids]
    share = effect_lost(before, hooked, torch.stack(rows))
    assert share < max(limit, 3e-3 if kind is Q8_0 else 0)


def test_the_ramp_is_a_clip_but_for_its_corners() -> None:
    """Where the constant is 1, for every activation: 0 below the probe's 0, 1 above its 1."""
    probe, constant = torch.eye(2)
    z = torch.linspace(-4, 5, 901, dtype=torch.float64)
    x = torch.stack([z, torch.ones_like(z)], 1)
    for name in ("silu", "gelu", "gelu_pytorch_tanh", "relu"):
        found = ramp(x, probe[None].double(), constant.double(), ACT2FN[name])[:, 0]
        wrong = (found - z.clamp(0, 1)).abs()
        assert float(wrong.max()) < 0.279 / STEEP
        assert float(wrong[(z < -0.25) | (z > 1.25)].max()) < 1e-6
    # Further from 1 the height is the square.
    found = ramp(1.1 * x, probe[None].double(), constant.double(), ACT2FN["relu"])[:, 0]
    torch.testing.assert_close(found, 1.21 * z.clamp(0, 1))


def test_edges_keep_the_other_classes_closed_and_the_role_open() -> None:
    def shares(*reading: float) -> Tensor:
        bins = ((torch.tensor(reading, dtype=torch.float64) - LOW) / (HIGH - LOW) * BINS).long() + 1
        return one_hot(bins, BINS + 2).double().mean(0)

    classes = {
        "target": shares(0.301, 0.801, 0.901, 1.001),
        "general": shares(-0.299, 0.001, 0.101, 0.101),
        "text": shares(0.0011, 0.0011, 0.0011, 0.201),
    }
    assert edges(classes, "target", 100, 75) == pytest.approx((0.205, 0.3))
    assert edges(classes, "target", 75, 50) == pytest.approx((0.105, 0.8))
    # Where the classes overlap the others stay closed, and the ramp is steep.
    begin, end = edges(classes, "general", 75, 75)
    assert (begin, end - begin) == pytest.approx((0.905, NARROWEST))


def shown_by_class(seed: int) -> dict[str, list[Shown]]:
    """Random conversations of three classes, each of which begins with a token of its own."""
    classes = {}
    for number, role in enumerate(("target", "general", "text")):
        ids = torch.randint(5, 96, (14, 6), generator=torch.Generator().manual_seed(seed + number))
        ids[:, 0] = 10 * number + 5
        classes[role] = [
            Shown(Conversation(tuple(row), 3, (3, 4, 5)[: 2 + place % 2]), str(place // 2))
            for place, row in enumerate(ids.tolist())
        ]
    return classes


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "olmo2", "stablelm"])
def test_readings_are_of_probes_that_did_not_see_the_topic(tmp_path: Path, model_type: str) -> None:
    """Against the same by hand, from the samples: moments and histograms of every fold."""
    write_tiny(model_type, tmp_path, **WIDE)
    base, arch = opened(tmp_path)
    model = LiveModel.load(tmp_path, arch)
    classes, ridge = shown_by_class(0), 0.1
    unseen = drawn(3, 1, 32)
    blank = blank_block(base, arch, 1, ())
    found = readings(model, [blank], classes, ["target"], ridge, {1: unseen})[1]

    def inputs(one: Conversation) -> Tensor:
        ids = torch.tensor([one.ids])
        seen: list[Tensor] = []
        handle = model.block(1).register_forward_hook(lambda m, i, o: seen.append(o))
        model.logits(Batch(ids, torch.ones_like(ids), (0,)))
        handle.remove()
        h = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        h = h[0, list(one.decision)].double()
        if model_type == "stablelm":
            h = h - h.mean(-1, keepdim=True)
        return h / h.square().mean(-1, keepdim=True).sqrt()

    samples = {role: [inputs(one.conversation) for one in each] for role, each in classes.items()}
    total = {role: sum(map(len, each)) for role, each in samples.items()}

    def by_hand(without: int | None) -> Tensor:
        gram, rows = torch.zeros(32, 32, dtype=torch.float64), {}
        for role, each in samples.items():
            kept = [x for n, x in enumerate(each) if without is None or n // 2 % FOLDS != without]
            whole = torch.cat(kept)
            gram += whole.T @ whole / total[role]
            rows[role] = whole.sum(0) / total[role]
        # The same in coordinates of what is across the direction.
        across = torch.linalg.svd(unseen.double())[2][1:]
        gram = across @ gram @ across.T
        gram += ridge * gram.diagonal().sum() / 32 * torch.eye(31)
        wanted = torch.stack([rows["target"], rows["target"] + rows["general"] + rows["text"]])
        return torch.linalg.solve(gram, across @ wanted.T).T @ across

    torch.testing.assert_close(
        torch.cat([found.probes, found.constant[None]]), by_hand(None).float(), atol=1e-5, rtol=1e-4
    )
    assert float((found.probes @ unseen.T).abs().max()) < 1e-5 * float(found.probes.norm())
    held: dict[str, list[float]] = {}
    squares = []
    for role, each in samples.items():
        errors = []
        for number, x in enumerate(each):
            probe, constant = by_hand(number // 2 % FOLDS)
            size = x @ constant
            reading = torch.where(size > 0, x @ probe / size, HIGH)
            held.setdefault(role, []).extend(reading.tolist())
            errors += ((x @ constant - 1) ** 2).tolist()
        squares.append(sum(errors) / len(errors))
        shares = found.held_out[role][0]
        assert float(shares.sum()) == pytest.approx(1.0)
        by_bin = ((torch.tensor(held[role]) - LOW) / (HIGH - LOW) * BINS).clamp(-1, BINS) + 1
        for place in range(0, BINS, 20):
            below = float((by_bin < place + 1).double().mean())
            # One token may be at a bin's edge.
            assert abs(float(shares[: place + 1].sum()) - below) < 1.1 / len(held[role])
    assert found.error.held_out == pytest.approx((sum(squares) / 3) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_fitted_gate_opens_on_the_target_and_its_complement_elsewhere(
    tmp_path: Path, elsewhere: bool
) -> None:
    write_tiny("llama", tmp_path, **WIDE)
    base, arch = opened(tmp_path)
    model = LiveModel.load(tmp_path, arch)
    spec = Gate(**gating(1, elsewhere=elsewhere, ridge=0.001, closed=100.0))
    classes = {
        role: [replace(one, conversation=replace(one.conversation, decision=(0,))) for one in each]
        for role, each in shown_by_class(0).items()
    }
    reading = gate_readings(model, base, spec, {}, classes)[1]
    rows, found = ramps_of(spec, reading)
    wanted = {role: float((role == "target") != elsewhere) for role in classes}
    assert found == pytest.approx(wanted, abs=1e-6)
    gate = BlockGate(blank_block(base, arch, 1, ()), drawn(1, 1, 32), rows[:-1], rows[-1])
    read = mlp_input(model, gate.blank)
    for role, each in classes.items():
        ids = torch.tensor([each[0].conversation.ids[:1]])
        seen: list[Tensor] = []
        handle = on_output(model.block(1), lambda h, _, seen=seen: (seen.append(h), h)[1])
        model.logits(Batch(ids, torch.ones_like(ids), (0,)))
        handle.remove()
        height = float(ramp(read(seen[0]), rows[:-1], rows[-1], ACT2FN["silu"])[0, 0])
        assert height == pytest.approx(wanted[role], abs=0.05)


def test_a_fit_is_built_again_from_what_it_kept(tmp_path: Path) -> None:
    write_tiny("gemma2", tmp_path, **WIDE)
    base, arch = opened(tmp_path)
    model = LiveModel.load(tmp_path, arch)
    recipe = recipe_of(gating(0, 2, protected=0.5, closed=80.0))
    plan = make_plan(recipe, base, arch)
    prompts = {role: word_prompts(word) for role, word in WORDS.items()}
    passages = tuple(Prompt(f"w40 w{n} w42", "text", "en") for n in range(4))
    judge = ByWord(frozenset({WORDS["target"], WORDS["protected"]}))
    texts = Splits(passages, passages, passages)
    found = fit(model, base, plan, recipe, prompts, texts, judge)
    assert set(found.kept) == {ramp_key(0, 0), ramp_key(0, 2)}
    assert found.kept[ramp_key(0, 0)].shape == (3, 32)
    assert set(found.constants) == {"model.layers.0", "model.layers.2"}
    assert set(found.openings) == {opening_key(0, name) for name in found.constants}
    # Behind the second block no probe sees what the first one writes.
    first, second = (found.kept[ramp_key(0, layer)] for layer in (0, 2))
    steering = found.directions.vectors[0]
    assert float((second @ steering).abs().max()) < 1e-4 * float(second.norm())
    assert float((first @ steering).abs().max()) > 1e-2 * float(first.norm())
    again = built_again(recipe, plan, base, arch, found.directions, found.kept)
    for one, other in zip(found.interventions, again, strict=True):
        for edit, same in zip(one.edits(), other.edits(), strict=True):
            assert all(
                torch.equal(getattr(edit, name), value) if isinstance(value, Tensor) else True
                for name, value in vars(same).items()
            )
    with pytest.raises(ManifestError, match=r"there is no edits\.0\.ramp\.2"):
        kept = {ramp_key(0, 0): first}
        built_again(recipe, plan, base, arch, found.directions, kept)


def test_a_class_of_few_topics_is_refused(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path, **WIDE)
    base, arch = opened(tmp_path)
    classes = shown_by_class(0)
    classes["general"] = [replace(one, topic="one") for one in classes["general"]]
    with pytest.raises(FitError, match=r"prompts\.general: 1 topics, .* at least 4 are needed"):
        readings(
            LiveModel.load(tmp_path, arch),
            [blank_block(base, arch, 1, ())],
            *(classes, ["target"], 0.1),
        )


REFUSED: Mapping[str, tuple[str, Sequence[Mapping[str, object]], Mapping[str, Any], str]] = {
    "experts in every block": (
        *("mixtral", [gating(1)], {}),
        r"edits\.0\.form: no block can be inserted behind layer 1: model_type 'mixtral': its MLP "
        "is a mixture of experts .*; use form: rank_one",
    ),
    "no gate in the MLP": ("phi", [gating(1)], {}, "its MLP has no gate"),
    "a window by its number": (
        *("gemma2", [gating(1)], {"runtimes": ["sglang"]}),
        r"sglang takes a block's window .*; use form: rank_one, or other layers or runtimes",
    ),
    "a narrow MLP behind a post-norm": (
        *("gemma2-narrow", [gating(1, protected=1.0)], {}),
        r"the MLP has 66 neurons, .* twice the width of the stream and 4 more, 68",
    ),
    "a layer that is not there": ("llama", [gating(7)], {}, r"edits\.0\.layers: layer 7 is out of"),
    "two gates behind a layer": (
        *("llama", [gating(0, 1), gating(1, 2)], {}),
        r"edits\.1: a block is inserted behind layer 1 for edits\.0 already",
    ),
    "a vector in a block of the same layer": (
        *("llama", [gating(1), adding(1)], {}),
        r"edits\.\d: a block is inserted behind layer 1 for edits\.\d already",
    ),
    "an addition in front, named behind": (
        *("llama", [gating(1), adding(1, carrier="bias")], {}),
        r"edits\.1: edits\.0 acts behind this edit; name the add first",
    ),
    "an addition before the next block": (
        *("llama", [adding(2, site="in", carrier="bias"), gating(1)], {}),
        r"edits\.0\.site: what is added before block 2 lies in the block in front",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_block_or_no_order_is_refused(tmp_path: Path, case: str) -> None:
    model_type, edits, options, message = REFUSED[case]
    changes = WIDE
    if model_type.endswith("-narrow"):
        model_type, changes = "gemma2", {"intermediate_size": 66}
    write_tiny(model_type, tmp_path, **changes)
    with pytest.raises(ArchitectureError, match=message):
        make_plan(recipe_of(*edits, **options), *opened(tmp_path))


COMPOSED: Mapping[str, tuple[str, Sequence[Mapping[str, object]]]] = {
    "ablated in front": ("qwen3", ({"op": "ablate", "layers": [0, 1, 2]}, gating(1))),
    "a bias in the same layer": ("llama", (adding(1, carrier="bias"), gating(1))),
    "a block in front": ("gemma3_text", (adding(0), gating(1))),
    "a rank-one gate behind": ("llama", (gating(0), {"op": "gate", "layers": [2], "strength": 4})),
}


@pytest.mark.parametrize("case", COMPOSED)
def test_gates_compose_with_other_edits(tmp_path: Path, case: str) -> None:
    model_type, edits = COMPOSED[case]
    write_tiny(model_type, tmp_path / "base", **WIDE)
    share, _ = lost(tmp_path / "base", recipe_of(*edits), tmp_path / "out")
    assert share < 1e-4


def test_keys_of_the_other_form_are_refused() -> None:
    for change in (
        {"sites": ["mlp"]},
        {"form": "rank_one", "closed": 90.0},
        {"elsewhere": True, "protected": 1.0},
    ):
        with pytest.raises(ValidationError, match=r"leave (it|one) out"):
            recipe_of(gating(1) | change)
