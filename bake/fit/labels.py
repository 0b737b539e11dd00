"""How far the base model refuses each prompt, by its own answers."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bake.judge import Exchange, Judge, Verdict
from bake.judge.confidence import bucket, refusal_confidence
from bake.judge.thinking import Thinking, answer_start, spoken
from bake.model import LiveModel
from bake.prompts import Prompt
from bake.recipe import Answers, Recipe
from bake.sampling import Sampled, sampled_answers

__all__ = ["ClassRecord", "Labelled", "labelled", "recorded"]


@dataclass(frozen=True)
class Labelled:
    """A prompt as token ids, the answer that stands for its class, and c(x) in [-1, 1]."""

    prompt: Prompt
    start: tuple[int, ...]
    answer: tuple[int, ...]
    confidence: float
    verdicts: tuple[Verdict, ...]

    @property
    def side(self) -> int:
        """1 where the model refuses, -1 where it answers, 0 where it does neither clearly."""
        return bucket(self.confidence)


@dataclass(frozen=True)
class ClassRecord:
    """How the base model behaves on a class's fitting prompts.

    `neutral` prompts are neither refused nor answered clearly enough; `unread` counts
    verdicts, which are as many as answers, and `categories` those that the judge named.
    """

    prompts: int
    refused: int
    neutral: int = 0
    unread: int = 0
    categories: dict[str, int] | None = None


def labelled(
    model: LiveModel,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    judge: Judge,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Labelled]:
    """Answer the prompts, judge every answer, and weigh the verdicts to one confidence.

    One answer is the greedy one, and its confidence 1 or -1, or 0 where the verdict could
    not be read. Several are sampled; the one that stands for its class is then the likeliest
    of those on the side of the confidence.
    """
    choice, marks = recipe.fit.answers, recipe.judge.thinking
    thinking = Thinking(marks.begin, marks.end)
    starts = [tuple(model.render(prompt.text)) for prompt in prompts]
    answers = _answers(model, choice, starts, recipe.answered, recipe.seed, progress)
    exchanges = [
        Exchange(prompt.text, spoken(start, one.ids, model.text, thinking))
        for prompt, start, several in zip(prompts, starts, answers, strict=True)
        for one in several
    ]
    # One process asks: the others' questions would be the same.
    verdicts = iter(model.work.by_main(lambda: judge.judge(exchanges)))
    found = []
    for prompt, start, several in zip(prompts, starts, answers, strict=True):
        said = tuple(next(verdicts) for _ in several)
        logs = [
            one.mean_log_probability(answer_start(one.ids, model.text, thinking)) for one in several
        ]
        confidence = refusal_confidence([one.label for one in said], logs)
        answer = several[_representative(said, logs, bucket(confidence))]
        found.append(Labelled(prompt, start, answer.ids, confidence, said))
    return found


def recorded(found: Sequence[Labelled]) -> ClassRecord:
    """The counts of a class, for the manifest."""
    verdicts = [verdict for one in found for verdict in one.verdicts]
    categories = Counter(one.category for one in verdicts if one.refused and one.category)
    return ClassRecord(
        len(found),
        sum(one.side == 1 for one in found),
        sum(one.side == 0 for one in found),
        sum(one.label == 0 for one in verdicts),
        dict(sorted(categories.items())) or None,
    )


def _answers(
    model: LiveModel,
    choice: Answers,
    starts: Sequence[Sequence[int]],
    tokens: int,
    seed: int,
    progress: Callable[[int], None],
) -> Sequence[Sequence[Sampled]]:
    if choice.samples == 1:
        greedy = model.answer(starts, tokens, progress=progress, remember=True)
        return [[Sampled(tuple(ids), ())] for ids in greedy]
    return sampled_answers(
        model,
        starts,
        samples=choice.samples,
        tokens=tokens,
        temperature=choice.temperature,
        seed=seed,
        progress=progress,
    )


def _representative(verdicts: Sequence[Verdict], logs: Sequence[float], side: int) -> int:
    """The likeliest answer on the side of the confidence, or of all where there is none."""
    agreeing = [place for place, one in enumerate(verdicts) if one.label == side]
    return max(agreeing or range(len(logs)), key=lambda place: logs[place])
