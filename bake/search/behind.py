"""Prompts whose states behind some blocks are kept, so that later blocks alone run again."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import accumulate
from math import ceil
from typing import Any

import torch
from torch import Tensor

from bake.fit.tail import replaced
from bake.model import NO_PREFIX, Batch, LiveModel, Prefix, batches

__all__ = ["Behind"]

BATCH = 24  # prompts at most
TAIL = 8  # tokens at the end of a prompt that a screen has steered


class Behind:
    """Groups of prompts as the bare model leaves them behind each of some `layers`.

    What the prompts begin with in common is read once, here and under hooks. The states take
    prompts · tokens · width numbers a layer, and so do keys and values, which are as wide as those
    of the model. Nothing may be hooked when it is made.
    """

    def __init__(
        self,
        model: LiveModel,
        groups: Sequence[Sequence[Sequence[int]]],
        layers: Iterable[int],
    ) -> None:
        self._model = model
        self._sequences = [one for group in groups for one in group]
        self._layers = sorted(set(layers))
        self._prefix_states: dict[int, Any] = {}
        self._states: list[dict[int, Any]] = []
        with self._seen() as seen:
            self._prefix = self._read()
            self._prefix_states = dict(seen)
        padding = model.tokenizer.pad_token_id
        self._batches = [
            replace(batch, rows=tuple(first + row for row in batch.rows))
            for first, group in zip(accumulate(map(len, groups), initial=0), groups, strict=False)
            for batch in batches(group, padding, _even(len(group)), self._prefix)
        ]
        self._caches: list[Any] = []
        clean = []
        for batch in self._batches:
            cache = self._prefix.repeated(len(batch.rows))
            with self._seen() as seen:
                clean.append((batch.rows, self._logits(batch, cache)))
            self._states.append(dict(seen))
            if cache is not None:
                cache.crop(-batch.ids[:, -TAIL:].shape[1])
                self._caches.append(cache)
        self.clean = tuple(clean)

    def last(self, layer: int) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Rows and logits [n, vocabulary] behind their last tokens, as hooks have the model now.

        Group after group, each batch when it is asked for. Nothing up to `layer` may be hooked; -1
        where everything may.
        """
        kept = max((one for one in self._layers if one <= layer), default=None)
        with self._from(kept, self._prefix_states):
            prefix = self._joined(self._read(), kept) if self._prefix.ids else NO_PREFIX
        for batch, states in zip(self._batches, self._states, strict=True):
            with self._from(kept, states):
                logits = self._logits(replace(batch, prefix=prefix))
            yield batch.rows, logits

    def screened(self, layer: int) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """As `last`, of a model that hooks have at the last tokens of a prompt alone.

        All tokens before are as the bare model leaves them, and only these few are run. Nothing
        where the model keeps no keys and values, or the prompts have no beginning in common.
        """
        kept = max((one for one in self._layers if one <= layer), default=None)
        for batch, states, cache in zip(self._batches, self._states, self._caches, strict=False):
            tail = replace(batch, ids=batch.ids[:, -TAIL:])
            ends = {} if kept is None else {kept: _end(states[kept])}
            with self._from(kept, ends):
                logits = self._logits(tail, _own(cache))
            yield batch.rows, logits

    @property
    def held(self) -> int:
        """The bytes of the states, and of keys and values."""
        every = [self._prefix_states, *self._states]
        states = sum(_tensor(one).nbytes for found in every for one in found.values())
        layers = [layer for cache in self._caches for layer in cache.layers]
        kept = [one for layer in layers for one in (layer.keys, layer.values)]
        return states + sum(int(one.nbytes) for one in kept)

    def _read(self) -> Prefix:
        return self._model.prefix(self._sequences, min(map(len, self._sequences)) - 1)

    def _logits(self, batch: Batch, cache: Any = None) -> Tensor:
        with torch.inference_mode():
            return self._model.last_logits(batch, 1, cache)[:, -1]

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


def _even(count: int) -> int:
    """The size of batches that are nearly alike: a small rest costs as much as a whole one."""
    return ceil(count / ceil(count / BATCH))


def _own(cache: Any) -> Any:
    """A cache that grows without the one that it is made of."""
    found = copy(cache)
    found.layers = [copy(layer) for layer in cache.layers]
    return found


def _end(found: Any) -> Any:
    """The last tokens of what a block gives."""
    state = _tensor(found)[:, -TAIL:]
    return (state, *found[1:]) if isinstance(found, tuple) else state


def _tensor(found: Any) -> Tensor:
    state: Tensor = found[0] if isinstance(found, tuple) else found
    return state
