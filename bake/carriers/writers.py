"""The writers behind which a site of the residual stream lies."""

from bake.arch import Arch, Written
from bake.carriers.carried import Site
from bake.checkpoint import Checkpoint
from bake.errors import ArchitectureError

__all__ = ["writers_at"]


def writers_at(base: Checkpoint, arch: Arch, layer: int, site: Site) -> tuple[Written, ...]:
    """The writers whose constant output is an addition at this site, best first.

    `out` follows the MLP, `mid` the attention; in a parallel block all writers do for
    `out`. Raises ArchitectureError for `mid` in a parallel block.
    """
    parallel = arch.is_parallel(base.config)
    if parallel and site == "mid":
        raise ArchitectureError(
            f"the blocks of model_type '{arch.model_type}' are parallel: there is no stream "
            "between attention and MLP; use site: out"
        )
    sites = ("attention",) if site == "mid" else ("mlp", "attention") if parallel else ("mlp",)
    found = (one for one in arch.written(base.tensors)[layer] if one.branch.site in sites)
    return tuple(sorted(found, key=lambda one: sites.index(one.branch.site)))
