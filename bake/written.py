"""What of a checkpoint is written already, so that a bake that was killed goes on where it was."""

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType

__all__ = ["Written", "left"]

BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass
class Written:
    """A file with a line for each part that is written: its name, and a CRC-32 of its bytes.

    The first line has a hash of all that decides the bytes, `run`, and the boot of the machine:
    what a process wrote before it was killed is still there, but not after a loss of power, and
    then a part counts whose bytes are as its line has them. One without a CRC does not. `parts` are
    those that an earlier run wrote; each process that writes has a file of its own.
    """

    path: Path
    run: str
    parts: Mapping[str, int | None]

    def __enter__(self) -> "Written":
        self._lock = Lock()
        # Anew, since the last line may be half written.
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._append({"run": self.run, "boot": _boot()})
        for part, crc in self.parts.items():
            self._append({"part": part, "crc": crc})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def add(self, part: str, crc: int | None = None) -> None:
        """A part is written."""
        self._append({"part": part, "crc": crc})

    def _append(self, line: Mapping[str, object]) -> None:
        with self._lock:
            os.write(self._file, json.dumps(line).encode() + b"\n")


def left(path: Path, run: str, there: Callable[[str], bool]) -> dict[str, int | None] | None:
    """The parts that the processes of a run wrote before it was killed; None after another run.

    Of a file that is not `there` nothing is: a part's name begins with its file's. The journals
    of the processes beside the main one are removed.
    """
    parts: dict[str, int | None] = {}
    boot, resumed = _boot(), False
    for file in (path, *sorted(path.parent.glob(f"{path.name}.*"))):
        begin, *lines = _lines(file) or [{}]
        if begin.get("run") == run:
            resumed |= file == path
            same = boot is not None and begin.get("boot") == boot
            for line in lines:
                match line:
                    case {"part": str(part), "crc": int() | None as crc} if same or crc is not None:
                        parts[part] = crc
        if file != path:
            file.unlink()
    if not resumed:
        return None
    return {part: crc for part, crc in parts.items() if there(part.rpartition(":")[0])}


def _lines(path: Path) -> list[dict[str, object]]:
    """The whole lines of the file; none where it is missing or no journal."""
    found = []
    with suppress(OSError, ValueError):
        for line in path.read_text(encoding="utf-8").splitlines():
            value = json.loads(line)
            if not isinstance(value, dict):
                break
            found.append(value)
    return found


def _boot() -> str | None:
    try:
        return BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return None
