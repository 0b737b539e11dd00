"""Progress on stderr: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import click

__all__ = ["note", "progress"]

# Whether the cursor stands behind a bar that goes on: whatever else is said takes a new line.
_behind_a_bar: ContextVar[bool] = ContextVar("behind_a_bar", default=False)


@contextmanager
def progress(label: str, total: int, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Show work of `total` units; the function given takes the units done since the last call.

    Work inside other work has a line of its own; the outer bar goes on below it. Nothing is
    said unless `shown`: of several processes one speaks.
    """
    if not shown:
        yield lambda _: None
        return
    if sys.stderr.isatty():
        _new_line()
        with click.progressbar(length=total, label=label, file=sys.stderr) as bar:
            _behind_a_bar.set(True)

            def update(count: int) -> None:
                bar.update(count)
                _behind_a_bar.set(True)

            try:
                yield update
            finally:
                _behind_a_bar.set(False)
        return
    started = time.monotonic()
    click.echo(f"{label} ...", err=True)
    yield lambda _: None
    click.echo(f"{label}: done in {time.monotonic() - started:.0f} s", err=True)


def note(text: str) -> None:
    """A line on stderr, for what is worth knowing while work goes on."""
    _new_line()
    click.echo(text, err=True)


def _new_line() -> None:
    if _behind_a_bar.get():
        click.echo(err=True)
        _behind_a_bar.set(False)
