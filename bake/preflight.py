"""Is there room for what will be written? Asked before any work is done for it."""

import os
import resource
import shutil
from collections.abc import Iterable
from pathlib import Path

from bake.errors import OutputError

__all__ = ["check_room"]


def check_room(folder: Path, sizes: Iterable[int], there: int = 0) -> None:
    """Refuse a folder that files of these sizes, in bytes, cannot be written beside.

    `there` are bytes that are on the disk already and will be replaced. Asked are the permissions
    of the first parent that exists, the free space of its disk, its largest file (FAT: 4 GiB) and
    the process's (`ulimit -f`). Raises OutputError, with the numbers.
    """
    sizes = tuple(sizes)
    place = next(parent for parent in folder.absolute().parents if parent.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(f"{place}: is not writable; give another --output")
    needed, free = sum(sizes), shutil.disk_usage(place).free + there
    if needed > free:
        raise OutputError(
            f"{folder}: {_in_gb(needed)} to write, and {place} has {_in_gb(free)} free; make room, "
            "or give another --output"
        )
    largest, allowed = max(sizes, default=0), resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if allowed != resource.RLIM_INFINITY and largest > allowed:
        raise OutputError(
            f"{folder}: the largest file has {_in_gb(largest)}, and this process may write "
            f"{_in_gb(allowed)}; raise `ulimit -f`"
        )
    # Linux answers 32 where files end at 4 GiB (glibc's sysdeps/unix/sysv/linux/pathconf.c).
    bits = os.pathconf(place, "PC_FILESIZEBITS")
    if 0 < bits <= 32 and largest >= 1 << bits:
        raise OutputError(
            f"{folder}: the largest file has {_in_gb(largest)}, and the file system of {place} "
            f"holds files below {_in_gb(1 << bits)}; give another --output, or a checkpoint in "
            "smaller shards"
        )


def _in_gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
