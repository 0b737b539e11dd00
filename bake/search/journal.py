"""The journal of a search: one line of JSON for whatever is finished, on disk before the next.

A search that ends in any way loses what was running and nothing else. There are no times in
the journal, so one that went on has the bytes of one that was never interrupted.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bake.cache import cache_folder
from bake.errors import OutputError
from bake.evaluate import Rate
from bake.search.space import Point
from bake.search.trial import Figures, Trial

__all__ = ["BASE", "VERSION", "Answered", "Final", "SearchJournal", "journal_path"]

VERSION = 3  # of the lines, and of what decides how far a trial is looked at

# Refusals by role of answers that were written in full.
Answered = Mapping[str, Rate]

BASE = "base"  # The base model's name among the finals.


@dataclass(frozen=True)
class Final:
    """What is known of a point that may be chosen.

    `kl` is that of whole prompts. Where it breaks its limit, or `failed` says why there is none,
    no answers are written.
    """

    point: Point
    kl: float = 0.0
    answered: Answered = field(default_factory=dict)
    failed: str = ""


def journal_path(run: str) -> Path:
    """The journal of a search, by a hash of what decides it, in the cache folder."""
    return cache_folder() / "search" / f"{run}.jsonl"


class SearchJournal:
    """What is finished of a search: base figures, trials, and finals.

    `finals` are by name: `base`, the number of a trial, and `96.2` for the second refinement of
    trial 96.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.base: Figures | None = None
        self.trials: list[Trial] = []
        self.finals: dict[str, Final] = {}
        self.prompts: Mapping[str, Mapping[str, str]] = {}
        self._size = 0
        self._load()

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator["SearchJournal"]:
        """The journal, for this process alone. Raises OutputError where another has it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        try:
            with lock.acquire(blocking=False):
                yield cls(path)
        except Timeout:
            raise OutputError(
                f"{path}: another search of this recipe is running; let it end"
            ) from None

    def begin(self, prompts: Mapping[str, Mapping[str, str]], base: Figures) -> None:
        """The first line: fingerprints of the prompts by role and split, and the base figures."""
        figures = {"refusals": dict(base.refusals), "kl": base.kl}
        begin = {"format": "bake.search", "version": VERSION}
        self._write({**begin, "prompts": prompts, "base": figures})

    def add(self, trial: Trial) -> None:
        """A finished trial."""
        self._write({"trial": trial.as_json()})

    def end(self, name: str, found: Final) -> None:
        """What is known of a final."""
        self._write({"final": name, **asdict(found)})

    def _write(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            with self.path.open("ab") as stream:
                # What a kill left behind the last whole line is overwritten.
                stream.truncate(self._size)
                stream.write(text.encode())
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise OutputError(f"{self.path}: {error.strerror}") from error
        self._size += len(text.encode())
        self._take(json.loads(text))

    def _load(self) -> None:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be read: {error.strerror}") from error
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                return
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise OutputError(
                    f"{self.path}:{number}: not a line of a search; remove the file to begin anew"
                ) from error
            self._size += len(line)

    def _take(self, line: dict[str, Any]) -> None:
        if "trial" in line:
            self.trials.append(Trial.from_json(line["trial"]))
        elif "final" in line:
            name = line.pop("final")
            rates = {role: Rate(**rate) for role, rate in line.pop("answered").items()}
            self.finals[name] = Final(answered=rates, **line)
        else:
            self.prompts, self.base = line["prompts"], Figures(**line["base"])
