"""What a card says of a file of `bake eval`: its section, and results for the front matter."""

from collections.abc import Iterator
from itertools import chain
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult

from bake.card.words import JUDGES, table, with_interval
from bake.evaluation.facts import Facts
from bake.evidence import Evaluation
from bake.evidence.evaluation import Asked, Checked, Metric, Weighed

__all__ = ["evaluation_results", "evaluation_section"]

THINKING = {None: "", True: ", thinking", False: ", not thinking"}


def evaluation_results(found: Evaluation) -> Iterator[EvalResult]:
    """Refusals by set in percent, facts that are right in percent, and the harness's metrics."""
    runtime = found.model.runtime
    for one in found.sets:
        if not one.language and not one.thinking:
            before, after = one.before, one.after.refusals
            yield _result(
                *(_named(one.set), f"bake-{_named(one.set)}", "refusal-rate"),
                f"Refused in {runtime}, answers of {found.answer_tokens} tokens, %",
                round(after.percent, 2),
                refused=after.refused,
                total=after.total,
                before=round(before.refusals.percent, 2) if before else None,
            )
    for fact in found.facts:
        if not fact.thinking:
            yield _result(
                *(_named(fact.set), f"bake-{_named(fact.set)}", "accuracy"),
                f"Right in {runtime}, %",
                _right(fact.after),
                before=_right(fact.before) if fact.before else None,
            )
    for task, metrics in found.capability.items():
        for name, metric in metrics.items():
            yield _result(
                *(task, f"lm-eval-{task}", name),
                *(f"{name}, lm-eval", metric.after.value),
                stderr=metric.after.stderr,
                before=metric.before.value if metric.before else None,
            )


def _result(
    title: str, dataset: str, kind: str, name: str, value: float, **more: Any
) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        task_name=f"Evaluation, {title}",
        dataset_type=dataset,
        dataset_name=title,
        metric_type=kind,
        metric_name=name,
        metric_value=value,
        metric_args={key: one for key, one in more.items() if one is not None},
    )


def _named(name: str) -> str:
    """A set without the folders of whoever evaluated."""
    return PurePath(name).name


def _right(facts: Facts) -> float:
    every = facts.right + facts.wrong + facts.refused
    return round(100 * facts.right / every, 2) if every else 0.0


def evaluation_section(found: Evaluation) -> Iterator[str]:
    """What `bake eval` measured, as paragraphs and tables."""
    beside = ", beside its base" if found.base else ""
    yield "## Evaluated"
    yield (
        f"By `bake eval` in {found.model.runtime}{beside}: greedy answers of at most "
        f"{found.answer_tokens} tokens to prompts that neither the fit nor the search saw. "
        + JUDGES[found.judge.kind].format(found.judge.model)
    )
    yield table([("set", "refused before", "refused after"), *map(_refusals, found.sets)])
    if found.facts:
        yield table([("facts with known answers", "before", "after"), *map(_facts, found.facts)])
    if found.quality:
        head = ("answers with an error of", "", *found.quality[0].after.errors, "none")
        yield table([head, *chain.from_iterable(map(_errors, found.quality))])
    if found.capability:
        metrics = [
            (f"{task}, {name}", _metric(one.before), _metric(one.after))
            for task, named in found.capability.items()
            for name, one in named.items()
        ]
        yield table([("lm-eval", "before", "after"), *metrics])
    if found.divergence:
        yield (
            f"KL(base ‖ baked): {found.divergence.first_token:.1e} nats at the first token of "
            f"answers to {found.divergence.prompts} general prompts, "
            f"{found.divergence.answers:.1e} a token along the base's own answers."
        )
    if text := found.perplexity:
        yield (
            f"Perplexity of {text.tokens} tokens of held-out text: {text.before:.2f} before, "
            f"{text.after:.2f} after ({text.rise:+.1f} %)."
        )


def _refusals(one: Asked) -> tuple[str, str, str]:
    title = ", ".join(part for part in (_named(one.set), one.language) if part)
    before = with_interval(one.before.refusals) if one.before else ""
    return title + THINKING[one.thinking], before, with_interval(one.after.refusals)


def _facts(one: Checked) -> tuple[str, str, str]:
    before, after = (
        f"{facts.right} right, {facts.wrong} wrong, {facts.refused} refused" if facts else ""
        for facts in (one.before, one.after)
    )
    return _named(one.set) + THINKING[one.thinking], before, after


def _errors(one: Weighed) -> Iterator[tuple[str, ...]]:
    for when, side in (("before", one.before), ("after", one.after)):
        if side:
            counts = (*side.errors.values(), side.sound)
            yield _named(one.set), when, *(f"{count} of {side.read}" for count in counts)


def _metric(one: Metric | None) -> str:
    if one is None:
        return ""
    return f"{one.value:.3f}" + (f" ± {one.stderr:.3f}" if one.stderr is not None else "")
