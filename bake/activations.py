"""Streaming statistics of activations: weighted means and second moments.

Batches pass through the decoder once; only sums stay, in float64, so memory does
not grow with the number of prompts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bake.errors import FitError
from bake.model import Batch, LiveModel, batches

__all__ = ["Conversation", "Moments", "Tap", "collect"]


@dataclass(frozen=True)
class Conversation:
    """A prompt with the beginning of its answer, as token ids.

    `last` is the position of the last prompt token, `decision` the positions at
    which a gate must decide: the template's tail and the first answer tokens.
    `weight` is the conversation's weight in the statistics at `last`.
    """

    ids: tuple[int, ...]
    last: int
    decision: tuple[int, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Tap:
    """A place where activations are read: what goes into a module, or what comes out.

    `keep` says what stays of the samples: their mean, also their second moment,
    or the samples themselves. With a `norm`, which runs after `module`, every sample is
    divided by the root mean square of what that norm reads at its position.
    """

    module: nn.Module
    side: Literal["input", "output"]
    positions: Literal["last", "decision"]
    keep: Literal["mean", "second", "samples"] = "mean"
    norm: nn.Module | None = None


class Moments:
    """Running weighted sums of samples x [d]: Σ w, Σ w x, and on demand Σ w x xᵀ [d, d]."""

    def __init__(self, keep: Literal["mean", "second", "samples"] = "mean") -> None:
        self.keep = keep
        self.weight = 0.0
        self._total = torch.zeros((), dtype=torch.float64)
        self._outer = torch.zeros((), dtype=torch.float64)
        self._samples: list[tuple[Tensor, Tensor]] = []

    def add(self, samples: Tensor, weights: Tensor, rows: Tensor | None = None) -> None:
        """Take in samples [n, d] with weights [n]. Raises FitError when one is not finite.

        `rows` [n] are the samples' places in the caller's order, for `values`.
        """
        if not torch.isfinite(samples).all():
            raise FitError("activations are not finite; the model may need float32 or bfloat16")
        values, weights = samples.to(torch.float64), weights.to(torch.float64)
        self.weight += float(weights.sum())
        self._total = self._total + weights @ values
        if self.keep == "second":
            # float32 products, float64 sums: the product is the cost, the sum the precision.
            part = samples.to(torch.float32)
            product = part.T @ (part * weights[:, None].to(torch.float32))
            self._outer = self._outer + product.to(torch.float64)
        if self.keep == "samples":
            assert rows is not None
            self._samples.append((samples.to(torch.float32), rows))

    @property
    def mean(self) -> Tensor:
        """Weighted mean [d], float64. Raises FitError when no sample has any weight."""
        if self.weight <= 0:
            raise FitError("no sample of this class is left; see the labels of the base's answers")
        return self._total / self.weight

    @property
    def gram(self) -> Tensor:
        """Weighted mean of x xᵀ [d, d], float64, about zero."""
        return self._outer / self.weight

    @property
    def covariance(self) -> Tensor:
        """Weighted mean of (x - mean)(x - mean)ᵀ [d, d], float64."""
        return self.gram - torch.outer(self.mean, self.mean)

    @property
    def values(self) -> Tensor:
        """The samples themselves [n, d], float32, in the caller's order."""
        rows = torch.cat([rows for _, rows in self._samples])
        return torch.cat([samples for samples, _ in self._samples])[rows.argsort(stable=True)]


def collect(
    model: LiveModel,
    conversations: Sequence[Conversation],
    taps: Mapping[Any, Tap],
    batch_size: int = 16,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[Any, Moments]:
    """Moments of every tap over the chosen positions of all conversations.

    `progress` receives the number of conversations done since the last call.
    Raises FitError when there is no conversation or an activation is not finite.
    """
    if not conversations:
        raise FitError("no conversations to measure; the prompt set left none")
    moments = {name: Moments(tap.keep) for name, tap in taps.items()}
    # Nothing before the first position that counts is looked at.
    first = min(min(one.last, *one.decision, len(one.ids)) for one in conversations)
    prefix = model.prefix([one.ids for one in conversations], first)
    chosen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    waiting: dict[Any, Tensor] = {}

    def watch(name: Any, tap: Tap) -> list[RemovableHandle]:
        def take(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            found = inputs[0] if tap.side == "input" else output
            state = found[0] if isinstance(found, tuple) else found
            mask, weights, rows = chosen[tap.positions]
            if tap.norm is None:
                moments[name].add(state[mask], weights, rows)
            else:
                waiting[name] = state[mask]

        def divide(_: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
            mask, weights, rows = chosen[tap.positions]
            size = inputs[0][mask].float().square().mean(-1, keepdim=True).sqrt()
            moments[name].add(waiting.pop(name).float() / size, weights, rows)

        handles = [tap.module.register_forward_hook(take)]
        return handles + ([tap.norm.register_forward_hook(divide)] if tap.norm else [])

    handles = [handle for name, tap in taps.items() for handle in watch(name, tap)]
    try:
        padding = model.tokenizer.pad_token_id
        for batch in batches([one.ids for one in conversations], padding, batch_size, prefix):
            found = [conversations[row] for row in batch.rows]
            chosen["last"] = _chosen(
                batch, [((one.last,), one.weight, len(one.ids)) for one in found]
            )
            chosen["decision"] = _chosen(
                batch, [(one.decision, 1.0, len(one.ids)) for one in found]
            )
            model.run(batch)
            progress(len(batch.rows))
    finally:
        for handle in handles:
            handle.remove()
    return moments


def _chosen(
    batch: Batch, found: Sequence[tuple[Sequence[int], float, int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """The mask [batch, length] of (positions, weight, length) rows; a weight and row a sample."""
    mask = torch.zeros_like(batch.mask, dtype=torch.bool)
    weights: list[float] = []
    rows: list[int] = []
    for place, (positions, weight, length) in enumerate(found):
        shift = batch.ids.shape[1] - length
        mask[place, [shift + position for position in positions]] = True
        weights += [weight] * len(positions)
        rows += [batch.rows[place]] * len(positions)
    return mask, torch.tensor(weights, dtype=torch.float64), torch.tensor(rows)
