"""The `bias` carrier: the vector lies in a native bias of a writer, exactly."""

from collections.abc import Iterable

from bake.arch import Arch, Written
from bake.carriers.carried import Carried, Site
from bake.carriers.writers import writers_at
from bake.checkpoint import Checkpoint
from bake.edits import CreatedTensor
from bake.errors import ArchitectureError

__all__ = ["bias_carrier"]


def bias_carrier(
    base: Checkpoint, arch: Arch, layer: int, site: Site, runtimes: Iterable[str]
) -> Carried:
    """Find the bias of a writer that all of the runtimes asked for add to the stream.

    Where the base has no bias yet, the config switch that creates it creates its
    siblings in every layer, so all of them are listed as new tensors (zeros).
    Raises ArchitectureError when the stock class or a runtime has no slot for it: a
    bias written there would load silently and never be added.
    """
    refusals = []
    for one in writers_at(base, arch, layer, site):
        refusal = _refusal(one, set(runtimes))
        if not refusal:
            return _carried(base, arch, one)
        refusals.append(refusal)
    raise ArchitectureError(f"model_type '{arch.model_type}', layer {layer}: {refusals[0]}")


def _refusal(one: Written, runtimes: set[str]) -> str:
    """Why a bias of this writer would not be added to the stream as it is; empty if it would."""
    module = one.writer.module
    if one.branch.norm:
        return f"{one.branch.norm} comes behind {module} and would rescale a bias"
    if "{expert}" in module:
        return f"{module} has no bias slot"
    if one.writer.bias is None:
        return "" if one.bias else f"{module} has no bias slot"
    without = sorted(runtimes - one.writer.bias.runtimes)
    return f"{', '.join(without)} would drop a bias of {module}" if without else ""


def _carried(base: Checkpoint, arch: Arch, one: Written) -> Carried:
    multiplier = one.branch.multiplier(arch.numbers(base.config))
    branch = arch.block_module(one.layer, one.branch.module)
    if one.bias:
        info = base.find(one.bias)
        return Carried("bias", one.bias, info.shape, info.dtype, multiplier, branch)
    slot = one.writer.bias
    assert slot is not None
    created = []
    for number in range(arch.layer_count(base.config)):
        for module in slot.modules:
            weight = base.find(f"{arch.block_module(number, module)}.weight")
            name = weight.name.removesuffix("weight") + "bias"
            if name not in base.tensors:
                created.append(CreatedTensor(name, weight.shape[:1], weight.dtype, weight.name))
    weight = base.find(one.weight)
    return Carried(
        "bias",
        f"{one.module}.bias",
        weight.shape[:1],
        weight.dtype,
        multiplier,
        branch,
        created=tuple(created),
        config={arch.switch(slot.switch): True},
    )
