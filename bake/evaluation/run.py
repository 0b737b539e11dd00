"""An evaluation: everything that is asked, of a model and of its base."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, zip_longest
from typing import TypeVar

from bake.evaluate import Answer, paired, rates, with_verdicts
from bake.evaluation.answers import answered
from bake.evaluation.disjoint import Proof
from bake.evaluation.drift import (
    PASSAGE_TOKENS,
    Along,
    Sequences,
    Text,
    along,
    loss,
    perplexity,
    sequences,
)
from bake.evaluation.facts import RIGHT, counted, outcome
from bake.evaluation.quality import Quality, judged_quality
from bake.evaluation.repetition import broken, mean, repeated_share, words
from bake.evaluation.result import Checked, Evaluation, Row, Side, Weighed
from bake.evaluation.sets import Asked
from bake.evaluation.subject import Manner, Reads, Subject, Update
from bake.intervals import mcnemar
from bake.judge import Asks, Exchange, Judge
from bake.judge.cache import Replies
from bake.progress import progress
from bake.prompts import Prompt
from bake.work import ALONE, Work

__all__ = ["Asking", "evaluate"]

Answers = Mapping[str, tuple[Answer, ...]]
Item = TypeVar("Item")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Asking:
    """What is asked, how, and who judges; `manners` differ by thinking alone, if by anything.

    `texts` are passages for perplexity, `asker` judges the quality of answers where it is given,
    `replies` keeps the answers. The processes of `work` share the prompts and passages.
    """

    sets: Sequence[Asked]
    texts: Sequence[Prompt]
    manners: Sequence[Manner]
    judge: Judge
    asker: Asks | None
    replies: Replies
    proof: Proof | None = None
    work: Work = ALONE


def evaluate(base: Subject | None, model: Subject, asking: Asking) -> Evaluation:
    """Ask a model, and its base where there is one, and compare.

    Divergence and perplexity are of two subjects that can be read (`Reads`), in the first manner.
    Raises what subjects and judges raise; what was answered by then is kept.
    """
    rows: list[Row] = []
    facts: list[Checked] = []
    quality: list[Weighed] = []
    drift: tuple[Sequences | None, Text | None] = (None, None)
    missing: list[str] = []
    shown: dict[str, tuple[tuple[Answer, ...] | None, tuple[Answer, ...]]] = {}
    for number, manner in enumerate(asking.manners):
        before = _answers(base, asking, manner) if base else None
        after = _answers(model, asking, manner)
        for one in asking.sets:
            pair = before[one.name] if before else None, after[one.name]
            rows += _rows(one, manner, *pair)
            if one.facts:
                facts.append(_checked(one, manner, *pair))
            if one.opened and asking.asker and number == 0:
                quality.append(
                    asking.work.by_main(partial(_weighed, one, asking.asker, manner, *pair))
                )
            if number == 0:
                shown[one.name] = pair
        if number:
            continue
        if reason := _unreadable(base, model, asking, manner):
            missing.append(f"divergence and perplexity: {reason}")
        elif isinstance(base, Reads) and isinstance(model, Reads) and before is not None:
            drift = _drift(base, model, asking, manner, before)
            if drift[0] is None:
                missing.append("divergence: the set general is not asked")
    if not asking.asker and any(one.opened for one in asking.sets):
        missing.append("errors of answers: the judge is no language model (judge.kind)")
    return Evaluation(
        *(rows, facts, quality, *drift, asking.sets, shown, asking.proof), tuple(missing)
    )


def _unreadable(base: Subject | None, model: Subject, asking: Asking, manner: Manner) -> str | None:
    """Why the distributions of two subjects cannot be compared; None where they can."""
    if base is None:
        return "there is no base to compare with"
    if not isinstance(base, Reads) or not isinstance(model, Reads):
        return "a server gives no logits"
    text = next((one.text for one in asking.texts), "")
    if base.tokens(text) != model.tokens(text):
        return "the two do not tokenise alike"
    prompt = next((one.text for found in asking.sets for one in found.prompts), text)
    if base.render(prompt, manner) != model.render(prompt, manner):
        return "the two have other chat templates"
    return None


def _answers(subject: Subject, asking: Asking, manner: Manner) -> Answers:
    """Every set's answers with their verdicts."""
    prompts = [prompt.text for one in asking.sets for prompt in one.prompts]
    said = answered(subject, prompts, manner, asking.replies, asking.work)

    def judged() -> Answers:
        return {
            one.name: with_verdicts(
                one.prompts, [said[prompt.text] for prompt in one.prompts], asking.judge
            )
            for one in asking.sets
        }

    return asking.work.by_main(judged)


def _rows(
    one: Asked, manner: Manner, before: tuple[Answer, ...] | None, after: tuple[Answer, ...]
) -> list[Row]:
    """The set as a whole, and each of its languages where there are several."""
    found = [_row(one.name, "", manner, before, after)]
    for language in one.languages if len(one.languages) > 1 else ():
        picked = [
            None
            if answers is None
            else tuple(each for each in answers if each.prompt.language == language)
            for answers in (before, after)
        ]
        assert picked[1] is not None
        found.append(_row(one.name, language, manner, picked[0], picked[1]))
    return found


def _row(
    name: str,
    language: str,
    manner: Manner,
    before: tuple[Answer, ...] | None,
    after: tuple[Answer, ...],
) -> Row:
    changed = paired({name: before}, {name: after})[name] if before else None
    return Row(
        *(name, language, manner.thinking),
        _side(before, manner) if before else None,
        *(_side(after, manner), changed),
    )


def _side(answers: tuple[Answer, ...], manner: Manner) -> Side:
    texts = [spoken_part(one.text, manner) for one in answers]
    return Side(
        rates({"": answers})[""],
        mean([len(words(one)) for one in texts]),
        mean([repeated_share(one) for one in texts]),
        sum(broken(one) for one in texts),
    )


def spoken_part(text: str, manner: Manner) -> str:
    """The answer without its thinking; nothing where the thinking never ends."""
    return manner.marks.answer(text) or ""


def _checked(
    one: Asked, manner: Manner, before: tuple[Answer, ...] | None, after: tuple[Answer, ...]
) -> Checked:
    """Facts, of the answers without thinking."""
    now = _bare(after, manner)
    if before is None:
        return Checked(one.name, manner.thinking, None, counted(now))
    then = _bare(before, manner)
    right = [(outcome(a) == RIGHT, outcome(b) == RIGHT) for a, b in zip(then, now, strict=True)]
    gained, lost = right.count((False, True)), right.count((True, False))
    return Checked(
        *(one.name, manner.thinking, counted(then), counted(now)),
        *(gained, lost, mcnemar(gained, lost)),
    )


def _bare(answers: tuple[Answer, ...], manner: Manner) -> list[Answer]:
    return [replace(one, text=spoken_part(one.text, manner)) for one in answers]


def _weighed(
    one: Asked,
    asker: Asks,
    manner: Manner,
    before: tuple[Answer, ...] | None,
    after: tuple[Answer, ...],
) -> Weighed:
    """The quality of what was answered at all."""

    def found(answers: tuple[Answer, ...]) -> Quality:
        return judged_quality(
            asker,
            [
                Exchange(each.prompt.text, each.text)
                for each in _bare(answers, manner)
                if not each.verdict.refused
            ],
        )

    return Weighed(one.name, found(before) if before else None, found(after))


def _drift(
    base: Reads, model: Reads, asking: Asking, manner: Manner, before: Answers
) -> tuple[Sequences | None, Text | None]:
    """Divergence along the base's answers to general prompts, and perplexity of the texts."""
    general, work = before.get("general", ()), asking.work

    def moved(answer: Answer) -> Along:
        start = base.render(answer.prompt.text, manner)
        ids = [*start, *base.tokens(_continued(answer.text, manner))]
        return along(base.logits(ids), model.logits(ids), len(start))

    def losses(text: Prompt) -> tuple[tuple[float, int], ...]:
        ids = base.tokens(text.text)[:PASSAGE_TOKENS]
        return tuple(loss(subject.logits(ids), ids) for subject in (base, model))

    total = len(general) + len(asking.texts)
    with progress("divergence and perplexity", total, work.main) as update:
        walked = _shared(general, moved, work, update)
        pairs = _shared(asking.texts, losses, work, update)
    text_found = None
    if pairs:
        then, now = zip(*pairs, strict=True)
        text_found = Text(perplexity(then), perplexity(now), sum(count for _, count in then))
    return sequences(walked) if walked else None, text_found


def _shared(
    items: Sequence[Item], compute: Callable[[Item], Found], work: Work, update: Update
) -> list[Found]:
    """What was found of each item, in their order; each process takes its own."""
    own = []
    for one in work.own(items):
        own.append(compute(one))
        update(work.size)
    turns = chain.from_iterable(zip_longest(*work.gathered(own)))
    return [one for one in turns if one is not None]


def _continued(text: str, manner: Manner) -> str:
    """An answer without the mark of thinking that stands in its prompt already."""
    return text.removeprefix(manner.marks.begin)
