"""How work is shared by the processes of a launch, and remembered.

Every process of `accelerate launch` loads the model and takes each n-th batch of those that
one process would run, so the batches and their padding are the same for any number of them. What
a batch gives is handed to all processes, which take it in in the order of the batches: sums are
those of one process to the bit. torch.distributed carries it, through accelerate.
"""

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import islice
from typing import Final, Protocol, TypeVar

from torch import Tensor

from bake.errors import InputError, LaunchError
from bake.journal import Journal

__all__ = ["ALONE", "Work"]

# Minutes. The others wait while one asks a judge or converts; a process that ends is noticed at
# once, and it takes so long for a machine that is gone without a word.
PATIENCE: Final = 120
T = TypeVar("T")


class Dealt(Protocol):
    """A batch: the numbers of its rows, and plain values that say all of what is in it."""

    @property
    def rows(self) -> tuple[int, ...]: ...

    @property
    def content(self) -> object: ...


B = TypeVar("B", bound=Dealt)


@dataclass(frozen=True)
class Work:
    """This process's place among all that share the work, counted from 0, and the journal."""

    rank: int = 0
    size: int = 1
    journal: Journal | None = None

    @classmethod
    def launched(cls) -> "Work":
        """Among the processes of `accelerate launch`; alone where there are no others.

        Raises LaunchError where they do not find one another.
        """
        from accelerate import PartialState

        with _together():
            # What is exchanged is in memory, wherever models run.
            state = PartialState(cpu=True, timeout=_patience())
        if state.num_processes > 1:
            # Left to the interpreter's last sweep, gloo's threads now and then abort the process.
            atexit.register(state.destroy_process_group)
        return cls(state.process_index, state.num_processes)

    @property
    def main(self) -> bool:
        """Whether this is the process that asks, prints and publishes."""
        return self.rank == 0

    def own(self, items: Iterable[T]) -> Iterator[T]:
        """Those of the items that are this process's."""
        return islice(items, self.rank, None, self.size)

    def results(
        self,
        batches: Iterable[B],
        compute: Callable[[B], Mapping[str, Tensor]],
        of: Callable[[B], object] | None = None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> Iterator[tuple[B, Mapping[str, Tensor]]]:
        """All batches in order, with what `compute` made of each in the process whose it is.

        What is finished comes from the journal, where there is one; `of` gives the plain values
        that a result depends on beside the batch itself, and without it nothing is remembered.
        `progress` receives the rows done, here and elsewhere.
        """

        def result(batch: B) -> Mapping[str, Tensor]:
            if self.journal and of:
                key = [of(batch), batch.rows, batch.content]
                return self.journal.result(key, partial(compute, batch))
            return compute(batch)

        left = iter(batches)
        while turn := list(islice(left, self.size)):
            found = self.gathered([result(batch) for batch in self.own(turn)])
            for batch, (one,) in zip(turn, found, strict=False):
                yield batch, one
                progress(len(batch.rows))

    def gathered(self, found: T) -> list[T]:
        """What each process has found, in their order."""
        if self.size == 1:
            return [found]
        from accelerate.utils import gather_object

        with _together():
            every: list[T] = gather_object([found])
        return every

    def by_main(self, compute: Callable[[], T]) -> T:
        """What the main process computes, for all of them."""
        return self.by(0, compute)

    def by(self, rank: int, compute: Callable[[], T]) -> T:
        """What one of the processes computes, for all of them."""
        if self.size == 1:
            return compute()
        from accelerate.utils import broadcast_object_list

        found = [compute() if self.rank == rank else None]
        with _together():
            broadcast_object_list(found, rank)
        result: T = found[0]  # type: ignore[assignment]
        return result

    def wait(self) -> None:
        """Until all processes have come here."""
        self.gathered(None)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The others go through the body when the main process has: it downloads for all."""
        if not self.main:
            self.by_main(lambda: None)
        yield
        if self.main:
            self.by_main(lambda: None)


ALONE: Final = Work()


def _patience() -> timedelta:
    """How long a process waits for another: BAKE_PATIENCE, in minutes."""
    given = os.environ.get("BAKE_PATIENCE") or str(PATIENCE)
    if not given.isdecimal() or not int(given):
        raise InputError(f"BAKE_PATIENCE: expected whole minutes, found {given!r}")
    return timedelta(minutes=int(given))


@contextmanager
def _together() -> Iterator[None]:
    """What all processes do at once; raises LaunchError where one of them is gone."""
    try:
        yield
    except RuntimeError as error:
        if "timed out" in str(error).lower():
            raise LaunchError(
                f"no word from another process of this launch for {_patience()}; see to its "
                "machine and launch again, which goes on; BAKE_PATIENCE has the minutes to wait"
            ) from error
        raise LaunchError(
            "another process of this launch has ended; its own message says why, and the same "
            "launch goes on"
        ) from error
