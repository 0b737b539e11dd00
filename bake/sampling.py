"""Answers that are sampled from a live model, with how likely it found them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bake.model import Batch, LiveModel, batches

__all__ = ["Sampled", "sampled_answers"]


@dataclass(frozen=True)
class Sampled:
    """Token ids of an answer, and the log-probability of each, the end-of-turn token's included.

    The end's is missing where the answer was cut off.
    """

    ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]

    def mean_log_probability(self, first: int = 0) -> float:
        """The mean from token `first` on; 0 where nothing follows."""
        chosen = self.log_probabilities[first:]
        return sum(chosen) / len(chosen) if chosen else 0.0


def sampled_answers(
    model: LiveModel,
    prompts: Sequence[Sequence[int]],
    *,
    samples: int,
    tokens: int,
    temperature: float,
    seed: int,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda _: None,
) -> list[list[Sampled]]:
    """`samples` answers to each prompt, of at most `tokens` tokens each.

    They are drawn at `temperature` from the whole vocabulary; the log-probabilities are the
    model's own, at temperature 1. The same seed gives the same answers, whichever process
    draws them, and the caller's random numbers are left alone. The bare model's answers
    are remembered, so no hooks may be in force.
    """
    ends = model.end_tokens()

    def drawn(batch: Batch) -> dict[str, Tensor]:
        likelihood = _Likelihood()
        with torch.random.fork_rng():
            # Of the batch alone: it may be another process that draws the one before.
            torch.manual_seed(seed + batch.rows[0])
            written = model.generate(
                batch.ids.repeat_interleave(samples, 0),
                batch.mask.repeat_interleave(samples, 0),
                max_new_tokens=tokens,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                logits_processor=[likelihood],
            )
        ids = written[:, batch.ids.shape[1] :].contiguous()
        return {"ids": ids, "logs": likelihood.of(ids)}

    found: dict[int, list[Sampled]] = {}
    padded = batches(prompts, model.tokenizer.pad_token_id, batch_size)
    choices = ["sampled", samples, tokens, temperature, seed]
    for batch, parts in model.work.results(padded, drawn, lambda _: choices, progress):
        rows = zip(parts["ids"].tolist(), parts["logs"].tolist(), strict=True)
        for row in batch.rows:
            found[row] = [_ended(*next(rows), ends) for _ in range(samples)]
    return [found[row] for row in sorted(found)]


def _ended(ids: list[int], logs: list[float], ends: set[int]) -> Sampled:
    """What stands before the first end-of-turn token."""
    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return Sampled(tuple(ids[:stop]), tuple(logs[: stop + 1]))


class _Likelihood:
    """Watch generation: at every step the log-probability of the token drawn before it.

    Only one step's distribution is kept, so memory does not grow with the answers.
    """

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._drawn: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._last is not None:
            self._drawn.append(self._last.gather(1, input_ids[:, -1:]))
        self._last = torch.log_softmax(scores.float(), -1)
        return scores

    def of(self, ids: Tensor) -> Tensor:
        """Log-probabilities [n, tokens] of the tokens that were drawn."""
        assert self._last is not None
        last: Any = self._last.gather(1, ids[:, -1:].to(self._last.device))
        return torch.cat([*self._drawn, last], 1).cpu()
