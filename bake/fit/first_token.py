"""What a direction does to the first token of the answers, none of which is written.

Source: Arditi et al. 2024 (arXiv:2406.11717), its selection of a direction
(andyrdt/refusal_direction at 9d852fa).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, partial

import torch
from torch import Tensor

from bake.activations import Conversation
from bake.fit.place import Place
from bake.fit.shifted import digest, first_prompts, shifted
from bake.model import Batch, LiveModel, batches

__all__ = ["FirstToken", "refusal_score"]

BATCH = 8


def refusal_score(logits: Tensor, openings: Sequence[int]) -> Tensor:
    """log P(R) - log(1 - P(R)) [n], for R all tokens in `openings`, of logits [n, vocabulary]."""
    opens = torch.zeros(logits.shape[-1], dtype=torch.bool)
    opens[list(openings)] = True
    found: Tensor = logits[:, opens].logsumexp(-1) - logits[:, ~opens].logsumexp(-1)
    return found


class FirstToken:
    """Scores of directions on a live model of `layers` blocks, by its first answer token.

    At most 32 prompts of each class take part. `openings` are the tokens by which a refusal
    is known; where there is none, only the divergence is. Directions are added at the `place`.
    """

    def __init__(
        self,
        model: LiveModel,
        refused: Sequence[Conversation],
        answered: Sequence[Conversation],
        layers: int,
        openings: Sequence[int],
        place: Place | None = None,
    ) -> None:
        self._model, self._layers, self._openings = model, layers, openings
        self._place = place or Place(model)
        self._refused, self._answered = first_prompts(refused), first_prompts(answered)

    def figures(self, layer: int, vector: Tensor, basis: Tensor | None = None) -> dict[str, float]:
        """`bypass`, `induce` and `kl` of a direction [d] behind a block, as long as the class gap.

        The first two are mean refusal scores: of refused prompts with the direction taken out,
        of answered ones with it added. Of several the span, `basis` [k, d], is taken out.
        """
        span = vector if basis is None else basis
        found = {"kl": self.divergence(span)}
        if self._openings:
            without = partial(shifted, self._model, self._layers, remove=span)
            added = partial(
                shifted, self._model, self._layers, add={layer: vector}, place=self._place
            )
            found["bypass"] = self._score(self._refused, without, ["bypass", digest(span)])
            key = ["induce", self._place.site, layer, digest(vector)]
            found["induce"] = self._score(self._answered, added, key)
        return found

    def divergence(self, span: Tensor) -> float:
        """KL(clean ‖ without the direction) of the first token of answers to answered prompts."""
        clean = self._clean  # before anything steers

        def lost(batch: Batch) -> Tensor:
            before, after = clean[batch.rows], torch.log_softmax(self._last(batch), -1)
            return (before.exp() * (before - after)).sum(-1)

        without = partial(shifted, self._model, self._layers, remove=span)
        return self._mean(self._answered, without, lost, ["divergence", digest(span)])

    def _score(
        self,
        prompts: Sequence[Conversation],
        steering: Callable[[], ExitStack],
        key: Sequence[object],
    ) -> float:
        def score(batch: Batch) -> Tensor:
            return refusal_score(self._last(batch), self._openings)

        return self._mean(prompts, steering, score, [*key, *self._openings])

    @cached_property
    def _clean(self) -> Mapping[tuple[int, ...], Tensor]:
        """By a batch of answered prompts, its log-probabilities without steering."""
        return {
            batch.rows: torch.log_softmax(self._last(batch), -1)
            for batch in self._batches(self._answered)
        }

    def _last(self, batch: Batch) -> Tensor:
        """Logits [n, vocabulary] behind each last token."""
        with torch.inference_mode():
            return self._model.last_logits(batch, 1)[:, -1]

    def _batches(self, prompts: Sequence[Conversation]) -> Iterator[Batch]:
        """The prompts, their common beginning read once: as the model is when this is called."""
        sequences = [one.ids for one in prompts]
        prefix = self._model.prefix(sequences, min(map(len, sequences)) - 1)
        return batches(sequences, self._model.tokenizer.pad_token_id, BATCH, prefix)

    def _mean(
        self,
        prompts: Sequence[Conversation],
        steering: Callable[[], ExitStack],
        measure: Callable[[Batch], Tensor],
        key: Sequence[object],
    ) -> float:
        """The mean of a measure [n] over prompts, each process of a launch doing its batches."""

        def steered(batch: Batch) -> Mapping[str, Tensor]:
            return {"sum": measure(batch).sum()}

        with steering():
            found = self._model.work.results(self._batches(prompts), steered, lambda _: key)
            total = sum(float(one["sum"]) for _, one in found)
        return total / len(prompts)
