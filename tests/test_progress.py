"""Progress on a terminal: work inside other work, and notes, never share a line."""

import io
import re

import pytest

from bake.progress import note, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    return shown


def lines(terminal: Terminal) -> list[str]:
    """What stands on each line in the end, without control sequences."""
    plain = re.sub(r"\x1b\[[?0-9]*[a-zA-Z]", "", terminal.getvalue())
    return [line.rpartition("\r")[2].rstrip() for line in plain.removesuffix("\n").split("\n")]


def test_a_bar_inside_a_bar_has_its_own_line(terminal: Terminal) -> None:
    with progress("fit", 4) as outer:
        outer(1)
        with progress("judge", 2) as inner:
            inner(1)
            inner(1)
        note("judge: 2 verdicts")
        outer(1)
        note("something")
        outer(2)
    words = [re.sub(r"\[.*\]", "", line).split() for line in lines(terminal)]
    assert [line[0] for line in words] == ["fit", "judge", "judge:", "fit", "something", "fit"]
    shares = [line[1] for line in words if line[0] in ("fit", "judge")]
    assert shares == ["25%", "100%", "50%", "100%"]


def test_a_note_after_a_bar_takes_no_empty_line(terminal: Terminal) -> None:
    with progress("fit", 1) as update:
        update(1)
    note("done")
    assert [line.split()[0] for line in lines(terminal)] == ["fit", "done"]


def test_a_failure_inside_ends_both_bars(terminal: Terminal) -> None:
    with pytest.raises(ValueError, match="no"), progress("fit", 2), progress("judge", 2):
        raise ValueError("no")
    note("bake: no")
    assert lines(terminal)[-1] == "bake: no"
