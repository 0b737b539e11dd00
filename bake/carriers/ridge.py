"""The `ridge` carrier: a rank-one write W' = W + v cᵀ, whose c reads a constant.

cᵀa is 1 for the writer's own input a, as nearly as ridge regression finds it on general
text, so the write adds nearly v. It needs no new tensor, shape or config key, and so
every runtime serves it; how near it comes is measured on text that it was not fitted on.

Behind the writer of y = W a a post-norm of gain g sends g ⊙ ŷ to the stream, ŷ = y / rms(y).
The write is then u cᵀ with u = v / g, and c reads rms(y). What the stream receives is
(g ⊙ ŷ + v) / s with s = rms(ŷ + u): the vector in the right proportion, on a sum that the norm
brings back to its own length. s² = 1 + 2 mean(ŷ ⊙ u) + mean(u²), so it is near 1 for a vector
that is short beside g and across what the branch writes. Nothing more is promised: the
reference is the hook that adds v behind the norm, and `verify.ridge_lost_share` refuses a
bake that is further from it.
"""

from bake.arch import Arch
from bake.carriers.carried import Carried, Site
from bake.carriers.writers import writers_at
from bake.checkpoint import Checkpoint
from bake.errors import ArchitectureError

__all__ = ["ridge_carrier"]


def ridge_carrier(base: Checkpoint, arch: Arch, layer: int, site: Site) -> Carried:
    """Find a writer that every token passes.

    Raises ArchitectureError when there is none: experts see some of the tokens only.
    """
    for one in writers_at(base, arch, layer, site):
        info = base.find(one.weight)
        if "expert" in one.writer.module or len(info.shape) > 2:
            continue
        norm = arch.post_norm(layer, one.branch)
        return Carried(
            "ridge",
            one.weight,
            info.shape,
            info.dtype,
            one.branch.multiplier(arch.numbers(base.config)),
            norm.module if norm else arch.block_module(layer, one.branch.module),
            one.writer.axis,
            norm=norm,
        )
    raise ArchitectureError(
        f"model_type '{arch.model_type}', layer {layer}: every writer at site: {site} is an "
        "expert, which sees some of the tokens only"
    )
