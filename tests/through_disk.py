"""Tiny models baked and read back: from a recipe's edits to what stock classes make of files."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from bake.arch import Arch, Branch
from bake.archs import find_arch
from bake.checkpoint import Checkpoint
from bake.edits import Edit
from bake.hooks import Intervention, on_output, steered
from bake.model import Batch, LiveModel
from bake.ops import OPERATORS, Measured
from bake.ops.add import Add
from bake.plan import make_plan
from bake.recipe import Gate, Recipe
from bake.stream import write_checkpoint
from bake.verify import check_files

IDS = torch.tensor([[1, 7, 30, 11, 52, 90, 4, 2], [1, 8, 31, 12, 53, 91, 5, 2]])
BATCH = Batch(IDS, torch.ones_like(IDS), (0, 1))


def recipe_of(*edits: Mapping[str, object], runtimes: Sequence[str] = ("transformers",)) -> Recipe:
    values = {"name": "test", "edits": list(edits), "runtimes": list(runtimes)}
    return Recipe.model_validate(values | {"evaluate": {"runtimes": ["transformers"]}})


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def measured(base: Checkpoint) -> Measured:
    """A fit that found a direction and a mean at every layer and a probe at every writer."""

    @cache
    def probe(module: str, spec: Gate) -> Tensor:
        shape = base.find(f"{module}.weight").shape
        # The other axis is the stream's.
        return drawn(len(module) + sum(map(ord, module)), math.prod(shape) // 32)

    def ramps(layer: int, spec: Gate) -> Tensor:
        # The constant is 1 on no token: the hook must be what the weights compute, whatever it is.
        return drawn(80 + layer, len(spec.heights) + 1, 32) / 32**0.5

    directions = {layer: drawn(layer, 32) for layer in range(8)}
    means = {layer: drawn(50 + layer, 32) for layer in range(8)}
    return Measured(directions, probe, base, means, ramps)


def interventions(base: Checkpoint, arch: Arch, recipe: Recipe) -> list[Intervention]:
    """What the recipe's operators plan for the checkpoint, and then build."""
    plan = make_plan(recipe, base, arch)
    return [
        one
        for spec, step in zip(recipe.edits, plan.steps, strict=True)
        for one in OPERATORS[spec.op].build(spec, step, measured(base), arch)
    ]


def baked(
    base: Checkpoint,
    arch: Arch,
    recipe: Recipe,
    output: Path,
    built: Sequence[Intervention] | None = None,
) -> LiveModel:
    """Bake the recipe and load the result with stock classes."""
    plan = make_plan(recipe, base, arch)
    made: dict[str, list[Edit]] = {}
    for one in built or interventions(base, arch, recipe):
        for edit in one.edits():
            made.setdefault(edit.tensor, []).append(edit)
    assert set(made) == {edit.tensor for edit in plan.edits}
    output.mkdir()
    write_checkpoint(base, made, plan.created, plan.config, output, renamed=plan.renamed)
    check_files(base, Checkpoint.open(output), made, plan.created, plan.renamed)
    return LiveModel.load(output, arch)


def effect_lost(base: Tensor, hooked: Tensor, after: Tensor) -> float:
    """max |Δ logit| of baked against hooked, as a share of the steering's own effect."""
    effect = float((hooked - base).abs().max())
    assert effect > 0.05
    return float((after - hooked).abs().max()) / effect


def stream(model: LiveModel, layers: int) -> list[Tensor]:
    """The residual stream behind the embeddings and behind every block."""
    seen: list[Tensor] = []

    def keep(output: Tensor, _: object) -> Tensor:
        seen.append(output.clone())
        return output

    handles = [on_output(model.block(layer), keep) for layer in range(layers)]
    try:
        model.logits(BATCH)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def left_in_stream(model: LiveModel, basis: Tensor, layers: int) -> float:
    """max |Rᵀh| / |h| over layers and positions."""
    return max(
        float(((h @ basis).norm(dim=-1) / h.norm(dim=-1)).max()) for h in stream(model, layers)
    )


def everywhere(layers: int) -> Mapping[str, object]:
    return {"op": "ablate", "layers": list(range(layers)), "embeddings": True}


def opened(folder: Path) -> tuple[Checkpoint, Arch, int]:
    base = Checkpoint.open(folder)
    arch = find_arch(base.config, "config.json")
    return base, arch, arch.layer_count(base.config)


def lost_through_disk(
    folder: Path, recipe: Recipe, output: Path, built: Sequence[Intervention] | None = None
) -> tuple[float, LiveModel]:
    """The share of the effect that the baked model loses, and that model."""
    base, arch, _ = opened(folder)
    built = built or interventions(base, arch, recipe)
    model = LiveModel.load(folder, arch)
    before = model.logits(BATCH)
    with steered(model, built):
        hooked = model.logits(BATCH)
    after = baked(base, arch, recipe, output, built)
    return effect_lost(before, hooked, after.logits(BATCH)), after


def with_exact_constants(folder: Path, built: Sequence[Intervention]) -> list[Intervention]:
    """Every ridge carrier with a readout that is 1 on each token of the batch.

    A fit finds one that is nearly so, and then parity would measure the fit.
    """
    model = LiveModel.load(folder, opened(folder)[1])
    ready: list[Intervention] = []
    for one in built:
        if isinstance(one, Add) and one.carried.carrier == "ridge":
            seen: list[Tensor] = []
            module = model.model.get_submodule(one.carried.tensor.removesuffix(".weight"))
            with steered(model, built):
                handle = on_output(module, lambda y, a, seen=seen: (seen.append(a), y)[1])
                model.logits(BATCH)
                handle.remove()
            inputs = seen[0].flatten(0, -2).double()
            readout = torch.linalg.pinv(inputs) @ torch.ones(len(inputs), dtype=torch.float64)
            assert float((inputs @ readout - 1).abs().max()) < 1e-6
            one = replace(one, readout=readout.float())
        ready.append(one)
    return ready


def mutations(arch: Arch, base: Checkpoint) -> Iterator[Arch]:
    """The row with one field of a branch wrong that the checkpoint has."""
    written = [one for found in arch.written(base.tensors).values() for one in found]

    def swapped(branch: Branch, wrong: Branch) -> Arch:
        return replace(
            arch, branches=tuple(wrong if one == branch else one for one in arch.branches)
        )

    for branch in dict.fromkeys(one.branch for one in written):
        for writer in dict.fromkeys(one.writer for one in written if one.branch == branch):
            others = tuple(one for one in branch.writers if one != writer)
            dropped = swapped(branch, replace(branch, writers=others))
            yield replace(dropped, readers=(*arch.readers, writer.module + writer.suffixes[0]))
            turned = replace(writer, axis=-1 if writer.axis == -2 else -2)
            yield swapped(branch, replace(branch, writers=(*others, turned)))
        if branch.norm:
            unnormed = swapped(branch, replace(branch, norm=None))
            yield replace(unnormed, readers=(*arch.readers, branch.norm))
            yield swapped(branch, replace(branch, norm_offset=1.0 - branch.norm_offset))
    for embedding in arch.embeddings:
        yield replace(arch, embeddings=tuple(one for one in arch.embeddings if one != embedding))
