"""Every estimator of a direction at the same cost: what it opens, and what it loses.

    python -m benchmarks.estimators [--op add|ablate] [--kl 0.05] [--json FILE]

The demo, on hooks. Each estimator's direction of refusal behind block 15 (political questions
refused, general ones answered) is added there, or taken out of what blocks 10 to 23 write; of
`som` and `cone` one direction is added, and the span of four taken out. The strength is that at
which the first answer token to general prompts of the `select` split moves by the same
KL(base‖steered), found by bisection; a row that does not reach it at the largest strength says
so. Refusals are of the `test` split, by the keyword judge, on topics that neither the fit nor
the strength has seen.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
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
from bake.pipeline import Prepared, prepare
from bake.plan import direction_layers
from bake.recipe import Gate, load_recipe
from bake.recipe_values import Estimator
from bake.verify import divergence
from bake.work import Work
from benchmarks.carriers import Row, printed

# What is done, with how many directions, and the largest strength that is tried, towards answers.
EDITS = {
    "add": ("{op: add, layer: 15, strength: -1, carrier: bias}", 1, -8.0),
    "ablate": ("{op: ablate, layers: 10-23}", 4, 2.0),
}
HALVINGS = 12  # of the interval of strengths
LAYER = 15


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--op", choices=EDITS, default="add")
    arguments.add_argument("--kl", type=float, default=0.05)
    arguments.add_argument("--prompts", type=int, default=48, help="test prompts of each role")
    arguments.add_argument("--json", type=Path)
    chosen = arguments.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(chosen.op, chosen.prompts, Journal(Path(folder)))
        found = printed(bench.rows(chosen.kl))
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


class Bench:
    """The demo with one operator, and what is asked of it."""

    def __init__(self, op: str, prompts: int, journal: Journal) -> None:
        self.op, (_, _, self.largest) = op, EDITS[op]
        self.ready = self._prepared("mean-difference")
        self.recipe = self.ready.recipe
        # All estimators see the same answers, so these are asked for once.
        model = LiveModel.load(self.ready.base.folder, self.ready.arch)
        self.model = replace(model, work=Work(journal=journal))
        self.judge = find_judge(self.recipe.judge)
        self.test = self.ready.part("test", prompts)
        general = [self.model.render(one.text) for one in self.ready.splits["general"].select]
        self.general = list(batches(general, self.model.tokenizer.pad_token_id, 16))
        self.plain = self._first_tokens(())

    def rows(self, kl: float) -> Iterator[Row]:
        """Without steering, and by estimator at the strength that costs `kl`."""
        yield {"estimator": "none", "strength": "0", "KL": "0", **self._refused(())}
        for estimator in get_args(Estimator):
            ready = self._prepared(estimator)
            everyone = ready.part("fit", ready.recipe.fit.prompts_per_class)
            prompts = {role: everyone[role] for role in roles_shown(ready.recipe.fit)}
            try:
                fitted, _ = fit_directions(
                    self.model, ready.base, ready.recipe, (LAYER,), prompts, self.judge, {}
                )
            except FitError as error:
                yield {"estimator": estimator, "strength": str(error)}
                continue
            layers = direction_layers(ready.recipe)
            directions = Directions(dict.fromkeys(layers, fitted.vectors[LAYER]))
            strength, cost = self._strength(directions, kl)
            yield {
                "estimator": estimator,
                "strength": f"{strength:.2f}",
                "KL": f"{cost:.3f}",
                **self._refused(self._steering(directions, strength)),
            }

    def _prepared(self, estimator: str) -> Prepared:
        edit, basis, _ = EDITS[self.op]
        chosen = [f"edits=[{edit}]", f"fit.estimator={estimator}", f"fit.basis={basis}"]
        chosen.append("fit.bootstrap=0")
        return prepare(load_recipe("political-open", overrides=chosen).recipe)

    def _steering(self, directions: Directions, strength: float) -> tuple[Intervention, ...]:
        spec = self.recipe.edits[0].model_copy(update={"strength": strength})
        vectors = directions.at(direction_layers(self.recipe)).vectors
        measured = Measured(vectors, _no_probe, self.ready.base, {})
        return OPERATORS[self.op].build(spec, self.ready.plan.steps[0], measured, self.ready.arch)

    def _strength(self, directions: Directions, kl: float) -> tuple[float, float]:
        """The strength that costs `kl`, or the largest one, and what it costs."""
        low, high = 0.0, 1.0
        cost = self._cost(directions, self.largest)
        if cost <= kl:
            return self.largest, cost
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            if self._cost(directions, middle * self.largest) <= kl:
                low = middle
            else:
                high = middle
        return low * self.largest, self._cost(directions, low * self.largest)

    def _cost(self, directions: Directions, strength: float) -> float:
        """Mean KL(base‖steered) of the first answer token to general prompts."""
        moved = self._first_tokens(self._steering(directions, strength))
        return float(divergence(self.plain, moved).mean())

    def _first_tokens(self, steering: Sequence[Intervention]) -> Tensor:
        """Logits [prompts, vocabulary] of the first answer token."""
        with steered(self.model, steering):
            return torch.cat([self.model.logits(batch)[:, -1] for batch in self.general])

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


def _no_probe(module: str, spec: Gate) -> Tensor:
    raise AssertionError("add and ablate read no probe")


if __name__ == "__main__":
    main()
