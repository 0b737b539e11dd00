"""Conversations passed on through a model block by block: what lies behind runs once."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from bake.fit.tail import replaced
from bake.model import Batch, LiveModel

__all__ = ["Onward"]


class Onward:
    """The stream in front of a block for every batch of some conversations.

    It takes prompts · tokens · width numbers. Hooks count as they are when a block is passed,
    so those of blocks that lie behind must not change any more.
    """

    def __init__(self, model: LiveModel) -> None:
        self._model = model
        self._passed = 0  # blocks behind which the states are kept
        self._states: dict[tuple[int, ...], Any] = {}

    def to(self, layer: int) -> Callable[[Batch], None]:
        """What runs a batch from the states on, and keeps those that go into block `layer`.

        Each batch is known by its rows, and has to pass block `layer` - 1 before the next call.
        """
        behind, states = self._passed, self._states
        blocks = [self._model.block(number) for number in range(behind)]
        if layer > behind:
            self._passed, self._states = layer, {}
        following = self._states

        def run(batch: Batch) -> None:
            def keep(_: object, __: object, output: Any) -> None:
                following[batch.rows] = output

            with ExitStack() as stack:
                if behind:
                    stack.enter_context(replaced(blocks, states[batch.rows]))
                if layer > behind:
                    last = self._model.block(layer - 1)
                    stack.callback(last.register_forward_hook(keep).remove)
                self._model.run(batch)

        return run
