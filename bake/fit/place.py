"""Where in the stream directions are measured, and where they are added to be tried."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bake.activations import Keep, Tap
from bake.carriers.writers import writers_at
from bake.checkpoint import Checkpoint
from bake.hooks import on_output
from bake.model import LiveModel

__all__ = ["Place", "place_of"]

Joining = tuple[tuple[nn.Module, float], ...]


@dataclass(frozen=True, eq=False)
class Place:
    """The stream of a live model behind its blocks, or between attention and MLP, at one token.

    `middle` by layer are the modules whose outputs, times their numbers, join what enters the
    block; where it is empty the place is behind the whole block. `back` counts the tokens from
    the last of the prompt to that token.
    """

    model: LiveModel
    middle: Mapping[int, Joining] = field(default_factory=dict)
    back: int = 0

    @property
    def site(self) -> Literal["mid", "out"]:
        """The place in the block, as recipes name it."""
        return "mid" if self.middle else "out"

    def tap(
        self,
        layer: int,
        positions: Literal["last", "every last"] = "last",
        keep: Keep = "mean",
        rows: tuple[int, ...] = (),
    ) -> Tap:
        """What reads the stream there."""
        side: Literal["input", "output"] = "input" if self.middle else "output"
        plus = self.middle.get(layer, ())
        block = self.model.block(layer)
        return Tap(block, side, positions, keep, rows=rows, plus=plus, back=self.back)

    def add(self, layer: int, vector: Tensor) -> RemovableHandle:
        """Hook the addition of a vector [d] onto the stream there, at every token.

        Of each row of a batch it may be a vector of its own [batch, 1, d].
        """
        joining = self.middle.get(layer, ((self.model.block(layer), 1.0),))
        module, factor = joining[0]
        moved = vector / factor
        return on_output(module, lambda state, _: state + moved.to(state))


def place_of(
    model: LiveModel,
    base: Checkpoint,
    layers: Iterable[int],
    site: Literal["mid", "out"] = "out",
    token: int = -1,
) -> Place:
    """The place at a site of some blocks; `token` counts from the prompt's end.

    Raises ArchitectureError for `mid` where blocks are parallel.
    """
    if site == "out":
        return Place(model, back=-1 - token)
    arch, numbers = model.arch, model.arch.numbers(base.config)
    middle = {}
    for layer in layers:
        joining: dict[str, float] = {}
        for one in writers_at(base, arch, layer, "mid"):
            norm = arch.post_norm(layer, one.branch)
            name = norm.module if norm else arch.block_module(layer, one.branch.module)
            joining[name] = one.branch.multiplier(numbers)
        middle[layer] = tuple((model.module(name), factor) for name, factor in joining.items())
    return Place(model, middle, -1 - token)
