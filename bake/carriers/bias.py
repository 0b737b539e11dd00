"""The `bias` carrier: the vector lies in a native bias of a writer, exactly."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bake.archs import Arch, Site
from bake.checkpoint import Checkpoint
from bake.edits import CreatedTensor
from bake.errors import ArchitectureError

__all__ = ["BiasCarrier", "bias_carrier"]


@dataclass(frozen=True)
class BiasCarrier:
    """The bias that takes the vector, and what must exist for stock classes to add it."""

    tensor: str
    created: tuple[CreatedTensor, ...]
    config: Mapping[str, object]


def bias_carrier(
    base: Checkpoint, arch: Arch, layer: int, site: Site, runtimes: Iterable[str]
) -> BiasCarrier:
    """Find the bias slot of a writer, for all of the runtimes asked for.

    Where the base has no bias yet, the config switch that creates it creates its
    siblings in every layer, so all of them are listed as new tensors (zeros).
    Raises ArchitectureError when the stock class or a runtime has no slot for this
    writer: a bias written there would load silently and never be added.
    """
    writer = arch.writer(site)
    tensor = f"{arch.module_name(layer, writer)}.bias"
    if tensor in base.tensors:
        return BiasCarrier(tensor, (), {})
    if writer.bias is None:
        raise ArchitectureError(
            f"{base.folder}: model_type '{arch.model_type}' has no bias slot at {writer.module}; "
            "the bias carrier cannot serve it, use op: gate or op: ablate"
        )
    without = sorted(set(runtimes) - writer.bias.runtimes)
    if without:
        raise ArchitectureError(
            f"{base.folder}: {', '.join(without)} would drop a bias of {writer.module} of "
            f"model_type '{arch.model_type}'; use op: gate or ablate, or change runtimes"
        )
    created = []
    for number in range(arch.layer_count(base.config)):
        for module in writer.bias.modules:
            weight = base.find(f"{arch.layer.format(layer=number)}.{module}.weight")
            created.append(
                CreatedTensor(
                    name=weight.name.removesuffix("weight") + "bias",
                    shape=weight.shape[:1],
                    dtype=weight.dtype,
                    beside=weight.name,
                )
            )
    return BiasCarrier(tensor, tuple(created), {writer.bias.switch: True})
