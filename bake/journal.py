"""Finished batches on disk, so that a run that was killed goes on where it was."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bake.cache import cache_folder
from bake.staging import staged_file

__all__ = ["Journal", "hashed"]

KEPT = 30 * 24 * 3600  # seconds that a run may lie unfinished


@dataclass(frozen=True)
class Journal:
    """A folder of results, a file each under the hash of what it is the result of.

    A file appears when it is complete; several processes may write at once.
    """

    folder: Path

    @classmethod
    def of(cls, run: str) -> "Journal":
        """The journal of a run, by a hash of all that decides its results, in the cache folder.

        Those of runs that were given up a month ago are removed.
        """
        every = cache_folder() / "fit"
        for other in every.glob("*"):
            with suppress(FileNotFoundError):
                if time.time() - other.stat().st_mtime > KEPT:
                    shutil.rmtree(other, ignore_errors=True)
        return cls(every / run)

    @property
    def finished(self) -> int:
        """The number of results."""
        return len(list(self.folder.glob("*.safetensors")))

    def result(self, of: object, compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What `compute` gives, which is asked only where the journal does not have it.

        `of` are plain values that tell one result from every other. Raises OutputError where
        the folder cannot be written.
        """
        file = self.folder / f"{hashed(of)}.safetensors"
        try:
            found: dict[str, Tensor] = load_file(file)
        except (OSError, SafetensorError):
            found = dict(compute())
            with staged_file(file, overwrite=True) as staging:
                save_file(found, staging)
        return found

    def remove(self) -> None:
        """Forget the run, which is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)


def hashed(values: object) -> str:
    """SHA-256 of plain values, as hexadecimal text."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
