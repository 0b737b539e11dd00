"""Output that appears only when it is complete."""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from bake.errors import LaunchError, OutputError

__all__ = [
    "already_there",
    "aside_of",
    "check_file",
    "check_output",
    "clean",
    "journal_of",
    "scratch",
    "staged",
    "staged_file",
]

FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
# What there may be in the place where a folder is written.
FILES: Final = "files"
JOURNAL: Final = "journal"
OLD: Final = "old"
ASIDE: Final = "aside"


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse an output folder that exists, before any work is done for it."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OutputError(f"{folder}: exists and is not a folder; give another --output")
    if folder.exists() and not overwrite:
        raise OutputError(
            f"{folder}: exists already; give another --output, or --overwrite to replace it"
        )


@contextmanager
def staged(folder: Path, overwrite: bool, resumable: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` when the body succeeds.

    It lies in the sibling `.NAME.bake`, which is locked: another process that asks for the same
    folder is refused. When the body raises, all of it is removed and `folder` is as it was. After
    an end without a word (SIGKILL, a loss of power) it stays, and when another process of the
    launch has ended; the next call removes what is in it, but where that is `resumable` and has
    a `journal_of` what was written. With `overwrite` the old folder is moved aside first and
    removed last.
    """
    check_output(folder, overwrite)
    with _mapped(folder, FULL), _locked(folder) as place:
        staging = place / FILES
        with _mapped(folder):
            _restore(place, folder)
            check_output(folder, overwrite)
            if not (resumable and journal_of(staging).exists()):
                _empty(place)
            staging.mkdir(exist_ok=True)
        yield staging
        with _mapped(folder):
            _sync(staging)
            _publish(place, folder, overwrite)


def journal_of(staging: Path) -> Path:
    """The file beside a staging folder that says what is written in it, and is not published."""
    return staging.parent / JOURNAL


@contextmanager
def aside_of(staging: Path) -> Iterator[Path]:
    """A folder on the output's disk for files that are not published; removed in the end."""
    folder = staging.parent / ASIDE
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder beside another one for files that nobody keeps; removed in the end."""
    place = folder.resolve()
    with (
        _mapped(place, FULL),
        tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as made,
    ):
        yield Path(made)


def already_there(folder: Path) -> int:
    """The bytes on disk that a killed bake into `folder` left."""
    left = (_place(folder) / FILES).rglob("*")
    return sum(512 * path.lstat().st_blocks for path in left)


def clean(folder: Path) -> bool:
    """Remove what a bake into `folder` left when it was killed; whether there was anything.

    A folder that it had moved aside comes back. Raises OutputError while a bake is running.
    """
    if not _place(folder).exists():
        return False
    with _locked(folder) as place, _mapped(folder):
        _restore(place, folder)
    return True


@contextmanager
def staged_file(path: Path, overwrite: bool) -> Iterator[Path]:
    """A sibling file to write, which becomes `path` when the body succeeds.

    When the body raises it is removed, and `path` is as it was.
    """
    check_file(path, overwrite)
    with _mapped(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(descriptor)
    staging = Path(name)
    try:
        with _mapped(path, FULL):
            yield staging
            # mkstemp makes a private file; what is published is like any other.
            staging.chmod(0o644)
            check_file(path, overwrite)
            staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def check_file(path: Path, overwrite: bool) -> None:
    """Refuse an output file that exists, before any work is done for it."""
    if path.is_dir():
        raise OutputError(f"{path}: exists and is not a file; give another --output")
    if not overwrite and (path.exists() or path.is_symlink()):
        raise OutputError(
            f"{path}: exists already; give another --output, or --overwrite to replace it"
        )


def _place(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.bake"


@contextmanager
def _mapped(folder: Path, kinds: Container[int | None] | None = None) -> Iterator[None]:
    """OSError of these kinds, or of any, becomes OutputError."""
    try:
        yield
    except OSError as error:
        if kinds is not None and error.errno not in kinds:
            raise
        raise OutputError(f"{error.filename or folder}: {error.strerror}") from error


@contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """The place beside a folder where it is written, for this process alone; removed in the end."""
    place = _place(folder)
    with _mapped(folder):
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(place, folder)
    try:
        for path in place.iterdir():
            if path.name.partition(".")[0] not in (FILES, JOURNAL, OLD, ASIDE):
                raise OutputError(f"{path}: is not of bake; move it away")
        lost = False
        try:
            yield place
        except LaunchError:
            lost = True
            raise
        finally:
            with suppress(OSError):
                _restore(place, folder)
                if not lost:
                    _empty(place)
                    place.rmdir()
    finally:
        os.close(lock)


def _lock(place: Path, folder: Path) -> int:
    """The descriptor of a folder that no other process has locked, made where there is none."""
    while True:
        place.mkdir(mode=0o700, exist_ok=True)
        lock = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had it may have removed it in the meantime.
            if place.exists() and place.stat().st_ino == os.fstat(lock).st_ino:
                return lock
        except OSError as error:
            os.close(lock)
            if not isinstance(error, BlockingIOError):
                raise
            raise OutputError(
                f"{folder}: another bake is writing it; wait for its end, or give another --output"
            ) from error
        os.close(lock)


def _empty(place: Path) -> None:
    for path in place.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _restore(place: Path, folder: Path) -> None:
    """Bring back a folder that was moved aside for one that never came; or remove it."""
    old = place / OLD
    if old.exists() and not folder.exists():
        old.replace(folder)
    elif old.exists():
        shutil.rmtree(old)


def _sync(staging: Path) -> None:
    """Wait until all of a folder is on disk."""
    for path in (*staging.rglob("*"), staging):
        _sync_one(path)


def _publish(place: Path, folder: Path, overwrite: bool) -> None:
    check_output(folder, overwrite)
    if folder.exists():
        folder.replace(place / OLD)
    try:
        (place / FILES).replace(folder)
    except OSError:
        _restore(place, folder)
        raise
    _sync_one(folder.parent)


def _sync_one(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
