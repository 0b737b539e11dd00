"""The `ridge` carrier: a rank-one write W' = W + v cᵀ, whose c reads a constant.

cᵀa is 1 for the writer's own input a, as nearly as ridge regression finds it on general
text, so the write adds nearly v. It needs no new tensor, shape or config key, and so
every runtime serves it; how near it comes is measured on text that it was not fitted on.
"""

from bake.arch import Arch
from bake.carriers.carried import Carried, Site
from bake.carriers.writers import writers_at
from bake.checkpoint import Checkpoint
from bake.errors import ArchitectureError

__all__ = ["ridge_carrier"]


def ridge_carrier(base: Checkpoint, arch: Arch, layer: int, site: Site) -> Carried:
    """Find a writer that every token passes, with nothing but a number behind it.

    Raises ArchitectureError when there is none: experts see some of the tokens only, and
    behind a post-norm no write is an addition.
    """
    for one in writers_at(base, arch, layer, site):
        info = base.find(one.weight)
        if one.branch.norm or "expert" in one.writer.module or len(info.shape) > 2:
            continue
        return Carried(
            "ridge",
            one.weight,
            info.shape,
            info.dtype,
            one.branch.multiplier(arch.numbers(base.config)),
            arch.block_module(layer, one.branch.module),
            one.writer.axis,
        )
    raise ArchitectureError(
        f"model_type '{arch.model_type}', layer {layer}: no plain writer at site: {site} (a "
        "post-norm or experts are in the way)"
    )
