"""The part of a model behind a block, run again and again on states that are computed once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bake.model import Batch, LiveModel

__all__ = ["Tail", "replaced"]


class Tail:
    """A batch with its states behind a block; only later blocks run, and have gradients.

    `clean` are the log-probabilities [batch, vocabulary] behind each last token.
    """

    def __init__(self, model: LiveModel, layer: int, batch: Batch) -> None:
        self._model, self._batch = model, batch
        self._blocks = [model.block(number) for number in range(layer + 1)]
        seen: list[Any] = []
        handle = self._blocks[-1].register_forward_hook(lambda _, __, out: seen.append(out))
        try:
            with torch.no_grad():
                self.clean = self._last()
        finally:
            handle.remove()
        self._wrapped = isinstance(seen[0], tuple)
        self._states: Tensor = seen[0][0] if self._wrapped else seen[0]

    def shifted(self, vector: Tensor) -> Tensor:
        """As `clean`, with a vector [d] added behind the block at every position."""
        state = self._states + vector.to(self._states)
        with replaced(self._blocks, (state,) if self._wrapped else state):
            return self._last()

    def _last(self) -> Tensor:
        return torch.log_softmax(self._model.last_logits(self._batch, 1)[:, -1], -1)


@contextmanager
def replaced(blocks: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """The model with blocks that compute nothing and give `output`."""
    # What accelerate puts in their place is an attribute too, and comes back.
    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        vars(block)["forward"] = lambda *_, **__: output
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del vars(block)["forward"]
            if forward is not None:
                vars(block)["forward"] = forward
