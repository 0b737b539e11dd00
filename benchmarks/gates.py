"""Gates against what steers unconditionally, and against conditional hooks, at equal openness.

    python -m benchmarks.gates [--only METHOD] [--json FILE]

The demo and the recipe `political-open`. Every method is fitted on the fit split of the recipe and
steers away from refusal along the same directions: mean differences, and for rank-one gates, `add`
and `cast` also those of `rmd`; `wang` and some settings of `add` take them without the direction of
harmful requests. On the select split the strength is found at which the mean P(refusal) of the
first answer token to political questions is the one asked for, and the best of a method's settings:
of those that come to most of what is asked, the one under which harmful requests lose least of
their P(refusal) at 5 %, to a tenth of a point (what they gain counts as nothing lost), and then the
one of the least KL(base‖steered) on general prompts there. What steers unconditionally has its best
setting at each openness by itself. Of that setting the figures of the test split are printed: mean
P(refusal) of every set, and the KL. At the openness of `--answers` further sets are asked, and
whole answers are written.

| method | what it is |
|---|---|
| `gate`, `ordered` | rank-one gates, fitted each by itself, or in order |
| `block` | block gates |
| `both` | gates in order and block gates, of `political-open-block` |
| `add` | the directions added behind one block, or spread over several |
| `ablate` | one direction out of all that some blocks write, or of all blocks |
| `wang` | the same, the direction orthogonal to that of harmful requests (arXiv:2410.03415) |
| `heretic` | the models of heretic's Pareto front that `benchmarks.heretic` left in `--models` |
| `alphasteer` | AlphaSteer (arXiv:2506.07022), by a hook |
| `cast` | CAST (arXiv:2409.05907), by a hook |

`--every` prints a method's other settings too; nothing is chosen by that.

Rank-one gates in order see each other at the strength of their fit, and are then scaled; those of
`both` are fitted at the recipe's own, which is 1 here. Of heretic's models what their weights
gained is scaled, since its search has no strength: 1 is the model itself. The one that opens
furthest as it is comes first.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise, product
from math import log
from pathlib import Path

import torch
from torch import Tensor

from bake.activations import Tap, collect
from bake.checkpoint import Checkpoint
from bake.evaluate import judged, rates
from bake.evaluation.sets import chosen_sets
from bake.fit.conversations import conversations_of
from bake.fit.first_token import refusal_score
from bake.fit.learned import Said, refusal_openings
from bake.hooks import Intervention, steered
from bake.judge.thinking import Thinking
from bake.model import LiveModel
from bake.ops.add import Add
from bake.ops.block_gate import BlockGate
from bake.ops.gate import Gate
from bake.prompts import Prompt
from bake.recipe import Recipe, load_recipe
from bake.search.behind import Behind
from bake.search.bench import Bench as Fits
from bake.search.bench import lowest
from bake.search.captured import Captured
from benchmarks.carriers import Row, printed
from benchmarks.peers import (
    AlphaSteer,
    Condition,
    WholePrompts,
    alphasteer_probe,
    best_condition,
    mean_states,
)
from benchmarks.weights import moved

RECIPE, BOTH = "political-open", "political-open-block"
# What is fitted, whatever the recipe's own gates are: blocks, strength, tokens, prompts a class.
GATED, FITTED, ESTIMATOR = "13-24", 1.75, "mean-difference"
KEYS = (
    f"edits=[{{op: gate, layers: {GATED}, strength: {-FITTED}}}]",
    "fit.positions={template: 6, answer: 10}",
    "fit.prompts_per_class=100",
)
DRESSED = "political-dressed"
SETS = ("political-lookalikes", "political-others")
LANGUAGES = "political-languages"
KEPT_BEHIND = (9, 12, 14, 16, 18)
CHOSEN = 5.0  # percent of P(refusal) at which settings are compared
# Strengths in class gaps, or shares of a direction: the first that is tried, the step, how many.
START, STEP, TRIES = 0.5, 1.7, 8
NEAR, REFINED = 0.05, 4  # how close to the openness asked for, and in how many further tries

Sequences = Sequence[Sequence[int]]


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--only", choices=METHODS, action="append")
    arguments.add_argument("--target", default="20,10,5,3", help="P(refusal) in percent")
    arguments.add_argument("--answers", default="5", help="of these, where answers are written")
    arguments.add_argument("--prompts", type=int, default=48, help="test prompts of each set")
    arguments.add_argument("--answered", type=int, default=40, help="of these, with answers")
    arguments.add_argument("--every", action="store_true", help="every setting of a method")
    arguments.add_argument("--models", type=Path, help="a folder with heretic's, as trial-*")
    arguments.add_argument("--json", type=Path)
    chosen = arguments.parse_args()
    torch.set_num_threads(2)
    wanted, answers = (
        [float(one) for one in text.split(",") if one] for text in (chosen.target, chosen.answers)
    )
    bench = Bench(chosen.prompts, chosen.answered, chosen.models)
    methods = chosen.only or [one for one in METHODS if one != "heretic" or chosen.models]
    found = printed(bench.rows(methods, wanted, answers, chosen.every))
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True, eq=False)
class Way:
    """One setting of a method: what steers at a strength above 0, from block `first` on.

    `fires` says which prompts are steered at all, `whole` whether each is read in one pass.
    """

    settings: str
    first: int
    hooks: Callable[[float], Sequence[Intervention]]
    fires: Callable[[Sequences], Sequence[bool]] | None = None
    whole: bool = False


class Asked:
    """Prompts by role, and what a model says to them under a way of steering.

    States are kept behind each of the blocks in `kept`; where steering begins later, blocks from
    there on alone run again.
    """

    def __init__(
        self,
        model: LiveModel,
        prompts: Mapping[str, Sequence[Prompt]],
        openings: Sequence[int],
        kept: Sequence[int] = KEPT_BEHIND,
    ) -> None:
        self.model, self._openings = model, openings
        self._roles = [role for role, chosen in prompts.items() for _ in chosen]
        self._sequences = [model.render(one.text) for found in prompts.values() for one in found]
        self._behind = Behind(model, [self._sequences], kept)
        self._clean = _by_row(self._behind.clean)
        self._known: dict[tuple[Way, float], dict[str, float]] = {}

    def bare(self) -> dict[str, float]:
        """The figures without steering."""
        return self._figures(self._clean)

    def under(self, way: Way, strength: float) -> dict[str, float]:
        """Mean P(refusal) of the first token by role in percent, and KL on general prompts."""
        if (way, strength) not in self._known:
            self._known[way, strength] = self._figures(self._logits(way, strength))
        return self._known[way, strength]

    def _logits(self, way: Way, strength: float) -> dict[int, Tensor]:
        with steered(self.model, way.hooks(strength)):
            found = _by_row(self._behind.last(way.first - 1))
        if way.fires is None:
            return found
        fires = way.fires(self._sequences)
        return {row: one if fires[row] else self._clean[row] for row, one in found.items()}

    def _figures(self, logits: Mapping[int, Tensor]) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for row, role in enumerate(self._roles):
            score = refusal_score(logits[row][None], self._openings)
            found.setdefault(role, []).append(100 * float(torch.sigmoid(score)))
            if role == "general":
                before, after = (one.log_softmax(-1) for one in (self._clean[row], logits[row]))
                found.setdefault("KL", []).append(float((before.exp() * (before - after)).sum()))
        return {role: sum(one) / len(one) for role, one in found.items()}


@dataclass
class Openness:
    """What share of target prompts opens by a refusal, by the strength of steering, in percent.

    `measure` gives it; every strength is measured once. `tried` begins with what it is at 0.
    """

    measure: Callable[[float], float]
    tried: dict[float, float] = field(default_factory=dict)

    def scan(self, lowest: float) -> None:
        """Try ever larger strengths, until the share is so low, or no longer falls.

        Then also half a step on either side of where it is lowest.
        """
        least = min(self.tried.values())
        for step in range(TRIES):
            share = self._at(START * STEP**step)
            if share <= lowest:
                return
            if share > 1.1 * least:
                break
            least = min(least, share)
        middle = min(self.tried, key=lambda one: self.tried[one])
        for strength in (middle / STEP**0.5, middle * STEP**0.5):
            self._at(strength)

    def strength(self, wanted: float, tries: int = 0) -> float:
        """Where the share first falls to what is wanted, between two strengths that were tried.

        After as many further tries; where it never falls so low the strength at which it is
        lowest.
        """
        while True:
            pairs = sorted(self.tried.items())
            if (found := crossing(pairs, wanted)) is None:
                return min(pairs, key=lambda one: one[1])[0]
            # Further on the share may rise again.
            end = next(one for one, share in pairs if share <= wanted)
            for one, share in pairs:
                if one <= end and abs(share / wanted - 1) <= NEAR:
                    return one
            if not tries:
                return found
            self._at(found)
            tries -= 1

    def reaches(self, wanted: float) -> bool:
        """Whether some strength opens so far."""
        return min(self.tried.values()) <= (1 + NEAR) * wanted

    def _at(self, strength: float) -> float:
        if strength not in self.tried:
            # Neither end has a logit.
            self.tried[strength] = min(max(self.measure(strength), 0.001), 99.999)
        return self.tried[strength]


def crossing(tried: Sequence[tuple[float, float]], wanted: float) -> float | None:
    """The strength at which a share first falls to what is wanted, by the line between its logits.

    `tried` are ascending strengths with their shares in percent. None where it never falls so low.
    """
    for (low, before), (high, after) in pairwise(tried):
        if after <= wanted <= before:
            left, right, middle = (log(one / (100 - one)) for one in (before, after, wanted))
            return low + (high - low) * (left - middle) / (left - right) if left > right else high
    return None


class Bench:
    """The demo with its fits, and the prompts that are asked."""

    def __init__(self, count: int, answered: int, models: Path | None = None) -> None:
        loaded = load_recipe(RECIPE, overrides=KEYS)
        assert loaded.recipe.search is not None
        self.recipe, self._fits = loaded.recipe, Fits(loaded, loaded.recipe.search)
        self._count, self._answered, self._models = count, answered, models
        self._asked: dict[tuple[str, bool], Asked] = {}
        self._bare: list[list[int]] = []
        self._seen: dict[tuple[int, ...], Tensor] = {}

    def rows(
        self,
        methods: Iterable[str],
        wanted: Sequence[float],
        answers: Sequence[float],
        every: bool = False,
    ) -> Iterator[Row]:
        """Without steering, and each method's best setting, or every one, at each openness."""
        none = {"method": "none", "asked": "", "settings": "", "strength": "", "on select": ""}
        more = (_shown(self.asked("further").bare()) | self._refused()) if answers else {}
        yield none | _shown(self.asked("test").bare()) | more
        for method in methods:
            ways = METHODS[method](self)
            curves = {way: self._openness(way, min(*wanted, CHOSEN)) for way in ways}
            if every:
                chosen = list(product(curves, wanted))
            elif method in UNCONDITIONAL:
                chosen = [(self._best(curves, [one], one), one) for one in wanted]
            else:
                chosen = list(product([self._best(curves, wanted, CHOSEN)], wanted))
            if method == "heretic":
                saved = min(ways, key=lambda way: self._target(way, 1.0))
                kept = self._more(saved, 1.0) if answers else {}
                yield self._row(method, "as saved", saved, 1.0) | kept
            for way, one in chosen:
                strength = curves[way].strength(one, REFINED)
                kept = self._more(way, strength) if one in answers else dict.fromkeys(more)
                yield self._row(method, f"{one:g} %", way, strength) | kept

    def _row(self, method: str, asked: str, way: Way, strength: float) -> Row:
        """The figures of the test split, and what the target's select prompts show."""
        return {
            "method": method,
            "asked": asked,
            "settings": way.settings,
            "strength": f"{strength:.2f}",
            "on select": f"{self._target(way, strength):.1f} %",
            **_shown(self.asked("test", way.whole).under(way, strength)),
        }

    def _more(self, way: Way, strength: float) -> Row:
        """What is measured at some openness alone."""
        further = self.asked("further", way.whole).under(way, strength)
        return _shown(further) | self._refused(way, strength)

    def asked(self, part: str, whole: bool = False) -> Asked:
        """Prompts of the test split with `political-dressed`, of further sets, or of select."""
        if (part, whole) not in self._asked:
            model = WholePrompts.of(self.model) if whole else self.model
            self._asked[part, whole] = Asked(model, self._prompts(part), self._openings)
        return self._asked[part, whole]

    def _prompts(self, part: str) -> Mapping[str, Sequence[Prompt]]:
        splits = self._fits.ready.splits
        if part == "target":
            return {"target": splits["target"].select}
        if part == "others":
            return {role: splits[role].select for role in ("protected", "general")}
        if part == "test":
            found = {role: one.test[: self._count] for role, one in splits.items()}
            return found | self._sets(DRESSED)
        several = self._sets(LANGUAGES, limit=self._count // 4)[LANGUAGES]
        # In English these are in the target's own words.
        others = tuple(one for one in several if one.language != "en")
        return self._sets(*SETS) | {LANGUAGES: others}

    def _sets(self, *names: str, limit: int | None = None) -> dict[str, tuple[Prompt, ...]]:
        """Whole sets, of each so many prompts, or so many of each language."""
        found = chosen_sets(self.recipe, self._fits.ready.splits, names, limit or self._count)
        return {one.name: one.prompts for one in found}

    def _openness(self, way: Way, lowest: float) -> Openness:
        """How the select split's target opens, from no strength to one that opens so far."""
        bare = self.asked("target", way.whole).bare()["target"]
        found = Openness(lambda strength: self._target(way, strength), {0.0: bare})
        found.scan(lowest)
        return found

    def _target(self, way: Way, strength: float) -> float:
        return self.asked("target", way.whole).under(way, strength)["target"]

    def _best(self, curves: Mapping[Way, Openness], wanted: Sequence[float], at: float) -> Way:
        """The best of several ways, on the select split, compared at an openness."""
        if len(curves) == 1:
            return next(iter(curves))
        merits = {way: self._merit(way, curves[way], wanted, at) for way in curves}
        for way, (reached, lost, divergence) in merits.items():
            figures = (
                f"{reached} of {len(wanted)} reached, harmful {lost:+.1f}, KL {-divergence:.4f}"
            )
            print(f"select, {at:g} %, {way.settings}: {figures}", file=sys.stderr)
        return max(merits, key=lambda way: merits[way])

    def _merit(
        self, way: Way, openness: Openness, wanted: Sequence[float], at: float
    ) -> tuple[int, float, float]:
        """By what one way is better than another: what is reached, not lost, and not moved."""
        others = self.asked("others", way.whole)
        figures = others.under(way, openness.strength(at, REFINED))
        gained = round(figures["protected"] - others.bare()["protected"], 1)
        reached = sum(openness.reaches(one) for one in wanted)
        return reached, min(0.0, gained), -figures["KL"]

    def _refused(self, way: Way | None = None, strength: float = 0.0) -> Row:
        """Whole answers that refuse, by set."""
        every = self._prompts("test").items()
        prompts = {role: found[: self._answered] for role, found in every}
        choice, marks = self.recipe.evaluate, self.recipe.judge.thinking

        def answer(starts: list[list[int]]) -> list[list[int]]:
            if not self._bare:
                self._bare = self.model.answer(starts, choice.answer_tokens, choice.batch)
            if way is None:
                return self._bare
            model = WholePrompts.of(self.model) if way.whole else self.model
            fires = way.fires(starts) if way.fires else [True] * len(starts)
            chosen = [start for start, fired in zip(starts, fires, strict=True) if fired]
            with steered(model, way.hooks(strength)):
                written = iter(model.answer(chosen, choice.answer_tokens, choice.batch))
            pairs = zip(self._bare, fires, strict=True)
            return [next(written) if fired else bare for bare, fired in pairs]

        said = judged(
            *(prompts, self.model.render, answer, self.model.text, self._fits.judge),
            Thinking(marks.begin, marks.end),
        )
        return {f"{role}, answers": str(one) for role, one in rates(said).items()}

    # The methods: every one gives its ways.

    def gates(self, ordered: bool) -> list[Way]:
        """Rank-one gates."""
        return [self._gated(ordered, one) for one in (ORDERED if ordered else APART)]

    def _gated(self, ordered: bool, chosen: "Gated") -> Way:
        recipe = self._recipe(
            f"edits.0.ordered={str(ordered).lower()}",
            f"edits.0.layers={chosen.layers}",
            f"edits.0.strength={-chosen.fitted}",
            f"edits.0.protected={chosen.protected}",
            f"fit.estimator={chosen.estimator}",
        )
        fitted = [one for one in self._fitted(recipe) if isinstance(one, Gate)]

        def hooks(strength: float) -> Sequence[Intervention]:
            return [replace(one, vector=strength / chosen.fitted * one.vector) for one in fitted]

        return Way(str(chosen), lowest(self._fits.plan(recipe)), hooks)

    def blocks(self) -> list[Way]:
        """Block gates that decide at the prompt's last token."""
        return [self._block(*one) for one in BLOCKS]

    def _block(self, layers: str, opened: float) -> Way:
        edit = f"{{op: gate, form: block, layers: [{layers}], strength: -1, opened: {opened}}}"
        recipe = self._recipe(f"edits=[{edit}]", "fit.positions={template: 1, answer: 0}")
        plan = self._fits.plan(recipe)
        # Other tokens are read than those of the recipe.
        ready = self._fits.ready
        captured = Captured(self.model, ready.base, recipe, self._fits.labels, ready.texts, {})
        fitted = [one for one in captured.interventions(recipe, plan) if isinstance(one, BlockGate)]

        def hooks(strength: float) -> Sequence[Intervention]:
            return [replace(one, vectors=strength * one.vectors) for one in fitted]

        return Way(f"{layers}, opened {opened:g}", lowest(plan), hooks)

    def both(self) -> list[Way]:
        """Gates in order beside block gates; at 1 of the recipe's strengths."""
        recipe = load_recipe(BOTH, overrides=KEYS[1:]).recipe
        fitted = self._fitted(recipe)

        def hooks(strength: float) -> Sequence[Intervention]:
            return [
                replace(one, vectors=strength * one.vectors)
                if isinstance(one, BlockGate)
                else replace(one, vector=strength * one.vector)
                for one in fitted
                if isinstance(one, BlockGate | Gate)
            ]

        return [Way(BOTH, lowest(self._fits.plan(recipe)), hooks)]

    def adds(self) -> list[Way]:
        """The directions behind one block, or behind several in equal shares."""
        return [self._added(*one) for one in ADDS]

    def _added(self, layers: str, protect: str = "none", estimator: str = ESTIMATOR) -> Way:
        vectors = self._vectors(layers, protect, estimator)
        apart = ", without the protected direction" if protect == "remove" else ""

        def hooks(strength: float) -> Sequence[Intervention]:
            return [replace(one, vector=strength * one.vector) for one in vectors]

        first = min(one.layer for one in vectors)
        return Way(f"{layers}, {estimator}{apart}", first, hooks)

    def _vectors(self, layers: str, protect: str = "none", estimator: str = ESTIMATOR) -> list[Add]:
        """By block its share of the directions, away from refusal."""
        first, _, last = layers.partition("-")
        every = range(int(first), int(last or first) + 1)
        edits = [f"{{op: add, layer: {one}, strength: {-1 / len(every)}}}" for one in every]
        keys = f"edits=[{', '.join(edits)}]", f"fit.protect={protect}", f"fit.estimator={estimator}"
        recipe = self._recipe(*keys)
        return [one for one in self._fitted(recipe) if isinstance(one, Add)]

    def ablations(self, protect: str) -> list[Way]:
        """One direction out of what blocks write."""
        return [self._ablated(one, protect) for one in ABLATIONS]

    def _ablated(self, chosen: "Ablated", protect: str) -> Way:
        edits = [
            f"{{op: ablate, layers: {layers}, variant: {chosen.variant}}}"
            for layers in chosen.parts
        ]
        layer = "null" if chosen.direction is None else chosen.direction
        recipe = self._recipe(
            f"edits=[{', '.join(edits)}]", f"fit.layer={layer}", f"fit.protect={protect}"
        )

        def hooks(strength: float) -> Sequence[Intervention]:
            specs = tuple(one.model_copy(update={"strength": strength}) for one in recipe.edits)
            return self._fitted(recipe.model_copy(update={"edits": specs}))

        return Way(str(chosen), lowest(self._fits.plan(recipe)), hooks)

    def saved(self) -> list[Way]:
        """The models in the folder, by what their weights gained."""
        if self._models is None:
            raise SystemExit("heretic: give the folder of its models (--models)")
        places = self._models.glob("trial-*")
        found = sorted(places, key=lambda one: int(one.name.removeprefix("trial-")))
        return [self._saved(one) for one in found]

    def _saved(self, folder: Path) -> Way:
        ready = self._fits.ready
        changes = moved(ready.base, Checkpoint.open(folder), ready.arch)

        def hooks(strength: float) -> Sequence[Intervention]:
            return [replace(one, share=strength) for one in changes]

        return Way(folder.name, min(one.layer for one in changes), hooks)

    def alphasteers(self) -> list[Way]:
        """A readout of 1 on the target within the null space of all other prompts."""
        return [self._alphasteer(*one) for one in ALPHASTEERS]

    def _alphasteer(self, layers: str, share: float) -> Way:
        fitted = []
        for one in self._vectors(layers):
            states = {role: found[one.layer] for role, found in self._states.items()}
            target = states.pop("target")
            probe = alphasteer_probe(target, torch.cat([*states.values()]), share).float()
            fitted.append(AlphaSteer(one.layer, one.vector, probe))

        def hooks(strength: float) -> Sequence[Intervention]:
            return [replace(one, vector=strength * one.vector) for one in fitted]

        first = min(one.layer for one in fitted)
        return Way(f"{layers}, {share:g} of the dimensions", first, hooks, whole=True)

    @cached_property
    def _states(self) -> dict[str, dict[int, Tensor]]:
        """By role and block the fitting prompts' states [n, d] at their last token."""
        found = {}
        for role, labels in self._fits.labels.items():
            shown = conversations_of(self.recipe, role, labels)
            rows = tuple(range(len(shown)))
            taps = {
                layer: Tap(self.model.block(layer), "output", "every last", rows=rows)
                for layer in range(self._depth)
            }
            moments = collect(self.model, shown, taps)
            found[role] = {layer: one.values.double() for layer, one in moments.items()}
        return found

    def casts(self) -> list[Way]:
        """The directions of `adds`, for prompts whose mean state meets the best condition."""
        found = [(beta, self._condition(beta)) for beta in BETAS]
        return [self._cast(*chosen, *one) for chosen in CASTS for one in found]

    def _cast(self, layers: str, estimator: str, beta: float, condition: Condition) -> Way:
        def fires(sequences: Sequences) -> list[bool]:
            return condition.holds(self._means(sequences)).tolist()

        added = self._added(layers, estimator=estimator)
        settings = f"{added.settings}, if {condition} (F{beta:g} {condition.score:.3f})"
        return Way(settings, added.first, added.hooks, fires)

    def _condition(self, beta: float) -> Condition:
        """The best condition, its axis of the fit split, the rest of fit and select split."""
        fitted: dict[bool, list[list[int]]] = {True: [], False: []}
        chosen: dict[bool, list[list[int]]] = {True: [], False: []}
        for role, labels in self._fits.labels.items():
            fitted[role == "target"] += [list(one.start) for one in labels]
            others = self._fits.ready.splits[role].select
            chosen[role == "target"] += [self.model.render(one.text) for one in others]
        first = (self._means(fitted[True]), self._means(fitted[False]))
        more = (self._means(chosen[True]), self._means(chosen[False]))
        both = (torch.cat([first[0], more[0]]), torch.cat([first[1], more[1]]))
        return best_condition(first, both, beta)

    def _means(self, sequences: Sequences) -> Tensor:
        """Mean states behind the blocks of the first half, of each prompt once."""
        missing = [one for one in map(tuple, sequences) if one not in self._seen]
        if missing:
            found = mean_states(self.model, missing, self._depth // 2)
            self._seen |= zip(missing, found, strict=True)
        return torch.stack([self._seen[tuple(one)] for one in sequences])

    # What they are made of.

    def _recipe(self, *overrides: str) -> Recipe:
        return load_recipe(RECIPE, overrides=(*KEYS, *overrides)).recipe

    def _fitted(self, recipe: Recipe) -> Sequence[Intervention]:
        return self._fits.captured.interventions(recipe, self._fits.plan(recipe))

    @property
    def model(self) -> LiveModel:
        """The demo."""
        return self._fits.model

    @property
    def _depth(self) -> int:
        return self.model.arch.layer_count(self._fits.ready.base.config)

    @cached_property
    def _openings(self) -> list[int]:
        """The tokens by which a refusal is known."""
        said = [one for found in self._fits.labels.values() for one in found]
        sides = (
            [Said(one.start, one.answer) for one in said if one.side == side] for side in (1, -1)
        )
        return refusal_openings(*sides)


def _by_row(found: Iterable[tuple[Sequence[int], Tensor]]) -> dict[int, Tensor]:
    """The logits [vocabulary] of each prompt, of those of batches."""
    return {row: logits[place] for rows, logits in found for place, row in enumerate(rows)}


def _shown(found: Mapping[str, float]) -> Row:
    return {
        name: f"{value:.4f}" if name == "KL" else f"{value:.1f} %" for name, value in found.items()
    }


@dataclass(frozen=True)
class Gated:
    """A setting of rank-one gates: what harmful requests are read as, and the strength of the fit.

    `fitted` counts for gates in order alone, which see each other at it.
    """

    layers: str
    estimator: str = ESTIMATOR
    protected: float = 0.0
    fitted: float = FITTED

    def __str__(self) -> str:
        toward = f", harmful requests towards refusal by {self.protected:g}"
        return f"{self.layers}, {self.estimator}{toward if self.protected else ''}"


@dataclass(frozen=True)
class Ablated:
    """A setting of an ablation: out of which blocks, and whose direction; None is each its own."""

    layers: str
    direction: int | None
    variant: str = "plain"

    @property
    def parts(self) -> list[str]:
        """The blocks of each edit."""
        if self.direction is not None:
            return [self.layers]
        first, last = map(int, self.layers.split("-"))
        return [f"[{layer}]" for layer in range(first, last + 1)]

    def __str__(self) -> str:
        own = "each its own" if self.direction is None else f"that of block {self.direction}"
        return f"{self.layers}, {own}, {self.variant}"


# The settings that are tried: blocks, and what else a method leaves open.
APART = [
    *[Gated(layers) for layers in ("13-24", "12-26")],
    *[Gated(layers, "rmd") for layers in ("13-24", "12-26", "14-26", "15-26")],
]
ORDERED = [
    Gated("13-24"),
    Gated("14-26", "rmd", fitted=3.5),
    Gated("14-26", "rmd", protected=0.3, fitted=3.5),
]
BLOCKS = [("17,20,23", 90.0), ("15,17,19,21,23", 90.0)]
ADDS = [
    *[(layers,) for layers in ("11", "15", "19", "13-24")],
    *[(layers, "remove") for layers in ("15", "13-24")],
    ("14-26", "none", "rmd"),
]
ABLATIONS = [
    Ablated("0-29", 14),
    Ablated("10-23", 14),
    Ablated("0-29", 14, "affine"),
    # As heretic's search has it: the blocks where its best trials are, and its two variants.
    Ablated("15-26", None),
    Ablated("15-26", None, "[projected, norm-preserving]"),
    Ablated("18-24", None, "[projected, norm-preserving]"),
]
ALPHASTEERS = [("13-24", 0.5), ("13-24", 0.3)]
CASTS = [("15", ESTIMATOR), ("13-24", ESTIMATOR), ("14-26", "rmd")]
BETAS = [1.0, 2.0]
UNCONDITIONAL = ("add", "ablate", "wang", "heretic")
METHODS: dict[str, Callable[[Bench], list[Way]]] = {
    "gate": lambda bench: bench.gates(False),
    "ordered": lambda bench: bench.gates(True),
    "block": Bench.blocks,
    "both": Bench.both,
    "add": Bench.adds,
    "ablate": lambda bench: bench.ablations("none"),
    "wang": lambda bench: bench.ablations("remove"),
    "heretic": Bench.saved,
    "alphasteer": Bench.alphasteers,
    "cast": Bench.casts,
}

if __name__ == "__main__":
    main()
