"""`answers.jsonl`: what was said before and after, and how it was judged."""

import json
from pathlib import Path

from bake.errors import ManifestError
from bake.evidence.reading import Read, parsed

__all__ = ["ANSWERS", "Answer", "read_answers"]

ANSWERS = "answers.jsonl"
PROTECTED = "protected"


class Answer(Read):
    """A line of the file; of protected prompts there are verdicts alone."""

    runtime: str
    set: str
    topic: str
    prompt: str
    refused_before: bool | None
    refused_after: bool | None
    category_before: str = ""
    category_after: str = ""
    before: str | None = None
    after: str | None = None


def read_answers(path: Path) -> tuple[Answer, ...]:
    """The answers of a bake; what was said to protected prompts is not kept, if a line has it.

    Raises ManifestError where the file cannot be read or is none of bake's.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        found = [json.loads(line) for line in lines if line]
    except OSError as error:
        raise ManifestError(
            f"{path}: cannot be read: {error.strerror}; give the folder of a bake"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: not JSON in every line; bake the recipe again") from error
    answers = [parsed(Answer, one, path, failure=ManifestError) for one in found]
    hidden = {"before": None, "after": None}
    return tuple(one.model_copy(update=hidden) if one.set == PROTECTED else one for one in answers)
