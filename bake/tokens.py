"""What several sequences of token ids have in common."""

from collections.abc import Sequence
from itertools import takewhile

__all__ = ["shared_beginning"]


def shared_beginning(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The tokens that all of them begin with; a chat template's system message, often."""
    columns = zip(*sequences, strict=False)
    alike = takewhile(lambda column: len(set(column)) == 1, columns)
    return tuple(column[0] for column in alike)
