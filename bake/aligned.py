"""Rows of text as columns."""

from collections.abc import Sequence

__all__ = ["aligned"]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """The rows, all of the same length, with their cells padded to columns.

    >>> print(aligned([("set", "refused"), ("target", "3")]))
    set     refused
    target  3
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
