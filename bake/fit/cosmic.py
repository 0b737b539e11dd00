"""COSMIC: choose a direction by where it moves the activations, without any output tokens."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bake.activations import Conversation, Tap, collect
from bake.fit.span import frame, rows_of
from bake.hooks import on_output
from bake.journal import hashed
from bake.model import Batch, LiveModel, batches

__all__ = ["CosmicScores", "cosmic_score", "least_alike", "shifted"]

SHARE = 0.1
PROMPTS = 32


def least_alike(refused: Tensor, answered: Tensor, share: float = SHARE) -> list[int]:
    """The `share` of layers, at least one, whose class means [layers, d] are least alike.

    Source: COSMIC (arXiv:2506.00085), its evaluation layers.
    """
    cosines = torch.cosine_similarity(refused, answered, dim=1)
    count = max(1, round(share * len(cosines)))
    return sorted(cosines.argsort(stable=True)[:count].tolist())


def cosmic_score(removed: Tensor, induced: Tensor, refused: Tensor, answered: Tensor) -> float:
    """cos(removed, answered) + cos(induced, refused), between -2 and 2; each is [layers, d].

    `removed` are refused prompts' means with the direction taken out of the stream, `induced`
    answered prompts' means with it added; all are averaged over the evaluation layers.
    Source: COSMIC (arXiv:2506.00085), its two scores and their sum.
    """
    pairs = ((removed, answered), (induced, refused))
    cosines = [torch.cosine_similarity(a.mean(0), b.mean(0), dim=0) for a, b in pairs]
    return float(sum(cosines))


class CosmicScores:
    """COSMIC's scores on a live model of some layers, at the last prompt token of two classes.

    At most 32 prompts of each take part.
    """

    def __init__(
        self,
        model: LiveModel,
        refused: Sequence[Conversation],
        answered: Sequence[Conversation],
        layers: int,
    ) -> None:
        self._model = model
        self._refused, self._answered = _shortened(refused), _shortened(answered)
        self._count = layers
        clean = [self._means(chosen, range(layers)) for chosen in (self._refused, self._answered)]
        self.layers = least_alike(clean[0], clean[1])
        self._clean = (clean[0][self.layers], clean[1][self.layers])

    def score(self, layer: int, vector: Tensor, basis: Tensor | None = None) -> float:
        """The score of a direction behind a block; `vector` [d] is as long as the class gap.

        Of several directions it is their span, `basis` [k, d], that is taken out.
        """
        span = vector if basis is None else basis
        with shifted(self._model, self._count, remove=span):
            removed = self._means(self._refused, self.layers, f"without {_digest(span)}")
        drawn = _digest(vector)
        with shifted(self._model, self._count, add={layer: vector}):
            induced = self._means(self._answered, self.layers, f"with {drawn} behind {layer}")
        return cosmic_score(removed, induced, *self._clean)

    def divergence(self, vector: Tensor) -> float:
        """KL(clean ‖ without the direction) at the last token of the answered prompts."""
        padding = self._model.tokenizer.pad_token_id

        def moved(batch: Batch) -> dict[str, Tensor]:
            before = torch.log_softmax(self._model.logits(batch)[:, -1], -1)
            with shifted(self._model, self._count, remove=vector):
                after = torch.log_softmax(self._model.logits(batch)[:, -1], -1)
            return {"divergence": (before.exp() * (before - after)).sum()}

        key = ["divergence", _digest(vector)]
        padded = batches([one.ids for one in self._answered], padding, 8)
        parts = [
            found["divergence"].double()
            for _, found in self._model.work.results(padded, moved, lambda _: key)
        ]
        (total,) = self._model.work.summed([sum(parts, torch.zeros((), dtype=torch.float64))])
        return float(total) / len(self._answered)

    def _means(
        self, conversations: Sequence[Conversation], layers: Iterable[int], state: str = "bare"
    ) -> Tensor:
        """Mean states [layers, d] behind blocks at the last prompt token."""
        taps: dict[Any, Tap] = {
            layer: Tap(self._model.block(layer), "output", "last") for layer in layers
        }
        found = collect(self._model, conversations, taps, state=state)
        return torch.stack([found[layer].mean for layer in taps])


def shifted(
    model: LiveModel,
    layers: int,
    *,
    remove: Tensor | None = None,
    add: Mapping[int, Tensor] | None = None,
) -> ExitStack:
    """The model of `layers` blocks with a direction [d] taken out of its stream, or added to it.

    What is taken out may be the span of several [k, d], or for each row of a batch a span of its
    own [batch, k, d], and what is added a vector of its own [batch, 1, d]. Gradients pass to
    both. Taken out is what enters the first block and what leaves every block: what a block's
    attention writes along the direction its own MLP still sees.
    """
    stack = ExitStack()
    blocks = [model.block(layer) for layer in range(layers)]
    if remove is not None:
        rows = frame(rows_of(remove).float()).to(model.model.dtype)

        def without(state: Tensor, _: object) -> Tensor:
            along: Tensor = (state @ rows.mT) @ rows
            return state - along

        def before(_: object, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            return (without(arguments[0], None), *arguments[1:])

        stack.callback(blocks[0].register_forward_pre_hook(before).remove)
        for block in blocks:
            stack.callback(on_output(block, without).remove)
    for layer, vector in (add or {}).items():
        moved = vector.to(model.model.dtype)
        handle = on_output(blocks[layer], lambda state, _, moved=moved: state + moved)
        stack.callback(handle.remove)
    return stack


def _digest(vector: Tensor) -> str:
    """What tells a vector from every other, in the journal."""
    return hashed(vector.tolist())


def _shortened(conversations: Sequence[Conversation]) -> list[Conversation]:
    """The prompts alone, of those that are of their class."""
    chosen = [one for one in conversations if one.weight > 0][:PROMPTS]
    return [replace(one, ids=one.ids[: one.last + 1], decision=()) for one in chosen]
