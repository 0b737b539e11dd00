"""How the batches of a pass are done: dealt to the processes of a launch, and remembered.

Every process of `accelerate launch` loads the model and takes each n-th batch of those that
one process would run, so the batches and their padding are the same for any number of them.
What they find is put together by torch.distributed, through accelerate.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Protocol, TypeVar

from torch import Tensor

from bake.errors import FitError
from bake.journal import Journal

__all__ = ["Work"]

# The others wait while one asks a judge; a process that ends is noticed at once all the same.
PATIENCE = timedelta(days=2)
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
    """This process's place among all that share the batches, counted from 0, and the journal."""

    rank: int = 0
    size: int = 1
    journal: Journal | None = None

    @classmethod
    def launched(cls) -> "Work":
        """Among the processes of `accelerate launch`; alone where there are no others."""
        from accelerate import PartialState

        # Models run on the processor, whatever else the machine has.
        state = PartialState(cpu=True, timeout=PATIENCE)
        return cls(state.process_index, state.num_processes)

    @property
    def main(self) -> bool:
        """Whether this is the process that asks, prints and writes."""
        return self.rank == 0

    def results(
        self,
        batches: Iterable[B],
        compute: Callable[[B], Mapping[str, Tensor]],
        of: Callable[[B], object] | None = None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> Iterator[tuple[B, Mapping[str, Tensor]]]:
        """The batches that are this process's, with what `compute` makes of each.

        What is finished comes from the journal, where there is one; `of` gives the plain values
        that a result depends on beside the batch itself, and without it nothing is remembered.
        `progress` receives the rows done, here and elsewhere.
        """
        for number, batch in enumerate(batches):
            if number % self.size == self.rank:
                if self.journal and of:
                    key = [of(batch), batch.rows, batch.content]
                    yield batch, self.journal.result(key, partial(compute, batch))
                else:
                    yield batch, compute(batch)
            progress(len(batch.rows))

    def merged(self, found: Mapping[int, T]) -> list[T]:
        """What all processes have found by row, in the order of the rows."""
        if self.size > 1:
            from accelerate.utils import gather_object

            with _together():
                parts: list[Mapping[int, T]] = gather_object([found])
            found = {row: one for part in parts for row, one in part.items()}
        return [found[row] for row in sorted(found)]

    def summed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums of all processes' tensors, bit for bit the same in each of them.

        One that had nothing to add may have a tensor of no dimensions for any other.
        """
        if self.size == 1:
            return list(tensors)
        from accelerate.utils import gather_object, reduce

        with _together():
            shapes = gather_object([[tuple(one.shape) for one in tensors]])
            largest = [max(found, key=len) for found in zip(*shapes, strict=True)]
            whole = [
                one.expand(shape).contiguous() for one, shape in zip(tensors, largest, strict=True)
            ]
            found: list[Tensor] = reduce(whole, "sum")
        return found

    def by_main(self, compute: Callable[[], T]) -> T:
        """What the main process computes, for all of them."""
        if self.size == 1:
            return compute()
        from accelerate.utils import broadcast_object_list

        found = [compute() if self.main else None]
        with _together():
            broadcast_object_list(found)
        result: T = found[0]  # type: ignore[assignment]
        return result

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The others go through the body when the main process has: it downloads for all."""
        if not self.main:
            self.by_main(lambda: None)
        yield
        if self.main:
            self.by_main(lambda: None)


@contextmanager
def _together() -> Iterator[None]:
    """What all processes do at once; raises FitError where one of them is gone."""
    try:
        yield
    except RuntimeError as error:
        raise FitError(
            "another process of this launch has ended; its own message says why"
        ) from error
