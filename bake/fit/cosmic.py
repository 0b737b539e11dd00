"""COSMIC: choose a direction by where it moves the activations, without any output tokens."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from bake.activations import Conversation, Tap, collect
from bake.fit.place import Place
from bake.fit.shifted import digest, first_prompts, shifted
from bake.model import LiveModel

__all__ = ["CosmicScores", "cosmic_score", "least_alike"]

SHARE = 0.1


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

    At most 32 prompts of each take part. Directions are added at the `place`.
    """

    def __init__(
        self,
        model: LiveModel,
        refused: Sequence[Conversation],
        answered: Sequence[Conversation],
        layers: int,
        place: Place | None = None,
    ) -> None:
        self._model, self._place = model, place or Place(model)
        self._refused, self._answered = first_prompts(refused), first_prompts(answered)
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
            removed = self._means(self._refused, self.layers, f"without {digest(span)}")
        drawn = digest(vector)
        with shifted(self._model, self._count, add={layer: vector}, place=self._place):
            state = f"with {drawn} at {self._place.site} of {layer}"
            induced = self._means(self._answered, self.layers, state)
        return cosmic_score(removed, induced, *self._clean)

    def _means(
        self, conversations: Sequence[Conversation], layers: Iterable[int], state: str = "bare"
    ) -> Tensor:
        """Mean states [layers, d] behind blocks at the last prompt token."""
        taps: dict[Any, Tap] = {
            layer: Tap(self._model.block(layer), "output", "last") for layer in layers
        }
        found = collect(self._model, conversations, taps, state=state)
        return torch.stack([found[layer].mean for layer in taps])
