"""Where the weights hold an added vector, one carrier a file, and the choice among them."""

from collections.abc import Callable, Iterable

from bake.arch import Arch
from bake.carriers.bias import bias_carrier
from bake.carriers.block import block_carrier
from bake.carriers.carried import Carried, Site
from bake.carriers.embedding import embedding_carrier
from bake.carriers.ridge import ridge_carrier
from bake.checkpoint import Checkpoint
from bake.errors import ArchitectureError

__all__ = ["Carried", "Site", "carry"]


def carry(
    base: Checkpoint,
    arch: Arch,
    layer: int,
    site: Site,
    choice: str,
    runtimes: Iterable[str],
) -> tuple[Carried, str]:
    """The carrier asked for, or under `auto` the most exact one that all runtimes serve.

    Also why it was chosen. `in` of a block is `out` of the one before. Raises
    ArchitectureError with every carrier's reason when none can serve.
    """
    if site == "in" and layer:
        layer, site = layer - 1, "out"
    ways: dict[str, Callable[[], Carried]] = {
        "bias": lambda: bias_carrier(base, arch, layer, site, runtimes),
        "block": lambda: block_carrier(base, arch, layer, runtimes),
        "embedding": lambda: embedding_carrier(base, arch),
        "ridge": lambda: ridge_carrier(base, arch, layer, site),
    }
    # In the order of their parity, then of their cost: a block costs a layer, ridge is inexact.
    fitting = {"in": ("embedding",), "mid": ("bias", "ridge"), "out": ("bias", "block", "ridge")}[
        site
    ]
    if choice != "auto" and choice not in fitting:
        raise ArchitectureError(
            f"{base.folder}: the {choice} carrier cannot serve site: {site} of layer {layer}; "
            f"{' or '.join(fitting)} can"
        )
    refusals = []
    for name in fitting if choice == "auto" else (choice,):
        try:
            found = ways[name]()
        except ArchitectureError as error:
            refusals.append(f"the {name} carrier cannot serve: {error}")
        else:
            return found, "; ".join(refusals) or ("asked for" if choice != "auto" else "exact")
    raise ArchitectureError(
        f"{base.folder}: {'; '.join(refusals)}; use op: gate or ablate, or change runtimes"
    )
