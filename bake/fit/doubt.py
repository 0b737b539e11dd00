"""How unsure the model is whether to refuse, as the weight of a prompt in a gate's probe.

A gate that mends what a model decides wrongly has little to learn from prompts that are far from
being decided otherwise, and most prompts are. Let m be by how much the likeliest opening of a
refusal is ahead of the likeliest other first token, in logits, and P = 1 / (1 + exp(-m)). Logistic
regression of the classes on a gate's input that starts at m in place of 0 takes a first Newton
step that weighs every prompt by P (1 - P). So weighed, a class's mean and Gram matrix are those of
the prompts next to the decision.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bake.activations import Conversation
from bake.errors import FitError
from bake.fit.labels import Labelled
from bake.fit.learned import Said, refusal_openings
from bake.model import Batch, LiveModel, batches

__all__ = ["doubt", "effective", "lead", "with_doubts"]

BATCH = 16
LEAST = 8.0  # prompts that a weighed class must be worth


def lead(logits: Tensor, openings: Sequence[int]) -> Tensor:
    """By how much the likeliest of some tokens is ahead of all others [n], of logits [n, v]."""
    opens = torch.zeros(logits.shape[-1], dtype=torch.bool)
    opens[list(openings)] = True
    return logits[:, opens].amax(-1) - logits[:, ~opens].amax(-1)


def doubt(leads: Tensor) -> Tensor:
    """P (1 - P) [n]: 1/4 where both are as likely, and falling by e with every logit."""
    return torch.sigmoid(leads.double()) * torch.sigmoid(-leads.double())


def effective(weights: Tensor) -> float:
    """How many samples of equal weight are worth these (Kish 1965): (Σ w)² / Σ w²."""
    return float(weights.sum().square() / weights.square().sum())


def with_doubts(
    model: LiveModel,
    conversations: Mapping[str, Sequence[Conversation]],
    labels: Mapping[str, Sequence[Labelled]],
    roles: Sequence[str],
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, list[Conversation]]:
    """The conversations of all roles, those of some of them with their doubt.

    What opens a refusal is known by the answers in `labels`. Nothing may be hooked. Raises
    FitError where refusals have no opening of their own, and where a role's prompts are so sure
    that fewer than LEAST of them would count.
    """
    said = [
        [Said(one.start, one.answer) for found in labels.values() for one in found if one.side == k]
        for k in (1, -1)
    ]
    openings = refusal_openings(*said)
    if not openings:
        raise FitError(
            "fit.weights: doubt: no token opens more of the refused answers than of the others, so "
            "there is no sign of a refusal in the first token; use fit.weights: even"
        )
    found = {role: list(each) for role, each in conversations.items()}
    for role in roles:
        starts = [one.ids[: one.last + 1] for one in found[role]]
        weights = doubt(_leads(model, starts, openings, progress))
        if effective(weights) < LEAST:
            raise FitError(
                f"prompts.{role}: the model is so sure of most of {len(weights)} prompts that "
                f"{effective(weights):.1f} of them would count, and at least {LEAST:.0f} are "
                "needed; give more prompts, or use fit.weights: even"
            )
        pairs = zip(found[role], weights.tolist(), strict=True)
        found[role] = [replace(one, doubt=weight) for one, weight in pairs]
    return found


def _leads(
    model: LiveModel,
    starts: Sequence[Sequence[int]],
    openings: Sequence[int],
    progress: Callable[[int], None],
) -> Tensor:
    """The leads [n] of the first tokens behind some prompts, in their order."""
    prefix = model.prefix(starts, min(map(len, starts)) - 1)

    def measured(batch: Batch) -> dict[str, Tensor]:
        with torch.inference_mode():
            return {"leads": lead(model.last_logits(batch, 1)[:, -1], openings)}

    leads = torch.zeros(len(starts))
    padded = batches(starts, model.tokenizer.pad_token_id, BATCH, prefix)
    key = ["doubt", *openings]
    for batch, one in model.work.results(padded, measured, lambda _: key, progress):
        leads[list(batch.rows)] = one["leads"]
    return leads
