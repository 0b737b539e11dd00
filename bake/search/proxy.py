"""The figures of a trial by the first token of the answers, none of which is written."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from bake.errors import FitError
from bake.fit.first_token import refusal_score
from bake.hooks import Intervention, steered
from bake.model import LiveModel
from bake.prompts import Prompt
from bake.search.behind import Behind
from bake.search.trial import DIGITS, Figures

__all__ = ["Proxy"]


class Proxy:
    """First-token figures of a live model on prompts by role, under any interventions.

    `openings` are the tokens by which a refusal is known; P(refusal) is their probability in
    the first token. States are kept behind each of `layers`.
    """

    def __init__(
        self,
        model: LiveModel,
        prompts: Mapping[str, Sequence[Prompt]],
        openings: Sequence[int],
        layers: Iterable[int],
    ) -> None:
        self._model, self._openings = model, openings
        self._roles = [role for role, chosen in prompts.items() for _ in chosen]
        sequences = [model.render(one.text) for chosen in prompts.values() for one in chosen]
        self._behind = Behind(model, sequences, layers)
        self._general = {
            row: torch.log_softmax(logits[place], -1)
            for rows, logits in self._behind.clean
            for place, row in enumerate(rows)
            if self._roles[row] == "general"
        }
        self.base = self._figures(self._behind.clean)

    @property
    def held(self) -> int:
        """The bytes of what is kept."""
        return self._behind.held + sum(one.nbytes for one in self._general.values())

    def figures(self, interventions: Sequence[Intervention], lowest: int) -> Figures:
        """The figures under interventions that begin in block `lowest`, or -1 before the first.

        Raises FitError where the steered model gives no finite numbers.
        """
        with steered(self._model, interventions):
            return self._figures(self._behind.last(lowest - 1))

    def _figures(self, found: Iterable[tuple[Sequence[int], Tensor]]) -> Figures:
        opened: dict[str, list[float]] = {role: [] for role in self._roles}
        moved = []
        for rows, logits in found:
            refused = torch.sigmoid(refusal_score(logits, self._openings)).tolist()
            for place, row in enumerate(rows):
                opened[self._roles[row]].append(refused[place])
                if row in self._general:
                    before = self._general[row]
                    after = torch.log_softmax(logits[place], -1)
                    moved.append(float((before.exp() * (before - after)).sum()))
        kl = sum(moved) / len(moved)
        refusals = {role: 100 * sum(one) / len(one) for role, one in opened.items()}
        if not torch.isfinite(torch.tensor([kl, *refusals.values()])).all():
            raise FitError("the steered model's logits are not finite")
        return Figures(
            {role: round(one, DIGITS) for role, one in refusals.items()},
            round(max(0.0, kl), DIGITS),
        )
