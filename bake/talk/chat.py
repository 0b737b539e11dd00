"""A conversation with one model, and the answers of two to the same prompts."""

from collections.abc import Callable, Iterable, Sequence

from bake.errors import PromptError
from bake.talk.columns import beside, printable, side_by_side, wrapped
from bake.talk.speaker import Speaker, Turn

__all__ = ["NEW", "chat", "compare"]

NEW = "/new"


def chat(
    speaker: Speaker,
    said: Iterable[str],
    write: Callable[[str], None],
    tokens: int,
    system: str | None = None,
) -> None:
    """Answer line after line, each with all that was said before; `/new` forgets it.

    A turn that is too long for the context is said to be so, and not kept.
    """
    begin: list[Turn] = [("system", system)] if system else []
    turns = list(begin)
    for line in said:
        if not line.strip():
            continue
        if line.strip() == NEW:
            turns = list(begin)
            continue
        asked: list[Turn] = [*turns, ("user", line)]
        answer = ""
        try:
            for piece in speaker.reply(asked, tokens):
                answer += piece
                write(printable(piece))
        except PromptError as error:
            write(f"{error}; {NEW} begins anew\n")
            continue
        write("\n")
        turns = [*asked, ("assistant", answer)]


def compare(
    speakers: tuple[Speaker, Speaker],
    names: tuple[str, str],
    prompts: Sequence[str],
    write: Callable[[str], None],
    tokens: int,
    columns: int,
    system: str | None = None,
) -> None:
    """The answers of two models to every prompt, side by side in a terminal of `columns`."""
    width = max((columns - 3) // 2, 16)
    begin: list[Turn] = [("system", system)] if system else []
    heads = [wrapped(printable(name), width) for name in names]
    for number, prompt in enumerate(prompts):
        left, right = (one.reply([*begin, ("user", prompt)], tokens) for one in speakers)
        write("\n" * bool(number) + f"{printable(prompt)}\n\n")
        for line in beside(heads, width):
            write(f"{line}\n")
        write("─" * width + "─┼─" + "─" * width + "\n")
        for line in side_by_side(left, right, width):
            write(f"{line}\n")
