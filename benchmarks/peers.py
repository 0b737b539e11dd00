"""AlphaSteer and CAST: conditional steering by hooks, which no weights hold.

Both write along vectors that are given to them, so that what is compared is their condition.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.utils.hooks import RemovableHandle

from bake.activations import Conversation, Tap, samples
from bake.edits import Edit
from bake.fit.pca import pca_of_differences
from bake.fit.protect import busiest, in_null_space
from bake.fit.samples import Samples
from bake.hooks import on_output
from bake.model import NO_PREFIX, LiveModel, Prefix

# α of AlphaSteer's regression, in the units of its activations, as its code has it.
RIDGE = 10.0


class WholePrompts(LiveModel):
    """A model that reads every prompt in one pass, what it has in common with others too."""

    @classmethod
    def of(cls, model: LiveModel) -> "WholePrompts":
        """The same model."""
        return cls(*(getattr(model, one.name) for one in fields(model)))

    def prefix(self, sequences: Sequence[Sequence[int]], longest: int) -> Prefix:
        """None."""
        return NO_PREFIX


@dataclass(frozen=True, eq=False)
class AlphaSteer:
    """h ← h + v (cᵀh_last) behind a block, on all tokens of a prompt: `vector` v, `probe` c [d].

    h_last is the state of the prompt's last token; what the model then writes is not steered.
    Batches are padded on the left, and a prompt is read in one pass (`WholePrompts`).
    Source: AlphaSteer (arXiv:2506.07022), equations of its section 3, and its code, which
    steers the first pass alone.
    """

    layer: int
    vector: Tensor
    probe: Tensor

    def attach(self, model: LiveModel) -> Iterable[RemovableHandle]:
        """Hook the block."""

        def change(output: Tensor, _: object) -> Tensor:
            if output.shape[1] == 1:
                return output
            opening = output[:, -1:] @ self.probe.to(output)
            return output + opening.unsqueeze(-1) * self.vector.to(output)

        yield on_output(model.block(self.layer), change)

    def edits(self) -> Sequence[Edit]:
        """No weights hold it."""
        raise NotImplementedError


def alphasteer_probe(target: Tensor, closed: Tensor, share: float, ridge: float = RIDGE) -> Tensor:
    """c [d], for target states [n, d] to read 1 and closed ones [m, d] near 0.

    Δ = v cᵀ solves min |Δ P H - v 1ᵀ|² + α |Δ P|², P onto the `share` of the dimensions where the
    closed states are smallest: c = P (P HHᵀ P + α P)⁺ P H 1.
    """
    axes = busiest(closed, share)
    states = torch.stack([in_null_space(one, axes) for one in target])
    gram = states.T @ states
    gram.diagonal().add_(ridge)
    found: Tensor = torch.linalg.solve(gram, states.sum(0))
    return in_null_space(found, axes)


@dataclass(frozen=True, eq=False)
class Condition:
    """Whether the mean state h [d] of a prompt behind a block is on one side of a threshold.

    What is compared is cos(h, tanh(c cᵀh)), c = `axis` [d] of length 1; it is to be larger
    (`sign` 1) or smaller (-1). `score` is F_β on what it was chosen by.
    """

    layer: int
    axis: Tensor
    threshold: float
    sign: int
    score: float

    def holds(self, states: Tensor) -> Tensor:
        """Of each prompt [n], of its mean states behind all blocks [n, blocks, d]."""
        along = similarity(states[:, self.layer], self.axis)
        return self.sign * along > self.sign * self.threshold

    def __str__(self) -> str:
        side = "above" if self.sign > 0 else "below"
        return f"block {self.layer}, {side} {self.threshold:.4f}"


def similarity(states: Tensor, axis: Tensor) -> Tensor:
    """cos(h, tanh(c cᵀh)) [n] of states [n, d] and a unit axis c [d] (CAST, its section 3)."""
    projected = torch.tanh((states @ axis)[:, None] * axis)
    return cosine_similarity(states, projected, dim=-1)


def best_condition(
    fitted: tuple[Tensor, Tensor], chosen: tuple[Tensor, Tensor], beta: float
) -> Condition:
    """The condition of the best F_β: block, threshold and side.

    Both pairs are states [n, blocks, d] of prompts that are to be steered, and of others: those
    of `fitted` give each block's axis, the first principal component of their differences, those
    of `chosen` the score. Source: CAST (arXiv:2409.05907), which takes β = 1.
    """
    wanted = torch.cat([torch.full((len(one),), not place) for place, one in enumerate(chosen)])
    every = torch.cat(chosen)
    found: list[Condition] = []
    for layer in range(every.shape[1]):
        axis = pca_of_differences(*(Samples.of(one[:, layer]) for one in fitted))
        along = similarity(every[:, layer], axis)
        for threshold in along.tolist():
            for sign in (1, -1):
                score = f_score(sign * along > sign * threshold, wanted, beta)
                found.append(Condition(layer, axis, threshold, sign, score))
    return max(found, key=lambda one: one.score)


def f_score(fires: Tensor, wanted: Tensor, beta: float = 1.0) -> float:
    """F_β of what fires [n] against what is wanted [n]: a larger β weighs recall more."""
    both, missed, others = (
        int(one.sum()) for one in (fires & wanted, wanted & ~fires, fires & ~wanted)
    )
    weight = beta**2
    return (1 + weight) * both / max(1, (1 + weight) * both + weight * missed + others)


def mean_states(model: LiveModel, prompts: Sequence[Sequence[int]], blocks: int) -> Tensor:
    """The mean state over all tokens of each prompt behind each of the first blocks [n, blocks, d].

    In float64.
    """
    shown = [Conversation(tuple(ids), len(ids) - 1, tuple(range(len(ids)))) for ids in prompts]
    taps = {layer: Tap(model.block(layer), "output", "decision") for layer in range(blocks)}
    found: dict[int, Tensor] = {}
    for batch, seen in samples(model, shown, taps):
        lengths = [len(shown[row].ids) for row in batch.rows]
        found |= zip(batch.rows, _means(seen, lengths), strict=True)
    return torch.stack([found[row] for row in range(len(shown))])


def _means(seen: dict[int, Tensor], lengths: Sequence[int]) -> Iterator[Tensor]:
    """Of each prompt its mean states [blocks, d], of all prompts' tokens [sum of lengths, d]."""
    parts = [torch.split(seen[layer].double(), list(lengths)) for layer in sorted(seen)]
    for each in zip(*parts, strict=True):
        yield torch.stack([one.mean(0) for one in each])
