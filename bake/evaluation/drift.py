"""How far a model has moved from its base: divergence of its answers, perplexity of text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, isfinite
from typing import Any

import torch
from torch import Tensor

from bake.errors import VerificationError
from bake.hooks import Intervention, steered
from bake.model import LiveModel, batches
from bake.verify import divergence

__all__ = [
    "PASSAGE_TOKENS",
    "UNMEASURED",
    "Along",
    "Drift",
    "Sequences",
    "Text",
    "along",
    "loss",
    "of_models",
    "perplexity",
    "sequences",
]

# Tokens of a passage at most.
PASSAGE_TOKENS = 256
BATCH = 8


@dataclass(frozen=True)
class Text:
    """Perplexity of general text under the base and under the model, over so many tokens."""

    before: float
    after: float
    tokens: int

    @property
    def rise(self) -> float:
        """How much higher it is, in percent of the base's; below 0 where it fell."""
        return 100 * (self.after / self.before - 1)


@dataclass(frozen=True)
class Sequences:
    """Mean KL(base ‖ model) in nats at each token of the base's own greedy answers.

    `first_token` is the mean at the first token alone, `largest` the mean of the prompt that moved
    most; `positions` counts tokens.
    """

    first_token: float
    answers: float
    largest: float
    prompts: int
    positions: int


@dataclass(frozen=True)
class Drift:
    """What a bake's guard limits: the first token of answers to general prompts, and text.

    `first_token` is the mean KL(base ‖ model) in nats over `prompts`. What was not measured is
    None.
    """

    first_token: float | None = None
    prompts: int = 0
    text: Text | None = None

    def lines(self) -> list[str]:
        """What was measured, in words."""
        found = []
        if self.first_token is not None:
            found.append(
                f"divergence: {self.first_token:.1e} nats at the first token of answers to "
                f"{self.prompts} general prompts"
            )
        if self.text:
            found.append(
                f"perplexity: {self.text.before:.2f} to {self.text.after:.2f} "
                f"({self.text.rise:+.1f} %) on {self.text.tokens} tokens of held-out text"
            )
        return found

    def as_json(self) -> dict[str, Any]:
        """Every figure as plain values."""
        text = {**vars(self.text), "rise": self.text.rise} if self.text else None
        return {"first_token": self.first_token, "prompts": self.prompts, "text": text}


UNMEASURED = Drift()


@dataclass(frozen=True)
class Along:
    """Divergence along one answer in nats: at its first token, and the sum over `positions`."""

    first: float
    total: float
    positions: int


def along(base: Tensor, now: Tensor, start: int) -> Along:
    """From logits [n, vocabulary] behind each of n tokens; the first `start` are the prompt's.

    What follows the last token was never said, and is left out.
    """
    words = min(base.shape[-1], now.shape[-1])  # some runtimes pad the vocabulary
    end = max(start, len(base) - 1)
    lost = divergence(base[start - 1 : end, :words], now[start - 1 : end, :words])
    return Along(float(lost[0]), float(lost.sum()), len(lost))


def sequences(found: Sequence[Along]) -> Sequences:
    """The means over answers: of the first token by prompt, of all tokens by token."""
    positions = sum(one.positions for one in found)
    return Sequences(
        sum(one.first for one in found) / len(found),
        sum(one.total for one in found) / positions,
        max(one.total / one.positions for one in found),
        *(len(found), positions),
    )


def loss(logits: Tensor, ids: Sequence[int]) -> tuple[float, int]:
    """The summed -log p of each token but the first, in nats, and how many these are.

    From logits [n, vocabulary] behind each of n tokens.
    """
    wanted = torch.tensor(list(ids[1:]), dtype=torch.long)
    found = torch.log_softmax(logits[: len(wanted)].double(), -1)
    return -float(found.gather(-1, wanted[:, None]).sum()), len(wanted)


def perplexity(losses: Sequence[tuple[float, int]]) -> float:
    """exp of the mean loss by token, over all passages; of a loss above 600 nats as of 600."""
    total, count = sum(one for one, _ in losses), sum(count for _, count in losses)
    return exp(min(total / count, 600.0))


def of_models(
    base: LiveModel,
    model: LiveModel,
    interventions: Sequence[Intervention],
    general: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    update: Callable[[int], None] = lambda _: None,
) -> Drift:
    """The drift of a live model, hooked or not, from its base, both of one tokenizer.

    `general` are rendered prompts, `texts` passages, both as token ids; what is empty is not
    measured. `update` receives the number of sequences done since its last call. Raises
    VerificationError where the model gives no finite numbers.
    """
    lost = torch.zeros((), dtype=torch.float64)
    for batch in batches(general, base.tokenizer.pad_token_id, BATCH):
        with torch.inference_mode():
            before = base.last_logits(batch, 1)[:, -1]
            with steered(model, interventions):
                lost += divergence(before, model.last_logits(batch, 1)[:, -1]).sum()
        update(len(batch.rows))
    losses: tuple[list[tuple[float, int]], list[tuple[float, int]]] = ([], [])
    for batch in batches([ids[:PASSAGE_TOKENS] for ids in texts], 0, BATCH):
        plain = base.logits(batch)
        with steered(model, interventions):
            now = model.logits(batch)
        for row, mask in enumerate(batch.mask.bool()):
            ids = batch.ids[row][mask].tolist()
            for found, logits in zip(losses, (plain, now), strict=True):
                found.append(loss(logits[row][mask], ids))
        update(len(batch.rows))
    text = None
    if texts:
        count = sum(tokens for _, tokens in losses[0])
        text = Text(perplexity(losses[0]), perplexity(losses[1]), count)
    if not isfinite(float(lost)) or (text and not isfinite(text.rise)):
        raise VerificationError(f"{model.tokenizer.name_or_path}: its logits are not finite")
    return Drift(float(lost) / len(general) if general else None, len(general), text)
