"""Every estimator of a direction at the same cost: what it opens, and what it loses.

    python -m benchmarks.estimators [--kl 0.05] [--only ESTIMATOR] [--steps 100] [--json FILE]

The demo, on hooks. Each estimator's direction of refusal behind block 15 (political questions
refused, general ones answered) is added there, and taken out of what blocks 10 to 23 write; of
`som` and `cone` the first of four is added, and the span of all taken out. The strength is that
at which the first answer token to general prompts of the `select` split moves by the same
KL(base‖steered), to 2 %; a row that does not reach it at the largest strength says what it
reaches. Refusals are of the `test` split, by the keyword judge, on topics that neither the fit
nor the strength has seen.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from bake.directions import Directions
from bake.errors import FitError
from bake.evaluate import judged, rates
from bake.fit.estimate import roles_shown
from bake.fit.run import fit_directions
from bake.hooks import Intervention, steered
from bake.journal import Journal
from bake.judge.choice import find_judge
from bake.judge.thinking import Thinking
from bake.model import LiveModel, batches
from bake.ops import OPERATORS, Measured
from bake.plan import direction_layers
from bake.prepare import Prepared, prepare
from bake.recipe import Gate, load_recipe
from bake.recipe.values import Estimator
from bake.verify import divergence
from bake.work import Work
from benchmarks.carriers import Row, printed

LAYER = 15
# What is done, and the largest strength that is tried, towards answers.
EDITS = {
    "add": (f"{{op: add, layer: {LAYER}, strength: -1, carrier: bias}}", -8.0),
    "ablate": ("{op: ablate, layers: 10-23}", 2.0),
}
TRIES, NEAR = 12, 0.02


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--kl", type=float, default=0.05)
    arguments.add_argument("--prompts", type=int, default=48, help="test prompts of each role")
    arguments.add_argument("--only", choices=get_args(Estimator), action="append")
    arguments.add_argument("--steps", type=int, default=100, help="of those that learn")
    arguments.add_argument("--json", type=Path)
    chosen = arguments.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(chosen.prompts, chosen.steps, Journal(Path(folder)))
        found = printed(bench.rows(chosen.kl, chosen.only or get_args(Estimator)))
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


class Bench:
    """The demo with its estimates, and what is asked of it under each operator."""

    def __init__(self, prompts: int, steps: int, journal: Journal) -> None:
        self.ready = {op: _prepared(op) for op in EDITS}
        self.steps = steps
        ready = self.ready["ablate"]
        self.recipe = ready.recipe
        # All estimators see the same answers, so these are asked for once.
        model = LiveModel.load(ready.base.folder, ready.arch)
        self.model = replace(model, work=Work(journal=journal))
        self.judge = find_judge(self.recipe.judge)
        self.test = ready.part("test", prompts)
        self.general = [self.model.render(one.text) for one in ready.splits["general"].select]
        self.plain = self._first_tokens(())

    def rows(self, kl: float, estimators: Iterable[str]) -> Iterator[Row]:
        """Without steering, and by estimator and operator at the strength that costs `kl`."""
        nothing = {"estimator": "none", "op": "", "strength": "0", "KL": "0"}
        yield nothing | self._refused(())
        for estimator in estimators:
            try:
                found = self._fitted(estimator)
            except FitError as error:
                yield {"estimator": estimator, "op": "", "strength": str(error)}
                continue
            for op, one in (("add", found.first()), ("ablate", found)):
                strength, cost = self._strength(op, one, kl)
                said = {"strength": f"{strength:.2f}", "KL": f"{cost:.3f}"}
                refused = self._refused(self._steering(op, one, strength))
                yield {"estimator": estimator, "op": op} | said | refused

    def _fitted(self, estimator: str) -> Directions:
        """The directions behind one block."""
        ready = _prepared("ablate", f"fit.estimator={estimator}", f"fit.steps={self.steps}")
        everyone = ready.part("fit", ready.recipe.fit.prompts_per_class)
        prompts = {role: everyone[role] for role in roles_shown(ready.recipe.fit)}
        found, _ = fit_directions(
            self.model, ready.base, ready.recipe, (LAYER,), prompts, self.judge, {}
        )
        return found

    def _steering(self, op: str, found: Directions, strength: float) -> tuple[Intervention, ...]:
        ready = self.ready[op]
        spec = ready.recipe.edits[0].model_copy(update={"strength": strength})
        vectors = dict.fromkeys(direction_layers(ready.recipe), found.vectors[LAYER])
        measured = Measured(vectors, _no_probe, ready.base, {}, _no_probe)
        return OPERATORS[op].build(spec, ready.plan.steps[0], measured, ready.arch)

    def _strength(self, op: str, found: Directions, kl: float) -> tuple[float, float]:
        """The strength that costs `kl`, or the largest one, and what it costs."""

        def cost(strength: float) -> float:
            moved = self._first_tokens(self._steering(op, found, strength))
            return float(divergence(self.plain, moved).mean())

        return nearest(cost, EDITS[op][1], kl)

    def _first_tokens(self, steering: Sequence[Intervention]) -> Tensor:
        """Logits [prompts, vocabulary] of the first answer token to general prompts."""
        padding = self.model.tokenizer.pad_token_id
        with steered(self.model, steering), torch.inference_mode():
            prefix = self.model.prefix(self.general, min(map(len, self.general)) - 1)
            shown = batches(self.general, padding, 16, prefix)
            return torch.cat([self.model.last_logits(batch, 1)[:, -1] for batch in shown])

    def _refused(self, steering: Sequence[Intervention]) -> Row:
        """Refusals on the test split by role, with their counts."""
        thinking = Thinking(self.recipe.judge.thinking.begin, self.recipe.judge.thinking.end)
        tokens = self.recipe.evaluate.answer_tokens
        with steered(self.model, steering):
            answers = judged(
                self.test,
                self.model.render,
                lambda starts: self.model.answer(starts, tokens, self.recipe.evaluate.batch),
                self.model.text,
                self.judge,
                thinking,
            )
        return {role: str(rate) for role, rate in rates(answers).items()}


def nearest(cost: Callable[[float], float], largest: float, wanted: float) -> tuple[float, float]:
    """A strength that costs as much as wanted, to 2 %, and its cost.

    A divergence is quadratic in what is small, which is the next guess within the bracket.
    """
    low, high, guess = 0.0, 1.0, 0.125
    for _ in range(TRIES):
        found = cost(guess * largest)
        if abs(found / wanted - 1) <= NEAR or (guess == 1 and found < wanted):
            break
        low, high = (guess, high) if found < wanted else (low, guess)
        guess *= (wanted / max(found, 1e-9)) ** 0.5
        if not low < guess < high:
            guess = high if guess >= high == 1 else (low + high) / 2
    return guess * largest, found


def _prepared(op: str, *overrides: str) -> Prepared:
    chosen = (f"edits=[{EDITS[op][0]}]", "fit.bootstrap=0", *overrides)
    return prepare(load_recipe("political-open", overrides=chosen).recipe)


def _no_probe(module: str, spec: Gate) -> Tensor:
    raise AssertionError("add and ablate read no probe")


if __name__ == "__main__":
    main()
