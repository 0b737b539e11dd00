"""Progress on a terminal: work inside other work, and notes, never share a line."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import pytest

from bake.progress import note, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextmanager
def terminal() -> Iterator[Terminal]:
    """A terminal on stderr; not a fixture, since pytest takes stderr back before the test."""
    shown = Terminal()
    with redirect_stderr(shown):
        yield shown


def test_who_is_not_to_speak_is_silent() -> None:
    with terminal() as shown, progress("fit", 2, shown=False) as update:
        update(2)
    assert shown.getvalue() == ""


def lines(terminal: Terminal) -> list[str]:
    """What stands on each line in the end, without control sequences."""
    plain = re.sub(r"\x1b\[[?0-9]*[a-zA-Z]", "", terminal.getvalue())
    return [line.rpartition("\r")[2].rstrip() for line in plain.removesuffix("\n").split("\n")]


def test_a_bar_inside_a_bar_has_its_own_line() -> None:
    with terminal() as shown, progress("fit", 4) as outer:
        outer(1)
        with progress("judge", 2) as inner:
            inner(1)
            inner(1)
        note("judge: 2 verdicts")
        outer(1)
        note("something")
        outer(2)
    words = [re.sub(r"\[.*\]", "", line).split() for line in lines(shown)]
    assert [line[0] for line in words] == ["fit", "judge", "judge:", "fit", "something", "fit"]
    shares = [line[1] for line in words if line[0] in ("fit", "judge")]
    assert shares == ["25%", "100%", "50%", "100%"]


def test_a_note_after_a_bar_takes_no_empty_line() -> None:
    with terminal() as shown:
        with progress("fit", 1) as update:
            update(1)
        note("done")
    assert [line.split()[0] for line in lines(shown)] == ["fit", "done"]


def test_a_failure_inside_ends_both_bars() -> None:
    with terminal() as shown:
        with pytest.raises(ValueError, match="no"), progress("fit", 2), progress("judge", 2):
            raise ValueError("no")
        note("bake: no")
    assert lines(shown)[-1] == "bake: no"
