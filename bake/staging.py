"""Output that appears only when it is complete."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bake.errors import OutputError

__all__ = ["check_file", "check_output", "staged", "staged_file"]

FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse an output folder that exists, before any work is done for it."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OutputError(f"{folder}: exists and is not a folder; give another --output")
    if folder.exists() and not overwrite:
        raise OutputError(
            f"{folder}: exists already; give another --output, or --overwrite to replace it"
        )


@contextmanager
def staged(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A sibling folder to write into, which becomes `folder` when the body succeeds.

    When the body raises, the staging folder is removed and `folder` is as it was.
    With `overwrite` the old folder is moved aside first and removed last.
    """
    check_output(folder, overwrite)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise OutputError(f"{error.filename or folder}: {error.strerror}") from error
    try:
        yield staging
        # mkdtemp makes a private folder; what is published is like any other.
        staging.chmod(0o755)
        _publish(staging, folder, overwrite)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OutputError(f"{error.filename or staging}: {error.strerror}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def staged_file(path: Path, overwrite: bool) -> Iterator[Path]:
    """A sibling file to write, which becomes `path` when the body succeeds.

    When the body raises it is removed, and `path` is as it was.
    """
    check_file(path, overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(descriptor)
    except OSError as error:
        raise OutputError(f"{error.filename or path}: {error.strerror}") from error
    staging = Path(name)
    try:
        yield staging
        # mkstemp makes a private file; what is published is like any other.
        staging.chmod(0o644)
        check_file(path, overwrite)
        staging.replace(path)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OutputError(f"{error.filename or path}: {error.strerror}") from error
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


def _publish(staging: Path, folder: Path, overwrite: bool) -> None:
    try:
        check_output(folder, overwrite)
        if folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as aside:
                old = folder.replace(Path(aside) / "old")
                try:
                    staging.replace(folder)
                except OSError:
                    old.replace(folder)
                    raise
        else:
            staging.replace(folder)
    except OSError as error:
        raise OutputError(f"{error.filename or folder}: {error.strerror}") from error
