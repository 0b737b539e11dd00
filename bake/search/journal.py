"""The journal of a search: one line of JSON for whatever is finished, on disk before the next.

A search that ends in any way loses what was running and nothing else. There are no times in
the journal, so one that went on has the bytes of one that was never interrupted.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bake.cache import cache_folder
from bake.errors import OutputError
from bake.evaluate import Rate
from bake.search.trial import Figures, Trial

__all__ = ["VERSION", "Answered", "SearchJournal", "journal_path"]

VERSION = 2  # of the lines, and of what decides how far a trial is looked at

# Refusals by role of answers that were written in full.
Answered = Mapping[str, Rate]


def journal_path(run: str) -> Path:
    """The journal of a search, by a hash of what decides it, in the cache folder."""
    return cache_folder() / "search" / f"{run}.jsonl"


class SearchJournal:
    """What is finished of a search: base figures, trials, and answers in full.

    `answered` is by the number of the trial, and None for the base model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.base: Figures | None = None
        self.trials: list[Trial] = []
        self.answered: dict[int | None, Answered] = {}
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

    def answer(self, number: int | None, found: Answered) -> None:
        """What a trial, or the base model, answered in full."""
        rates = {role: vars(rate) for role, rate in found.items()}
        self._write({"answered": number, "refusals": rates})

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

    def _take(self, line: Mapping[str, Any]) -> None:
        if "trial" in line:
            self.trials.append(Trial.from_json(line["trial"]))
        elif "answered" in line:
            rates = {role: Rate(**rate) for role, rate in line["refusals"].items()}
            self.answered[line["answered"]] = rates
        else:
            self.prompts, self.base = line["prompts"], Figures(**line["base"])
