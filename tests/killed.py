"""Bakes that are killed at every call that changes the disk, or find it full, and begun again.

    python -m tests.killed FOLDER [KILLS] [full]

Each is a fork of this process, which computes nothing itself, so that the fork is clean. A write
is half done when its process is killed, or when the disk is full. Printed is JSON: how many calls
there were, and what was wrong.
"""

import errno
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bake import blocks, copying
from bake.checkpoint import Checkpoint
from bake.edits import AddVector, CreatedTensor, LowRank, RemoveKeepingNorms, RemoveSubspace
from bake.errors import OutputError
from bake.staging import journal_of, staged
from bake.stream import write_checkpoint
from bake.verify import check_files

# Whatever changes the disk; the first two take what they write.
CALLS = (
    *("write", "pwrite", "copy_file_range", "ftruncate", "fsync"),
    *("mkdir", "rmdir", "unlink", "replace", "rename", "open"),
)


REFUSED = 7


def bases(folder: Path) -> None:
    """Two shards with an index, and an output of an earlier bake."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    places = {}
    for number in (1, 2):
        shapes = {"a": (5,), "b": (12, 8), "c": (7, 3), "d": (3, 6, 8), "e": (9, 50)}
        tensors = {
            f"{name}{number}": torch.randn(shape, generator=generator).to(torch.bfloat16)
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / f"{number}.safetensors")
        places |= dict.fromkeys(tensors, f"{number}.safetensors")
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama"}')


def bake(base: Path, output: Path, overwrite: bool) -> None:
    """What the pipeline does with the disk."""
    torch.set_num_threads(1)
    blocks.BLOCK, copying.CHUNK, copying.ALIGNED = 40, 512, 64  # type: ignore[misc]
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    created = (CreatedTensor("f", (20,), "BF16", "b2"),)
    edits: dict[str, Any] = {
        "b1": [LowRank("b1", drawn(12, 1), drawn(1, 8))],
        "b2": [RemoveSubspace("b2", torch.eye(12)[:, :2])],
        "d2": [RemoveKeepingNorms("d2", torch.eye(6)[:, :1])],
        "f": [AddVector("f", drawn(20))],
    }
    opened = Checkpoint.open(base)
    with staged(output, overwrite, resumable=True) as staging:
        arguments = (opened, edits, created, {"model_type": "other"}, staging)
        write_checkpoint(*arguments, journal=journal_of(staging))
        check_files(opened, Checkpoint.open(staging), edits, created)
        (staging / "bake.json").write_text("{}")


def killing(name: str, call: Callable[..., Any], counter: list[int], last: int, full: bool) -> Any:
    """The call, which kills its process when it is the last one of all, or finds the disk full."""

    def counted(*arguments: Any, **options: Any) -> Any:
        if name == "open" and not arguments[1] & (os.O_CREAT | os.O_TRUNC):
            return call(*arguments, **options)
        counter[0] += 1
        if counter[0] == last:
            if name in ("write", "pwrite"):
                call(arguments[0], arguments[1][: len(arguments[1]) // 2], *arguments[2:])
            elif name == "copy_file_range":
                call(*arguments[:2], arguments[2] // 2, *arguments[3:])
            if full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)

    return counted


def forked(
    base: Path, output: Path, overwrite: bool, last: int, count: Path, full: bool = False
) -> bool:
    """A bake in a process of its own, killed at a call; whether it came to its end.

    Where the disk is full, it may also refuse in a line.
    """
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        if status not in ((0, REFUSED << 8) if full else (0, signal.SIGKILL)):
            raise SystemExit(f"killed at {last}: ended with status {status}")
        return status == 0
    try:
        counter = [0]
        for name in CALLS:
            setattr(os, name, killing(name, getattr(os, name), counter, last, full))
        bake(base, output, overwrite)
        count.write_text(str(counter[0]))
        os._exit(0)
    except OutputError as error:
        os._exit(REFUSED if "\n" not in str(error) else 9)
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(9)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def main() -> None:
    """Kill at every call, or at so many drawn ones, once or twice in a row."""
    place = Path(sys.argv[1])
    base, count = place / "base", place / "count"
    bases(base)
    forked(base, place / "whole", False, 0, count)
    whole, calls, wrong = contents(place / "whole"), int(count.read_text()), []
    chosen = list(range(1, calls + 1))
    full = sys.argv[3:] == ["full"]
    if len(sys.argv) > 2:
        chosen = random.Random(0).choices(chosen, k=int(sys.argv[2]))
    resumed = 0
    for number, last in enumerate(chosen):
        folder = place / f"{number}"
        folder.mkdir()
        output, overwrite = folder / "out", number % 2 == 0
        old = {"old": b"old"} if overwrite else None
        if old:
            output.mkdir()
            (output / "old").write_bytes(old["old"])
        for again in (last, max(1, last // 3)):
            ended = forked(base, output, overwrite, again, count, full)
            there = contents(output) if output.exists() else None
            moved = folder / ".out.bake" / "old"
            if there not in (whole, old) and not (there is None and moved.exists()):
                wrong.append(f"killed at {last}: the output is neither there nor not")
            if there == whole and not ended:
                break
            if full and not ended and there != old:
                wrong.append(f"full at {last}: the output is not as it was")
        journal = folder / ".out.bake" / "journal"
        resumed += journal.exists() and len(journal.read_text().splitlines()) > 3
        if not forked(base, output, overwrite or output.exists(), 0, count):
            wrong.append(f"killed at {last}: did not go on")
        if contents(output) != whole:
            wrong.append(f"killed at {last}: other bytes")
        if [path.name for path in folder.iterdir()] != ["out"]:
            wrong.append(f"killed at {last}: something is left")
    found = {"calls": calls, "kills": len(chosen), "resumed": resumed, "wrong": wrong}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
