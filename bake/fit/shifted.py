"""A live model with a direction taken out of its stream or added to it, and who sees it so."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import Tensor

from bake.activations import Conversation
from bake.fit.place import Place
from bake.fit.span import frame, rows_of
from bake.hooks import on_output
from bake.journal import hashed
from bake.model import LiveModel

__all__ = ["digest", "first_prompts", "shifted"]

PROMPTS = 32


def shifted(
    model: LiveModel,
    layers: int,
    *,
    remove: Tensor | None = None,
    add: Mapping[int, Tensor] | None = None,
    place: Place | None = None,
) -> ExitStack:
    """The model of `layers` blocks with a direction [d] taken out of its stream, or added to it.

    What is taken out may be the span of several [k, d], or for each row of a batch a span of its
    own [batch, k, d], and what is added a vector of its own [batch, 1, d], at the `place`, or
    behind whole blocks. Gradients pass to both. Taken out is what enters the first block and
    what leaves every block: what a block's attention writes along the direction its own MLP
    still sees.
    """
    stack = ExitStack()
    blocks = [model.block(layer) for layer in range(layers)]
    if remove is not None:
        basis = frame(rows_of(remove).float())

        def without(state: Tensor, _: object) -> Tensor:
            rows = basis.to(state)
            along: Tensor = (state @ rows.mT) @ rows
            return state - along

        def before(_: object, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            return (without(arguments[0], None), *arguments[1:])

        stack.callback(blocks[0].register_forward_pre_hook(before).remove)
        for block in blocks:
            stack.callback(on_output(block, without).remove)
    for layer, vector in (add or {}).items():
        stack.callback((place or Place(model)).add(layer, vector).remove)
    return stack


def digest(vector: Tensor) -> str:
    """What tells a vector from every other, in the journal."""
    return hashed(vector.tolist())


def first_prompts(conversations: Sequence[Conversation]) -> list[Conversation]:
    """At most 32 prompts without their answers, of those that are of their class."""
    chosen = [one for one in conversations if one.weight > 0][:PROMPTS]
    return [replace(one, ids=one.ids[: one.last + 1], decision=()) for one in chosen]
