"""The `bias` carrier: the vector lies in a native bias of a writer, exactly."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from bake.arch import Arch, Branch, Written
from bake.checkpoint import Checkpoint
from bake.edits import CreatedTensor
from bake.errors import ArchitectureError

__all__ = ["BiasCarrier", "bias_carrier"]


@dataclass(frozen=True)
class BiasCarrier:
    """The bias that takes the vector, and what must exist for stock classes to add it.

    The bias holds the vector over `multiplier`, by which the class multiplies the branch.
    """

    tensor: str
    branch: Branch
    multiplier: float
    shape: tuple[int, ...]
    dtype: str
    created: tuple[CreatedTensor, ...]
    config: Mapping[str, object]


def bias_carrier(
    base: Checkpoint,
    arch: Arch,
    layer: int,
    site: Literal["out", "mid"],
    runtimes: Iterable[str],
) -> BiasCarrier:
    """Find the bias of a writer that all of the runtimes asked for add to the stream.

    Where the base has no bias yet, the config switch that creates it creates its
    siblings in every layer, so all of them are listed as new tensors (zeros).
    Raises ArchitectureError when the stock class or a runtime has no slot for it: a
    bias written there would load silently and never be added.
    """
    parallel = arch.is_parallel(base.config)
    if parallel and site == "mid":
        raise ArchitectureError(
            f"{base.folder}: the blocks of model_type '{arch.model_type}' are parallel: there is "
            "no stream between attention and MLP; use site: out"
        )
    sites = ("attention",) if site == "mid" else ("mlp", "attention") if parallel else ("mlp",)
    candidates = sorted(
        (one for one in arch.written(base.tensors)[layer] if one.branch.site in sites),
        key=lambda one: sites.index(one.branch.site),
    )
    refusals = []
    for one in candidates:
        refusal = _refusal(one, set(runtimes))
        if not refusal:
            return _carrier(base, arch, one)
        refusals.append(refusal)
    raise ArchitectureError(
        f"{base.folder}: model_type '{arch.model_type}', layer {layer}: {refusals[0]}; the bias "
        "carrier cannot serve it, use op: gate or op: ablate"
    )


def _refusal(one: Written, runtimes: set[str]) -> str:
    """Why a bias of this writer would not be added to the stream as it is; empty if it would."""
    module = one.writer.module
    if one.branch.norm:
        return f"{one.branch.norm} comes behind {module} and would rescale a bias"
    if "{expert}" in module:
        return f"{module} has no bias slot"
    if one.bias:
        return ""
    if one.writer.bias is None:
        return f"{module} has no bias slot"
    without = sorted(runtimes - one.writer.bias.runtimes)
    return f"{', '.join(without)} would drop a bias of {module}" if without else ""


def _carrier(base: Checkpoint, arch: Arch, one: Written) -> BiasCarrier:
    multiplier = one.branch.multiplier(base.config)
    if one.bias:
        info = base.find(one.bias)
        return BiasCarrier(one.bias, one.branch, multiplier, info.shape, info.dtype, (), {})
    slot = one.writer.bias
    assert slot is not None
    created = []
    for number in range(arch.layer_count(base.config)):
        for module in slot.modules:
            weight = base.find(f"{arch.block_module(number, module)}.weight")
            if f"{arch.block_module(number, module)}.bias" in base.tensors:
                continue
            created.append(
                CreatedTensor(
                    name=weight.name.removesuffix("weight") + "bias",
                    shape=weight.shape[:1],
                    dtype=weight.dtype,
                    beside=weight.name,
                )
            )
    weight = base.find(one.weight)
    return BiasCarrier(
        f"{one.module}.bias",
        one.branch,
        multiplier,
        weight.shape[:1],
        weight.dtype,
        tuple(created),
        {slot.switch: True},
    )
