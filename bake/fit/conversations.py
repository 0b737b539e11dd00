"""What a fit shows to the model: answered prompts of every role, and text.

Prompts are answered once, and each gate may decide at tokens of its own. Conversations with some
tokens are made when they are first asked for, and are then the same for all that decide there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from bake.activations import Conversation
from bake.fit.doubt import with_doubts
from bake.fit.labels import Labelled
from bake.fit.questions import questions
from bake.fit.wrmd import confidence_weight
from bake.model import LiveModel
from bake.prompts import Prompt
from bake.recipe import Decision, Gate, Recipe

__all__ = [
    "PASSAGE_TOKENS",
    "Conversations",
    "conversations_of",
    "passages",
    "wanted_of",
    "weighed_roles",
]

PASSAGE_TOKENS = 96


class Conversations:
    """The labelled prompts of every role, and general text, as they are shown at some positions.

    Without labels nothing is shown, and text neither.
    """

    def __init__(
        self,
        model: LiveModel,
        recipe: Recipe,
        labels: Mapping[str, Sequence[Labelled]],
        texts: Sequence[Prompt],
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._model, self._recipe, self._labels = model, recipe, labels
        self._texts, self._progress = texts, progress
        self._at: dict[Decision, Mapping[str, Sequence[Conversation]]] = {}
        self._weighed: dict[Decision, Mapping[str, Sequence[Conversation]]] = {}

    def at(self, places: Decision) -> Mapping[str, Sequence[Conversation]]:
        """By role; `text` is all of its tokens at any positions."""
        if places not in self._at:
            found = {
                role: conversations_of(self._recipe, role, one, places)
                for role, one in self._labels.items()
            }
            self._at[places] = {**found, "text": self._passages} if found else found
        return self._at[places]

    def weighed(self, places: Decision) -> Mapping[str, Sequence[Conversation]]:
        """As they count in the probes of rank-one gates.

        If so asked, those of what a gate steers by doubt, and what is in front of where gates
        decide as classes of their own. Raises FitError as `with_doubts`.
        """
        if places not in self._weighed:
            found, shown = dict(self.at(places)), self.at(places)
            for role, doubts in self._doubts.items():
                pairs = zip(found[role], doubts, strict=True)
                found[role] = [replace(one, doubt=doubt) for one, doubt in pairs]
            if shown and places.question == "shut":
                found |= questions({role: shown[role] for role in self._labels})
            self._weighed[places] = found
        return self._weighed[places]

    @cached_property
    def _passages(self) -> list[Conversation]:
        return passages(self._model, self._texts)

    @cached_property
    def _doubts(self) -> dict[str, list[float]]:
        """By role how much each prompt counts, which its answer and the positions do not change."""
        roles = weighed_roles(self._recipe)
        if not (roles and self._labels):
            return {}
        shown = self.at(self._recipe.fit.positions.decision())
        found = with_doubts(self._model, shown, self._labels, roles, self._progress)
        return {role: [one.doubt for one in found[role]] for role in roles}


def conversations_of(
    recipe: Recipe, role: str, labels: Sequence[Labelled], places: Decision | None = None
) -> list[Conversation]:
    """The prompts with the openings of their answers, the positions that count, the weights.

    The positions are the fit's unless others are given. A prompt that does not behave as its
    class does has no weight in it.
    """
    wanted, places = wanted_of(recipe, role), places or recipe.fit.positions
    found = []
    for one in labels:
        weight = float(one.side == wanted)
        if weight and recipe.fit.estimator == "wrmd":
            weight = confidence_weight(one.confidence, wanted > 0)
        ids = (*one.start, *one.answer[: places.answer])
        first, last = max(0, len(one.start) - places.template), len(one.start) - 1
        found.append(Conversation(ids, last, tuple(range(first, len(ids))), weight))
    return found


def passages(model: LiveModel, texts: Sequence[Prompt]) -> list[Conversation]:
    """General text without a template: every token counts, for the gates alone."""
    found = []
    for text in texts:
        ids = model.tokenizer(text.text, add_special_tokens=False).input_ids[:PASSAGE_TOKENS]
        found.append(Conversation(tuple(ids), len(ids) - 1, tuple(range(len(ids))), 0.0))
    return found


def wanted_of(recipe: Recipe, role: str) -> int:
    """The behaviour that makes a prompt one of its class: 1 refused, -1 answered."""
    return 1 if role in (recipe.fit.refused, "protected", "refused") else -1


def weighed_roles(recipe: Recipe) -> list[str]:
    """The roles whose prompts count in probes by the model's doubt."""
    if recipe.fit.weights == "even":
        return []
    gates = (edit for edit in recipe.edits if isinstance(edit, Gate))
    return list(dict.fromkeys(role for gate in gates for role in gate.heights))
