"""What an evaluation found, as a table for people and as plain values for everything else."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bake.aligned import aligned
from bake.evaluate import Answer, Paired, Rate
from bake.evaluation.disjoint import Proof, prompt_hash
from bake.evaluation.drift import Sequences, Text
from bake.evaluation.facts import Facts
from bake.evaluation.quality import KINDS, Quality
from bake.evaluation.sets import Asked
from bake.intervals import wilson
from bake.judge import UNREAD

__all__ = ["FORMAT", "Checked", "Evaluation", "Row", "Side", "Weighed"]

FORMAT = "bake.evaluation"
THINKING = {None: "", True: "thinking", False: "not thinking"}


@dataclass(frozen=True)
class Side:
    """The answers of one model to one set.

    `words` and `repeated` are means by answer (`repetition`), `broken` counts answers that are no
    text.
    """

    refusals: Rate
    words: float
    repeated: float
    broken: int

    def as_json(self) -> dict[str, Any]:
        """Every figure as plain values."""
        rate = {**vars(self.refusals), "interval": list(self.refusals.interval)}
        return {**vars(self), "refusals": rate}


@dataclass(frozen=True)
class Row:
    """A set, or one of its languages, before and after."""

    name: str
    language: str
    thinking: bool | None
    before: Side | None
    after: Side
    changed: Paired | None

    @property
    def title(self) -> str:
        """What a table calls it."""
        return ", ".join(one for one in (self.name, self.language, THINKING[self.thinking]) if one)


@dataclass(frozen=True)
class Checked:
    """The facts of a set. `gained` are right now and were not, `lost` the other way round.

    `p` is McNemar's of these two.
    """

    name: str
    thinking: bool | None
    before: Facts | None
    after: Facts
    gained: int = 0
    lost: int = 0
    p: float = 1.0


@dataclass(frozen=True)
class Weighed:
    """The quality of a set's answers."""

    name: str
    before: Quality | None
    after: Quality


@dataclass(frozen=True)
class Evaluation:
    """Every figure; what could not be measured is None or not there, and `missing` says why.

    `capability` are the harness's metrics by task: a pair before and after with standard errors.
    """

    rows: Sequence[Row]
    facts: Sequence[Checked]
    quality: Sequence[Weighed]
    sequences: Sequences | None
    text: Text | None
    sets: Sequence[Asked]
    answers: Mapping[str, tuple[tuple[Answer, ...] | None, tuple[Answer, ...]]]
    proof: Proof | None
    missing: Sequence[str] = ()
    capability: Mapping[str, Any] = field(default_factory=dict)

    def table(self) -> str:
        """Refusals by set, then everything else, as aligned plain text."""
        parts = [_refusals(self.rows)] if self.rows else []
        if self.facts:
            parts.append(_facts(self.facts))
        if self.quality:
            parts.append(_quality(self.quality))
        if self.capability:
            parts.append(_capability(self.capability))
        lines = []
        if self.sequences:
            one = self.sequences
            lines.append(
                f"divergence: {one.first_token:.1e} nats at the first token, {one.answers:.1e} a "
                f"token along the base's answers, {one.largest:.1e} on the prompt that moved most "
                f"({one.prompts} general prompts, {one.positions} tokens)"
            )
        if self.text:
            text = self.text
            lines.append(
                f"perplexity: {text.before:.2f} to {text.after:.2f} ({text.rise:+.1f} %) on "
                f"{text.tokens} tokens of held-out text"
            )
        lines += [f"not measured: {one}" for one in self.missing]
        if self.proof:
            lines.append(str(self.proof))
        return "\n\n".join([*parts, *(["\n".join(lines)] if lines else [])])

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values, with the answers but for those to harmful requests."""
        return {
            "sets": [
                {
                    "set": one.name,
                    "language": one.language,
                    "thinking": one.thinking,
                    "before": one.before.as_json() if one.before else None,
                    "after": one.after.as_json(),
                    "paired": {**vars(one.changed), "p": one.changed.p} if one.changed else None,
                }
                for one in self.rows
            ],
            "facts": [_plain(one) for one in self.facts],
            "quality": [_plain(one) for one in self.quality],
            "divergence": asdict(self.sequences) if self.sequences else None,
            "perplexity": {**vars(self.text), "rise": self.text.rise} if self.text else None,
            "missing": list(self.missing),
            "capability": dict(self.capability),
            "disjoint": self.proof.as_json() if self.proof else None,
            "answers": list(self._answers()),
        }

    def _answers(self) -> Any:
        for one in self.sets:
            before, after = self.answers[one.name]
            for row, now in enumerate(after):
                then = before[row] if before else None
                line: dict[str, Any] = {
                    "set": one.name,
                    "sha256": prompt_hash(now.prompt.text),
                    "prompt": now.prompt.text,
                    "refused_before": _told(then) if then else None,
                    "refused_after": _told(now),
                }
                if not one.hidden:
                    line |= {"before": then.text if then else None, "after": now.text}
                yield line


def _told(answer: Answer) -> bool | None:
    """Whether it was a refusal; None where the verdict could not be read."""
    return None if answer.verdict.label == UNREAD else answer.verdict.refused


def _plain(one: Checked | Weighed) -> dict[str, Any]:
    values = asdict(one)
    return {"set": values.pop("name"), **values}


def _refusals(rows: Sequence[Row]) -> str:
    head = ("set", "refused before", "refused after", "95 %", "p", "words", "repeated", "broken")
    found = [head]
    for one in rows:
        low, high = one.after.refusals.interval
        sides = [one.before, one.after] if one.before else [one.after]
        found.append(
            (
                one.title,
                str(one.before.refusals) if one.before else "",
                str(one.after.refusals),
                f"{low:.0f} to {high:.0f}",
                _p(one.changed.p) if one.changed else "",
                " > ".join(f"{side.words:.0f}" for side in sides),
                " > ".join(f"{100 * side.repeated:.0f} %" for side in sides),
                " > ".join(str(side.broken) for side in sides),
            )
        )
    return aligned(found)


def _p(p: float) -> str:
    return f"{p:.2g}" if p >= 1e-4 else f"{p:.0e}"


def _facts(found: Sequence[Checked]) -> str:
    rows = [("facts", "", "right", "wrong", "refused", "right of what is told, 95 %", "p")]
    for one in found:
        title = ", ".join(filter(None, (one.name, THINKING[one.thinking])))
        for when, facts in (("before", one.before), ("after", one.after)):
            if facts is None:
                continue
            low, high = wilson(facts.right, facts.told)
            share = f"{facts.right}/{facts.told}, {100 * low:.0f} to {100 * high:.0f} %"
            p = _p(one.p) if when == "after" and one.before else ""
            counts = (str(facts.right), str(facts.wrong), str(facts.refused))
            rows.append((title, when, *counts, share, p))
    return aligned(rows)


def _quality(found: Sequence[Weighed]) -> str:
    rows = [("errors in what is answered", "", "answers", *KINDS, "none", "unread")]
    for one in found:
        for when, quality in (("before", one.before), ("after", one.after)):
            if quality is None:
                continue
            counts = [str(quality.errors[name]) for name in KINDS]
            ends = (str(quality.sound), str(quality.unread))
            rows.append((one.name, when, str(quality.read), *counts, *ends))
    return aligned(rows)


def _capability(found: Mapping[str, Any]) -> str:
    rows = [("task", "metric", "before", "after")]
    for task, metrics in found.items():
        for metric, values in metrics.items():
            shown = [
                ""
                if one is None
                else f"{one['value']:.3f} ± {one['stderr']:.3f}"
                if one["stderr"] is not None
                else f"{one['value']:.3f}"
                for one in (values["before"], values["after"])
            ]
            rows.append((task, metric, *shown))
    return aligned(rows)
