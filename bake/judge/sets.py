"""A set of prompts with their answers, from a file or from the recipe's model, and judged."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bake.archs import find_arch
from bake.checkpoint import Checkpoint
from bake.errors import PromptError
from bake.evaluate import Answer
from bake.judge import ANSWERED, REFUSED, UNREAD, Exchange, Judge
from bake.judge.thinking import Thinking, spoken
from bake.model import LiveModel
from bake.progress import note, progress
from bake.prompts import Prompt
from bake.recipe import Recipe
from bake.source import find_source
from bake.staging import staged_file

__all__ = ["counts", "judged_set", "write_judged"]

NAMES = {REFUSED: "refused", ANSWERED: "answered", UNREAD: "unread"}


def judged_set(
    recipe: Recipe,
    prompts: Sequence[Prompt],
    judge: Judge,
    column: str = "answer",
    limit: int | None = None,
) -> tuple[tuple[Answer, ...], bool]:
    """Every prompt with its answer and verdict, and whether the recipe's model has answered.

    It answers where no prompt has a `column` of answers; otherwise prompts without one are left
    out, which is noted. Raises PromptError where an answer is not text.
    """
    told = [one for one in prompts if column in one.extra]
    for one in told:
        if not isinstance(one.extra[column], str):
            raise PromptError(f"{one.origin}: {column!r} must be text, as answers are")
    chosen = (told or prompts)[:limit]
    if told and len(told) < len(prompts):
        note(f"judge: {len(prompts) - len(told)} prompts have no {column!r} and are left out")
    said = [str(one.extra[column]) for one in chosen] if told else _answered(recipe, chosen)
    verdicts = judge.judge(
        [Exchange(prompt.text, one) for prompt, one in zip(chosen, said, strict=True)]
    )
    return tuple(Answer(*one) for one in zip(chosen, said, verdicts, strict=True)), not told


def counts(found: Sequence[Answer]) -> str:
    """How many answers there are of each verdict and of each category, as aligned plain text."""
    verdicts = Counter(one.verdict.label for one in found)
    kinds = Counter(one.verdict.category for one in found if one.verdict.category)
    rows = [(name, verdicts[label]) for label, name in NAMES.items()]
    rows += [(f"  {name}", count) for name, count in kinds.most_common()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(
        f"{name.ljust(width)}  {count:6}  {100 * count / len(found):5.1f} %" for name, count in rows
    )


def write_judged(path: Path, found: Sequence[Answer], answers: bool, overwrite: bool) -> None:
    """One line an answer, as `bake judge` reads it again; without `answers` the verdicts alone."""
    with staged_file(path, overwrite) as staging, staging.open("w", encoding="utf-8") as stream:
        for one in found:
            line = {**one.prompt.extra, "text": one.prompt.text, "topic": one.prompt.topic}
            if answers:
                line["answer"] = one.text
            line |= {"verdict": NAMES[one.verdict.label], "category": one.verdict.category}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def _answered(recipe: Recipe, prompts: Sequence[Prompt]) -> list[str]:
    """Greedy answers of the recipe's model, with the marks of its thinking."""
    bare = recipe.export.model_copy(update={"gguf": None})
    base = Checkpoint.open(find_source(recipe.model_copy(update={"export": bare})).folder)
    arch = find_arch(base.config, str(base.folder / "config.json"), base.tensors)
    model = LiveModel.load(base.folder, arch, system=recipe.system_prompt)
    starts = [model.render(one.text) for one in prompts]
    tokens, size = recipe.evaluate.answer_tokens, recipe.evaluate.batch
    thinking = Thinking(recipe.judge.thinking.begin, recipe.judge.thinking.end)
    with progress("answers", len(starts)) as update:
        ids = model.answer(starts, tokens, size, update)
    return [
        spoken(start, one, model.text, thinking) for start, one in zip(starts, ids, strict=True)
    ]
