"""What the trials of a search are made on: a model, what is known of it, and who judges."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from importlib.metadata import version
from typing import Any

import torch

from bake.errors import BakeError, FitError
from bake.evaluate import judged, rates
from bake.fit.labels import Labelled, labelled
from bake.fit.learned import Said, refusal_openings
from bake.fit.run import probed_apart
from bake.hooks import Intervention, steered
from bake.journal import Journal, hashed
from bake.judge import Judge
from bake.judge.choice import find_judge
from bake.judge.thinking import Thinking
from bake.manifest import file_hash, versions
from bake.model import LiveModel
from bake.plan import Plan, make_plan
from bake.prepare import Prepared, prepare
from bake.progress import progress
from bake.prompts import Prompt
from bake.recipe import LoadedRecipe, Recipe, Search
from bake.search.captured import Captured, asks_null_space, check_memory
from bake.search.journal import VERSION, Answered, Final
from bake.search.proxy import Proxy
from bake.search.space import Corner, Point, corners, refused, with_point
from bake.search.trial import Figures, Trial, behind_front, excess, kl_limit
from bake.work import Work

__all__ = ["Bench"]

# What of a recipe changes nothing of a search.
APART = ("name", "description", "output", "export", "verify")


class Bench:
    """What trials are made on; nothing is loaded before a trial or an answer asks for it."""

    def __init__(self, loaded: LoadedRecipe, search: Search) -> None:
        self._loaded, self._recipe, self._search = loaded, loaded.recipe, search

    @cached_property
    def ready(self) -> Prepared:
        """The recipe, prepared as for a bake."""
        return prepare(self._recipe)

    @cached_property
    def run(self) -> str:
        """A hash of what decides a search: recipe, prompts, model files, versions."""
        values = self._recipe.model_dump(mode="json")
        for name in APART:
            del values[name]
        for name in ("limit", "runtimes"):
            del values["evaluate"][name]
        for name in ("trials", "finalists"):
            del values["search"][name]
        base = self.ready.base
        files = [shard.file for shard in base.shards] + list(base.sidecars())
        hashes = {path.name: file_hash(path) for path in files}
        used = {**versions(), "optuna": version("optuna")}
        given = [self.ready.directions_hash, self.ready.given]
        return hashed([VERSION, values, self.prompts_used, hashes, used, given])

    @property
    def prompts_used(self) -> dict[str, dict[str, str]]:
        """The fingerprints of the splits that are looked at."""
        return {
            role: {"fit": parts["fit"], "select": parts["select"]}
            for role, parts in self.ready.fingerprints.items()
        }

    @cached_property
    def corners(self) -> list[tuple[Corner, Plan]]:
        """The corners of the space with their plans; raises RecipeError where one has none."""
        found = []
        for corner in corners(self._loaded):
            try:
                found.append((corner, self.plan(corner.recipe)))
            except BakeError as error:
                message = f"{corner.value}: {error}"
                raise refused(self._loaded, corner.place, message) from error
        return found

    def check(self) -> None:
        """Refuse from headers and text alone what no trial could be made of."""
        if self._recipe.directions is not None:
            for corner, _ in self.corners:
                if corner.key.startswith("fit."):
                    message = f"directions are those of {self._recipe.directions}; leave one out"
                    raise refused(self._loaded, corner.place, message)
        for corner, _ in self.corners:
            if corner.recipe.answered != self._recipe.answered:
                message = (
                    f"{corner.value}: takes answers of {corner.recipe.answered} tokens, and all "
                    f"trials are of one answer to each prompt, of {self._recipe.answered}; raise "
                    "fit.answers.tokens to the most that is asked"
                )
                raise refused(self._loaded, corner.place, message)
        read = {
            (places, edit.tensor): edit
            for corner, plan in self.corners
            for places, modules in probed_apart(plan, corner.recipe).items()
            for edit in plan.edits
            if edit.tensor.removesuffix(".weight") in modules
        }
        width = self.ready.plan.width
        sizes = [edit.shape[0] * edit.shape[1] // width for edit in read.values()]
        apart = any(asks_null_space(corner.recipe) for corner, _ in self.corners)
        check_memory(self._loaded.source, sizes, self.ready.base, apart)

    def plan(self, recipe: Recipe) -> Plan:
        """The plan of a point's recipe."""
        return make_plan(recipe, self.ready.base, self.ready.arch, self.ready.directions)

    @cached_property
    def model(self) -> LiveModel:
        """The base model."""
        torch.manual_seed(self._recipe.seed)
        folder, system = self.ready.base.folder, self._recipe.system_prompt
        found = LiveModel.load(folder, self.ready.arch, system=system)
        return replace(found, work=Work(journal=self._passes))

    @cached_property
    def judge(self) -> Judge:
        """The recipe's judge."""
        return find_judge(self._recipe.judge)

    @cached_property
    def _passes(self) -> Journal:
        """The finished batches of what is measured once."""
        return Journal.of(self.run)

    def forget(self) -> None:
        """Remove what only an interrupted search needs."""
        self._passes.remove()

    @cached_property
    def labels(self) -> dict[str, list[Labelled]]:
        """How the base model behaves on every role's fitting prompts."""
        every = self.ready.part("fit", self._recipe.fit.prompts_per_class)
        with progress("answers", sum(map(len, every.values()))) as update:
            return {
                role: labelled(self.model, self._recipe, prompts, self.judge, update)
                for role, prompts in every.items()
            }

    @cached_property
    def captured(self) -> Captured:
        """What fits are made of."""
        return Captured(
            *(self.model, self.ready.base, self._recipe, self.labels, self.ready.texts),
            *(self.ready.concept_prompts, self.ready.directions),
        )

    def measure(self) -> None:
        """What every trial needs: probes' inputs of the whole space, and the base's figures."""
        plans, recipes = zip(*((plan, corner.recipe) for corner, plan in self.corners), strict=True)
        self.captured.read_inputs(plans, recipes)
        self.proxy  # noqa: B018 (its passes are no part of a trial)

    @property
    def held(self) -> int:
        """The bytes that stay for all trials beside the model."""
        return self.captured.held + self.proxy.held

    @cached_property
    def prompts(self) -> dict[str, tuple[Prompt, ...]]:
        """The prompts that choose."""
        return self.ready.part("select", self._search.prompts)

    @cached_property
    def proxy(self) -> Proxy:
        """What trials are scored by. Raises FitError where refusals have no opening."""
        labels = [one for found in self.labels.values() for one in found]
        sides = [
            [Said(one.start, one.answer) for one in labels if one.side == side] for side in (1, -1)
        ]
        openings = refusal_openings(*sides)
        if not openings:
            raise FitError(
                "search: no token opens more of the refused answers than of the others, so trials "
                "cannot be told apart by the first token; give other prompts or another judge"
            )
        begins = [lowest(plan) for _, plan in self.corners]
        layers = [layer - 1 for layer in range(min(begins), max(begins) + 1) if layer > 0]
        with progress("select prompts", sum(map(len, self.prompts.values()))):
            return Proxy(self.model, self.prompts, openings, layers)

    def trial(
        self,
        number: int,
        values: Mapping[str, Any],
        point: Point,
        finished: Sequence[Trial] = (),
    ) -> Trial:
        """Fit a point and look at the first token; a point that cannot be fitted says why.

        And one that is no match for the `finished` trials says so, and is looked at no further.
        """
        guard, most = self._recipe.guard, kl_limit(self._recipe)
        over: Mapping[str, float] = {}
        stopped = ""

        def enough(so_far: Figures) -> bool:
            nonlocal over, stopped
            over = excess(guard, most, self.proxy.base, so_far)
            stopped = behind_front(guard, finished, over, so_far)
            return bool(stopped)

        try:
            figures = self.proxy.figures(*self._fitted(point), enough)
        except BakeError as error:
            return Trial(number, values, point, failed=str(error))
        if len(figures.refusals) == len(self.prompts):
            stopped = ""
        return Trial(number, values, point, figures, over, stopped=stopped)

    def final(self, point: Point) -> Final:
        """What whole prompts and answers in full say of a point, or why there is neither."""
        try:
            interventions, begin = self._fitted(point)
            kl = self.proxy.divergence(interventions, begin)
        except BakeError as error:
            return Final(point, failed=str(error))
        if kl > kl_limit(self._recipe):
            return Final(point, kl)
        return Final(point, kl, self.answers(interventions))

    def _fitted(self, point: Point) -> tuple[tuple[Intervention, ...], int]:
        """A point's interventions, and the first block that they edit (-1 for an embedding)."""
        try:
            found = with_point(self._recipe, point)
        except ValueError as error:
            raise FitError(str(error)) from error
        plan = self.plan(found)
        return self.captured.interventions(found, plan), lowest(plan)

    def answers(self, interventions: Sequence[Intervention] = ()) -> Answered:
        """Refusals by role of answers in full."""
        choice, marks = self._recipe.evaluate, self._recipe.judge.thinking
        answer = partial(self.model.answer, tokens=choice.answer_tokens, batch_size=choice.batch)
        thinking = Thinking(marks.begin, marks.end)
        with steered(self.model, interventions):
            said = judged(
                *(self.prompts, self.model.render, answer, self.model.text, self.judge, thinking)
            )
        return rates(said)


def lowest(plan: Plan) -> int:
    """The first block that the plan edits, -1 for an embedding."""
    return min(-1 if edit.layer is None else edit.layer for edit in plan.edits)
