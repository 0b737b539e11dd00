"""Progress on stderr: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

__all__ = ["note", "progress"]


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show work of `total` units; the function given takes the units done since the last call."""
    if sys.stderr.isatty():
        with click.progressbar(length=total, label=label, file=sys.stderr) as bar:
            yield bar.update
        return
    started = time.monotonic()
    click.echo(f"{label} ...", err=True)
    yield lambda _: None
    click.echo(f"{label}: done in {time.monotonic() - started:.0f} s", err=True)


def note(text: str) -> None:
    """A line on stderr, for what is worth knowing while work goes on."""
    click.echo(text, err=True)
