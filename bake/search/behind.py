"""Prompts whose states behind some blocks are kept, so that later blocks alone run again."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bake.fit.tail import replaced
from bake.model import NO_PREFIX, Batch, LiveModel, Prefix, batches

__all__ = ["Behind"]

BATCH = 16


class Behind:
    """Prompts as the bare model leaves them behind each of some `layers`.

    What the prompts begin with in common is read once, here and under hooks. The states take
    prompts · tokens · width numbers a layer. Nothing may be hooked when it is made.
    """

    def __init__(
        self, model: LiveModel, sequences: Sequence[Sequence[int]], layers: Iterable[int]
    ) -> None:
        self._model, self._sequences = model, sequences
        self._layers = sorted(set(layers))
        self._prefix_states: dict[int, Any] = {}
        self._states: list[dict[int, Any]] = []
        with self._seen() as seen:
            self._prefix = self._read()
            self._prefix_states = dict(seen)
        padding = model.tokenizer.pad_token_id
        self._batches = list(batches(sequences, padding, BATCH, self._prefix))
        clean = []
        for batch in self._batches:
            with self._seen() as seen:
                clean.append((batch.rows, self._logits(batch)))
            self._states.append(dict(seen))
        self.clean = tuple(clean)

    def last(self, layer: int) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Rows and logits [n, vocabulary] behind their last tokens, as hooks have the model now.

        Nothing up to `layer` may be hooked; -1 where everything may.
        """
        kept = max((one for one in self._layers if one <= layer), default=None)
        with self._from(kept, self._prefix_states):
            prefix = self._joined(self._read(), kept) if self._prefix.ids else NO_PREFIX
        for batch, states in zip(self._batches, self._states, strict=True):
            with self._from(kept, states):
                yield batch.rows, self._logits(replace(batch, prefix=prefix))

    @property
    def held(self) -> int:
        """The bytes of the states."""
        every = [self._prefix_states, *self._states]
        return sum(_tensor(one).nbytes for states in every for one in states.values())

    def _read(self) -> Prefix:
        return self._model.prefix(self._sequences, min(map(len, self._sequences)) - 1)

    def _logits(self, batch: Batch) -> Tensor:
        with torch.inference_mode():
            return self._model.last_logits(batch, 1)[:, -1]

    def _joined(self, prefix: Prefix, kept: int | None) -> Prefix:
        """A prefix that was read from a block on, with the bare model's cache up to there."""
        if kept is not None:
            prefix.cache.layers[: kept + 1] = self._prefix.cache.layers[: kept + 1]
        return prefix

    def _from(self, kept: int | None, states: dict[int, Any]) -> ExitStack:
        """The model with the blocks up to `kept` giving the states that they gave."""
        stack = ExitStack()
        if kept is not None and states:
            blocks = [self._model.block(layer) for layer in range(kept + 1)]
            stack.enter_context(replaced(blocks, states[kept]))
        return stack

    @contextmanager
    def _seen(self) -> Iterator[dict[int, Any]]:
        """What the blocks give while this is open."""
        seen: dict[int, Any] = {}
        with ExitStack() as stack:
            for layer in self._layers:
                hook = partial(_keep, seen, layer)
                stack.callback(self._model.block(layer).register_forward_hook(hook).remove)
            yield seen


def _keep(seen: dict[int, Any], layer: int, _: object, __: object, output: Any) -> None:
    seen[layer] = output


def _tensor(found: Any) -> Tensor:
    state: Tensor = found[0] if isinstance(found, tuple) else found
    return state
