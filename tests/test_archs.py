"""The behavioural test of the architecture table: every row, every operator, through the disk."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bake.archs import ARCHS, Arch, Reader, find_arch
from bake.checkpoint import Checkpoint
from bake.edits import Edit
from bake.errors import ArchitectureError, CheckpointError, VerificationError
from bake.hooks import Intervention, steered
from bake.model import Batch, LiveModel
from bake.ops.ablate import Ablate, orthonormal
from bake.ops.add import Add
from bake.ops.gate import Gate
from bake.plan import make_plan
from bake.recipe import Recipe
from bake.stream import write_checkpoint
from bake.verify import check_files
from tests.tiny import TINY, write_tiny

IDS = torch.tensor([[1, 7, 30, 11, 52, 90, 4, 2], [1, 8, 31, 12, 53, 91, 5, 2]])
BATCH = Batch(IDS, torch.ones_like(IDS), (0, 1))


def recipe_of(*edits: dict[str, object], runtimes: Sequence[str] = ("transformers",)) -> Recipe:
    values = {"name": "test", "edits": list(edits), "runtimes": list(runtimes)}
    return Recipe.model_validate(values | {"evaluate": {"runtimes": ["transformers"]}})


def baked(
    folder: Path,
    arch: Arch,
    interventions: list[Intervention],
    edits: list[dict[str, object]],
    output: Path,
) -> LiveModel:
    """Bake the interventions of a recipe's `edits` and load the result with stock classes."""
    base = Checkpoint.open(folder)
    recipe = recipe_of(*edits)
    plan = make_plan(recipe, base, arch)
    made: dict[str, list[Edit]] = {}
    for one in interventions:
        for edit in one.edits():
            made.setdefault(edit.tensor, []).append(edit)
    assert set(made) == {edit.tensor for edit in plan.edits}
    output.mkdir()
    write_checkpoint(base, made, plan.created, plan.config, output)
    check_files(base, Checkpoint.open(output), made, {one.name for one in plan.created})
    return LiveModel.load(output, arch)


def effect_lost(base: Tensor, hooked: Tensor, after: Tensor) -> float:
    """max |Δ logit| of baked against hooked, as a share of the steering's own effect."""
    effect = float((hooked - base).abs().max())
    assert effect > 0.1
    return float((after - hooked).abs().max()) / effect


def everywhere(arch: Arch, basis: Tensor, embeddings: bool = True) -> Ablate:
    names = [
        arch.module_name(layer, writer)
        for layer in range(3)
        for writer in (arch.attention, arch.mlp)
    ]
    modules = tuple((name, False) for name in dict.fromkeys(names))
    return Ablate(basis, modules, embedding=arch.embedding if embeddings else None)


def test_the_table_and_the_tiny_models_are_the_same_rows() -> None:
    assert set(TINY) == set(ARCHS)


def test_ablated_everywhere_leaves_nothing_in_the_stream(tiny: Path, tmp_path: Path) -> None:
    arch = find_arch(Checkpoint.open(tiny).config, "config.json")
    basis = orthonormal(torch.randn(2, 32, generator=torch.Generator().manual_seed(1)))
    ablation = everywhere(arch, basis)
    spec: dict[str, object] = {"op": "ablate", "layers": [0, 1, 2], "embeddings": True}
    model = LiveModel.load(tiny, arch)
    with steered(model, [ablation]):
        hooked = model.logits(BATCH)
    after = baked(tiny, arch, [ablation], [spec], tmp_path / "out")
    assert effect_lost(model.logits(BATCH), hooked, after.logits(BATCH)) < 1e-4
    assert left_in_stream(after, basis) < 1e-6


def left_in_stream(model: LiveModel, basis: Tensor) -> float:
    """max |Rᵀh| / |h| over layers and positions."""
    with torch.inference_mode():
        states = model.model(IDS, output_hidden_states=True).hidden_states
    # The last entry is behind the final norm, whose gain mixes the coordinates.
    return max(float(((h @ basis).norm(dim=-1) / h.norm(dim=-1)).max()) for h in states[:-1])


@pytest.mark.parametrize("field", ["attention", "mlp"])
def test_a_row_that_misses_a_writer_fails(tiny: Path, tmp_path: Path, field: str) -> None:
    """A writer named wrongly leaves the direction in the stream, so the test above would fail."""
    arch = find_arch(Checkpoint.open(tiny).config, "config.json")
    missed, other = (
        (arch.attention, arch.mlp) if field == "attention" else (arch.mlp, arch.attention)
    )
    wrong = replace(arch, readers=(*arch.readers, Reader(missed.module, missed.gguf)))
    wrong = replace(wrong, attention=other, mlp=other)
    basis = orthonormal(torch.randn(1, 32, generator=torch.Generator().manual_seed(1)))
    spec: dict[str, object] = {"op": "ablate", "layers": [0, 1, 2], "embeddings": True}
    after = baked(tiny, wrong, [everywhere(wrong, basis)], [spec], tmp_path / "out")
    assert left_in_stream(after, basis) > 1e-3


@pytest.mark.parametrize("site", ["attention", "mlp"])
def test_a_gate_in_the_weights_is_the_hooked_gate(tiny: Path, tmp_path: Path, site: str) -> None:
    arch = find_arch(Checkpoint.open(tiny).config, "config.json")
    generator = torch.Generator().manual_seed(2)
    writer = arch.writer("attention" if site == "attention" else "mlp")
    gate = Gate(
        arch.module_name(1, writer),
        torch.randn(32, generator=generator),
        torch.randn(32, generator=generator),
    )
    spec: dict[str, object] = {"op": "gate", "layers": [1], "sites": [site], "strength": 1.0}
    model = LiveModel.load(tiny, arch)
    with steered(model, [gate]):
        hooked = model.logits(BATCH)
    after = baked(tiny, arch, [gate], [spec], tmp_path / "out")
    assert effect_lost(model.logits(BATCH), hooked, after.logits(BATCH)) < 1e-4


@pytest.mark.parametrize("site", ["out", "mid"])
def test_an_added_vector_is_an_exact_bias_or_refused(tiny: Path, tmp_path: Path, site: str) -> None:
    arch = find_arch(Checkpoint.open(tiny).config, "config.json")
    writer = arch.mlp if site == "out" else arch.attention
    vector = torch.randn(32, generator=torch.Generator().manual_seed(3))
    add = Add(1, "out" if site == "out" else "mid", vector, f"{arch.module_name(1, writer)}.bias")
    spec: dict[str, object] = {"op": "add", "layer": 1, "site": site, "strength": 1.0}
    if writer.bias is None:
        with pytest.raises(ArchitectureError, match="no bias slot"):
            baked(tiny, arch, [add], [spec], tmp_path / "out")
        return
    model = LiveModel.load(tiny, arch)
    with steered(model, [add]):
        hooked = model.logits(BATCH)
    after = baked(tiny, arch, [add], [spec], tmp_path / "out")
    assert effect_lost(model.logits(BATCH), hooked, after.logits(BATCH)) < 1e-4


def test_a_slot_that_the_class_does_not_have_fails(tmp_path: Path) -> None:
    """Qwen 2 hard-codes down_proj without a bias: a row that says otherwise is caught."""
    folder = tmp_path / "qwen2"
    write_tiny("qwen2", folder)
    wrong = replace(ARCHS["qwen2"], mlp=ARCHS["llama"].mlp)
    add = Add(1, "out", torch.ones(32), "model.layers.1.mlp.down_proj.bias")
    spec: dict[str, object] = {"op": "add", "layer": 1, "strength": 1.0}
    with pytest.raises(CheckpointError, match="unexpected keys"):
        baked(folder, wrong, [add], [spec], tmp_path / "out")


@pytest.mark.parametrize(
    ("model_type", "site", "runtime"),
    [("qwen3", "mid", "llama.cpp"), ("qwen3", "mid", "vllm"), ("llama", "out", "sglang")],
)
def test_a_bias_that_a_runtime_would_drop_is_refused(
    tmp_path: Path, model_type: str, site: str, runtime: str
) -> None:
    write_tiny(model_type, tmp_path)
    spec: dict[str, object] = {"op": "add", "layer": 1, "site": site, "strength": 1.0}
    base, arch = Checkpoint.open(tmp_path), ARCHS[model_type]
    make_plan(recipe_of(spec), base, arch)
    with pytest.raises(ArchitectureError, match=f"{runtime} would drop a bias"):
        make_plan(recipe_of(spec, runtimes=("transformers", runtime)), base, arch)


def test_an_existing_bias_is_ablated_and_added_to(tmp_path: Path) -> None:
    folder = tmp_path / "biased"
    write_tiny("llama", folder, attention_bias=True, mlp_bias=True)
    arch = ARCHS["llama"]
    basis = orthonormal(torch.randn(1, 32, generator=torch.Generator().manual_seed(4)))
    modules = tuple((name, True) for name, _ in everywhere(arch, basis).modules)
    ablation = Ablate(basis, modules, embedding=arch.embedding)
    spec: dict[str, object] = {"op": "ablate", "layers": [0, 1, 2], "embeddings": True}
    after = baked(folder, arch, [ablation], [spec], tmp_path / "out")
    assert left_in_stream(after, basis) < 1e-6


def test_a_tied_embedding_is_not_ablated(tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    write_tiny("llama", folder, tie_word_embeddings=True)
    recipe = recipe_of({"op": "ablate", "layers": [0], "embeddings": True})
    with pytest.raises(ArchitectureError, match="tied"):
        make_plan(recipe, Checkpoint.open(folder), ARCHS["llama"])


def test_an_unknown_tensor_or_model_type_stops(tiny_llama: Path) -> None:
    names = [*Checkpoint.open(tiny_llama).tensors, "model.layers.0.mlp.second_down_proj.weight"]
    with pytest.raises(ArchitectureError, match="second_down_proj"):
        ARCHS["llama"].check_tensors(names)
    config = json.loads((tiny_llama / "config.json").read_text()) | {"model_type": "mamba9"}
    with pytest.raises(ArchitectureError, match="'mamba9' is not in bake's table"):
        find_arch(config, "config.json")


def test_a_changed_byte_is_found(tiny_llama: Path, tmp_path: Path) -> None:
    base = Checkpoint.open(tiny_llama)
    output = tmp_path / "out"
    output.mkdir()
    write_checkpoint(base, {}, (), {}, output)
    info = Checkpoint.open(output).find("model.norm.weight")
    with info.file.open("r+b") as stream:
        stream.seek(info.start)
        first = stream.read(1)[0]
        stream.seek(info.start)
        stream.write(bytes([first ^ 1]))
    with pytest.raises(VerificationError, match=r"model\.norm\.weight differs"):
        check_files(base, Checkpoint.open(output), {}, set())
