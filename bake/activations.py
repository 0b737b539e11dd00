"""Streaming statistics of activations: weighted means and second moments.

Batches pass once through the decoder, as far as the last tap. Only sums stay, in float64, and
the samples of the conversations that a tap names: memory does not grow with the prompts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bake.errors import FitError
from bake.model import Batch, LiveModel, batches
from bake.work import Work

__all__ = ["Conversation", "Keep", "Moments", "Tap", "collect", "samples"]

Keep = Literal["mean", "second", "covariance"]
STRIP = 256  # columns of a Gram matrix at a time
CPU = torch.device("cpu")
SAMPLES = 1024  # samples at a time: adding a product to what there is costs as a hundred of them


@dataclass(frozen=True)
class Conversation:
    """A prompt with the beginning of its answer, as token ids.

    `last` is the position of the last prompt token, `decision` the positions at
    which a gate must decide: the template's tail and the first answer tokens.
    `weight` is the conversation's weight in the statistics at `last`, `doubt` that of each of its
    tokens in those at `decision`.
    """

    ids: tuple[int, ...]
    last: int
    decision: tuple[int, ...]
    weight: float = 1.0
    doubt: float = 1.0


# What a conversation counts in the statistics at some of its positions.
WEIGHTS: Mapping[str, Callable[[Conversation], float]] = {
    "last": lambda one: one.weight,
    "every last": lambda _: 1.0,
    "decision": lambda one: one.doubt,
}


@dataclass(frozen=True)
class Tap:
    """A place where activations are read: what goes into a module, or what comes out.

    The conversations' weights count at `last`, their doubts at `decision`; at `every last` all
    are 1. `keep` says what stays of the samples (`Moments`), and `rows` of which
    conversations the samples themselves stay. With a `norm`, which runs after `module`, every
    sample is divided by the root mean square of what that norm reads at its position. The
    outputs of the modules in `plus`, which run inside it, are added, each times its number.
    `back` counts the tokens from `last` to one before it that is read in its place. What is
    taken in is `through` of the samples [n, d], where it is given.
    """

    module: nn.Module
    side: Literal["input", "output"]
    positions: Literal["last", "every last", "decision"]
    keep: Keep = "mean"
    norm: nn.Module | None = None
    rows: tuple[int, ...] = ()
    plus: tuple[tuple[nn.Module, float], ...] = ()
    back: int = 0
    through: Callable[[Tensor], Tensor] | None = None

    @property
    def where(self) -> tuple[str, int]:
        """The positions that are read, as a key."""
        return self.positions, self.back


class Moments:
    """Running weighted sums of samples x [d]: Σ w, Σ w x, and on demand Σ w x xᵀ [d, d].

    The products of `second` are of float32: they are the cost of a gate's many tokens. Those
    of `covariance` are of float64, since the mean is taken off. `rows` are the numbers, in the
    caller's order, of the samples that stay themselves. The products are made and held on a
    `device`, where it has float64.
    """

    def __init__(
        self, keep: Keep = "mean", rows: Sequence[int] = (), device: torch.device = CPU
    ) -> None:
        self.keep, self._device = keep, _with_float64(device)
        self.rows = tuple(rows)
        self._places = {row: place for place, row in enumerate(self.rows)}
        self._weight = torch.zeros((), dtype=torch.float64)
        self._total = torch.zeros((), dtype=torch.float64)
        self._outer = torch.zeros((), dtype=torch.float64)
        self._kept = torch.zeros((), dtype=torch.float32)
        self._waiting: list[Tensor] = []

    def add(self, samples: Tensor, weights: Tensor, rows: Sequence[int] = ()) -> None:
        """Take in samples [n, d] with weights [n]. Raises FitError when one is not finite.

        `rows` are the samples' numbers in the caller's order, where some of them stay.
        """
        if not torch.isfinite(samples).all():
            raise FitError("activations are not finite; the model may need float32 or bfloat16")
        weights = weights.to(torch.float64)
        self._weight = self._weight + weights.sum()
        self._total = self._total + weights @ samples.to(torch.float64)
        if self.keep != "mean":
            part = samples.to(torch.float32 if self.keep == "second" else torch.float64)
            self._waiting.append(part * weights.sqrt()[:, None].to(part.dtype))
            if sum(map(len, self._waiting)) >= SAMPLES:
                self._multiply()
        if self._places:
            if not self._kept.ndim:
                self._kept = torch.zeros(len(self.rows), samples.shape[1])
            for place, row in enumerate(rows):
                if row in self._places:
                    self._kept[self._places[row]] = samples[place].float()

    def _multiply(self) -> None:
        """Add the products of the samples that wait: many at a time cost less than few."""
        if not self._waiting:
            return
        rows = torch.cat(self._waiting).to(self._device)
        self._waiting, width = [], rows.shape[1]
        if not self._outer.ndim:
            self._outer = torch.zeros(width, width, dtype=torch.float64, device=self._device)
        # Both halves are the same: what is below these strips is never computed.
        for first in range(0, width, STRIP):
            strip = rows[:, first : first + STRIP].T
            self._outer[first : first + STRIP, first:] += strip @ rows[:, first:]

    def share(self, work: Work, rank: int) -> None:
        """Take what the process has that took the samples in."""
        self._multiply()
        self._outer = self._outer.cpu()
        own = (self._weight, self._total, self._outer, self._kept)
        self._weight, self._total, self._outer, self._kept = work.by(rank, lambda: own)

    @property
    def held(self) -> int:
        """The numbers that are held in memory."""
        kept = (self._weight, self._total, self._outer, self._kept, *self._waiting)
        return sum(one.numel() for one in kept)

    @property
    def weight(self) -> float:
        """The sum of the weights."""
        return float(self._weight)

    @property
    def mean(self) -> Tensor:
        """Weighted mean [d], float64. Raises FitError when no sample has any weight."""
        if self.weight <= 0:
            raise FitError("no sample of this class is left; see the labels of the base's answers")
        return self._total / self.weight

    @property
    def gram(self) -> Tensor:
        """Weighted mean of x xᵀ [d, d], float64, about zero."""
        self._multiply()
        upper = self._outer.cpu().triu() / self.weight
        return upper + upper.triu(1).T

    @property
    def covariance(self) -> Tensor:
        """Weighted mean of (x - mean)(x - mean)ᵀ [d, d], float64."""
        return self.gram - torch.outer(self.mean, self.mean)

    @property
    def values(self) -> Tensor:
        """The samples of `rows` [n, d], float32."""
        return self._kept


def _with_float64(device: torch.device) -> torch.device:
    """The device, or the processor where it has no float64, as mps."""
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except TypeError:
        return CPU
    return device


def collect(
    model: LiveModel,
    conversations: Sequence[Conversation],
    taps: Mapping[Any, Tap],
    batch_size: int = 16,
    progress: Callable[[int], None] = lambda _: None,
    state: str = "",
    run: Callable[[Batch], None] | None = None,
) -> dict[Any, Moments]:
    """Moments of every tap over the chosen positions of all conversations.

    The model's processes share the conversations, and one takes in all samples of a tap, in their
    order; all have the result. `progress` receives the number of conversations done since the
    last call. `state` names what hooks make of the model, `bare` where there are none: without
    it no batch is remembered in the journal. `run` passes a batch through the decoder where that
    is not `model.run`.
    Raises FitError when there is no conversation, when one has no token so far back, or when
    an activation is not finite.
    """
    moments = {name: Moments(tap.keep, tap.rows, model.device) for name, tap in taps.items()}
    # In an order that all processes have: a set's is each one's own.
    dealt = sorted(taps, key=str)
    for batch, found in samples(model, conversations, taps, batch_size, progress, state, run):
        for name in model.work.own(dealt):
            tap = taps[name]
            places = _places(conversations, batch, tap.where)
            rows = [row for row, one in zip(batch.rows, places, strict=True) for _ in one]
            weights = [WEIGHTS[tap.positions](conversations[row]) for row in rows]
            moments[name].add(found[name], torch.tensor(weights, dtype=torch.float64), rows)
    for number, name in enumerate(dealt):
        moments[name].share(model.work, number % model.work.size)
    return moments


def samples(
    model: LiveModel,
    conversations: Sequence[Conversation],
    taps: Mapping[Any, Tap],
    batch_size: int = 16,
    progress: Callable[[int], None] = lambda _: None,
    state: str = "",
    run: Callable[[Batch], None] | None = None,
) -> Iterator[tuple[Batch, dict[Any, Tensor]]]:
    """All batches in order, each with the samples [n, d] of every tap.

    They are in the order of `batch.rows`, and of the positions within one. Everything else is
    as in `collect`.
    """
    if not conversations:
        raise FitError("no conversations to measure; the prompt set left none")
    back = max(tap.back for tap in taps.values())
    shortest = min(one.last for one in conversations)
    if back > shortest:
        raise FitError(
            f"fit.positions.direction: a prompt has {shortest + 1} tokens with its template, so "
            f"none at {-back - 1}; give at least {-shortest - 1}"
        )
    # Nothing before the first position that counts is looked at.
    first = min(min(one.last - back, *one.decision, len(one.ids)) for one in conversations)
    prefix = model.prefix([one.ids for one in conversations], first)
    mask: dict[tuple[str, int], Tensor] = {}
    seen: dict[Any, Tensor] = {}
    waiting: dict[Any, Tensor] = {}
    inside: dict[Any, Tensor] = {}

    def take_in(name: Any, samples: Tensor) -> None:
        through = taps[name].through
        seen[name] = samples if through is None else through(samples)
        if len(seen) == len(taps):
            raise _EnoughError

    def watch(name: Any, tap: Tap) -> list[RemovableHandle]:
        def take(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            found = inputs[0] if tap.side == "input" else output
            samples = _read(found, mask[tap.where])
            if name in inside:
                samples = samples + inside.pop(name)
            if tap.norm:
                waiting[name] = samples
            else:
                take_in(name, samples)

        def divide(_: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
            read = _read(inputs, mask[tap.where]).float()
            size = read.square().mean(-1, keepdim=True).sqrt()
            take_in(name, waiting.pop(name).float() / size)

        def written(factor: float) -> Callable[..., None]:
            def add(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
                read = _read(output, mask[tap.where])
                inside[name] = factor * read + inside.get(name, 0)

            return add

        handles = [tap.module.register_forward_hook(take)]
        handles += [one.register_forward_hook(written(factor)) for one, factor in tap.plus]
        return handles + ([tap.norm.register_forward_hook(divide)] if tap.norm else [])

    read_at = {tap.where for tap in taps.values()}

    def places(batch: Batch) -> dict[tuple[str, int], list[Sequence[int]]]:
        return {where: _places(conversations, batch, where) for where in read_at}

    def captured(batch: Batch) -> dict[str, Tensor]:
        lengths = [len(conversations[row].ids) for row in batch.rows]
        mask.update({name: _mask(batch, one, lengths) for name, one in places(batch).items()})
        # What lies behind the last tap is not run.
        with suppress(_EnoughError):
            (run or model.run)(batch)
        return {str(name): seen.pop(name) for name in taps}

    def key(batch: Batch) -> object:
        read = [
            [str(name), tap.side, [factor for _, factor in tap.plus], places(batch)[tap.where]]
            for name, tap in taps.items()
        ]
        return ["captured", state, read]

    handles = [handle for name, tap in taps.items() for handle in watch(name, tap)]
    padded = batches(
        [one.ids for one in conversations], model.tokenizer.pad_token_id, batch_size, prefix
    )
    try:
        for batch, found in model.work.results(padded, captured, key if state else None, progress):
            yield batch, {name: found[str(name)] for name in taps}
    finally:
        for handle in handles:
            handle.remove()


class _EnoughError(Exception):
    """Every tap has been read."""


def _places(
    conversations: Sequence[Conversation], batch: Batch, where: tuple[str, int]
) -> list[Sequence[int]]:
    """The positions of each of a batch's conversations that are read at `Tap.where`."""
    name, back = where
    found = [conversations[row] for row in batch.rows]
    return [one.decision if name == "decision" else (one.last - back,) for one in found]


def _read(found: Any, mask: Tensor) -> Tensor:
    """The hidden states [n, d] at a mask, also where a module returns a tuple around them."""
    state: Tensor = found[0] if isinstance(found, tuple) else found
    return state[mask.to(state.device)].cpu()


def _mask(batch: Batch, places: Sequence[Sequence[int]], lengths: Sequence[int]) -> Tensor:
    """The mask [batch, length] of positions in conversations of some lengths."""
    mask = torch.zeros_like(batch.mask, dtype=torch.bool)
    for row, (positions, length) in enumerate(zip(places, lengths, strict=True)):
        shift = batch.ids.shape[1] - length
        mask[row, [shift + position for position in positions]] = True
    return mask
