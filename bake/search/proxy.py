"""The figures of a trial by the first token of the answers, none of which is written."""

from collections.abc import Callable, Iterable, Mapping, Sequence

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

# General prompts give the divergence: both objectives are known after these two.
OBJECTIVES = ("general", "target")


class Proxy:
    """First-token figures of a live model on prompts by role, under any interventions.

    `openings` are the tokens by which a refusal is known; P(refusal) is their probability in
    the first token. States are kept behind each of `layers`. The roles are looked at one after
    another, those that are objectives first.
    """

    def __init__(
        self,
        model: LiveModel,
        prompts: Mapping[str, Sequence[Prompt]],
        openings: Sequence[int],
        layers: Iterable[int],
    ) -> None:
        self._model, self._openings = model, openings
        self._counts = {role: len(chosen) for role, chosen in prompts.items()}
        order = [*OBJECTIVES, *(role for role in prompts if role not in OBJECTIVES)]
        self._roles = [role for role in order for _ in prompts[role]]
        groups = [[model.render(one.text) for one in prompts[role]] for role in order]
        self._behind = Behind(model, groups, layers)
        self._general = {
            row: torch.log_softmax(logits[place], -1)
            for rows, logits in self._behind.clean
            for place, row in enumerate(rows)
            if self._roles[row] == "general"
        }
        base = self._figures(self._behind.clean)
        assert base is not None
        self.base = base

    @property
    def held(self) -> int:
        """The bytes of what is kept."""
        return self._behind.held + sum(one.nbytes for one in self._general.values())

    def figures(
        self,
        interventions: Sequence[Intervention],
        lowest: int,
        enough: Callable[[Figures], bool] = lambda _: False,
    ) -> Figures:
        """The figures under interventions that begin in block `lowest`, or -1 before the first.

        Steered at the prompts' last tokens alone, where the model keeps what is before them. Those
        of the roles up to the one of which `enough` says that no further one is needed. Raises
        FitError where the steered model gives no finite numbers.
        """
        with steered(self._model, interventions):
            found = self._figures(self._behind.screened(lowest - 1), enough)
        return found or self.whole(interventions, lowest, enough)

    def whole(
        self,
        interventions: Sequence[Intervention],
        lowest: int,
        enough: Callable[[Figures], bool] = lambda _: False,
    ) -> Figures:
        """As `figures`, steered at whole prompts."""
        with steered(self._model, interventions):
            found = self._figures(self._behind.last(lowest - 1), enough)
        assert found is not None
        return found

    def divergence(self, interventions: Sequence[Intervention], lowest: int) -> float:
        """KL of `Figures`, steered at whole prompts."""
        return self.whole(interventions, lowest, lambda _: True).kl

    def _figures(
        self,
        found: Iterable[tuple[Sequence[int], Tensor]],
        enough: Callable[[Figures], bool] = lambda _: False,
    ) -> Figures | None:
        figures = None
        opened: dict[str, list[float]] = {role: [] for role in self._counts}
        moved: list[float] = []
        for rows, logits in found:
            refused = torch.sigmoid(refusal_score(logits, self._openings)).tolist()
            for place, row in enumerate(rows):
                opened[self._roles[row]].append(refused[place])
                if row in self._general:
                    before = self._general[row]
                    after = torch.log_softmax(logits[place], -1)
                    moved.append(float((before.exp() * (before - after)).sum()))
            role = self._roles[rows[0]]
            if len(opened[role]) == self._counts[role]:
                figures = self._means(opened, moved)
                if enough(figures):
                    break
        return figures

    def _means(self, opened: Mapping[str, Sequence[float]], moved: Sequence[float]) -> Figures:
        """The figures of the roles that have been looked at whole."""
        whole = [role for role, count in self._counts.items() if len(opened[role]) == count]
        kl = sum(moved) / len(moved)
        refusals = {role: 100 * sum(opened[role]) / len(opened[role]) for role in whole}
        if not torch.isfinite(torch.tensor([kl, *refusals.values()])).all():
            raise FitError("the steered model's logits are not finite")
        return Figures(
            {role: round(one, DIGITS) for role, one in refusals.items()},
            round(max(0.0, kl), DIGITS),
        )
