"""Output appears when it is complete, and never otherwise."""

import errno
import os
import resource
import shutil
from pathlib import Path

import pytest

from bake.checkpoint import Checkpoint
from bake.errors import OutputError
from bake.preflight import check_room
from bake.staging import already_there, clean, staged, staged_file
from bake.stream import write_checkpoint


def test_output_appears_at_the_end_only(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with staged(folder, overwrite=False) as staging:
        (staging / "file").write_text("x")
        assert not folder.exists()
    assert (folder / "file").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_everything_as_it_was(tmp_path: Path, existing: bool) -> None:
    folder = tmp_path / "out"
    if existing:
        folder.mkdir()
        (folder / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), staged(folder, overwrite=existing) as staging:
        (staging / "file").write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if existing else [])
    assert not existing or (folder / "file").read_text() == "old"


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "stale").write_text("old")
    with pytest.raises(OutputError, match="--overwrite"), staged(folder, overwrite=False):
        pass
    with staged(folder, overwrite=True) as staging:
        (staging / "file").write_text("new")
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename = tmp_path / "out", Path.replace
    folder.mkdir()
    (folder / "file").write_text("old")

    def replace(self: Path, target: Path) -> Path:
        if self.name == "files" and target == folder:
            raise PermissionError(errno.EACCES, "no", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OutputError, match="out: no"), staged(folder, overwrite=True):
        pass
    assert (folder / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_is_never_replaced(tmp_path: Path) -> None:
    file = tmp_path / "out"
    file.write_text("precious")
    with pytest.raises(OutputError, match="not a folder"), staged(file, overwrite=True):
        pass
    assert file.read_text() == "precious"


@pytest.mark.parametrize("existing", [False, True])
def test_a_single_file_appears_at_the_end_only(tmp_path: Path, existing: bool) -> None:
    file = tmp_path / "file"
    if existing:
        file.write_text("old")
    with pytest.raises(KeyboardInterrupt), staged_file(file, overwrite=existing) as staging:
        staging.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == (["file"] if existing else [])
    with staged_file(file, overwrite=existing) as staging:
        staging.write_text("new")
        assert file.exists() is existing
    assert file.read_text() == "new"
    assert file.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_single_file_replaces_nothing_unasked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    for name, words in (("file", "--overwrite"), ("link", "--overwrite"), ("folder", "not a file")):
        overwrite = name == "folder"
        with pytest.raises(OutputError, match=words), staged_file(tmp_path / name, overwrite):
            pass
    # Made by somebody else in the meantime.
    with pytest.raises(OutputError, match="--overwrite"), staged_file(tmp_path / "x", False) as one:
        one.write_text("mine")
        (tmp_path / "x").write_text("theirs")
    assert (tmp_path / "x").read_text() == "theirs"
    assert (tmp_path / "file").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link", "x"]


def test_a_full_disk_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the write fails in its middle."""
    base = Checkpoint.open(tiny_llama)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with (
            pytest.raises(OutputError, match="File too large"),
            staged(tmp_path / "out", overwrite=False) as staging,
        ):
            write_checkpoint(base, {}, (), {}, staging)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_two_bakes_into_one_folder_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with staged(folder, overwrite=False) as staging:
        (staging / "file").write_text("first")
        with pytest.raises(OutputError, match="another bake is writing it"), staged(folder, False):
            pass
        with pytest.raises(OutputError, match="another bake is writing it"):
            clean(folder)
        # One beside it is none of its business.
        with staged(tmp_path / "other", overwrite=False):
            pass
    assert (folder / "file").read_text() == "first"


@pytest.mark.parametrize("how", ["clean", "the next bake"])
def test_what_a_killed_bake_left_is_removed(tmp_path: Path, how: str) -> None:
    folder, left = tmp_path / "out", tmp_path / ".out.bake"
    assert not clean(folder)
    (left / "files").mkdir(parents=True)
    (left / "files" / "half").write_bytes(bytes(5000))
    assert already_there(folder) >= 5000
    if how == "clean":
        assert clean(folder)
        assert list(tmp_path.iterdir()) == []
    else:
        with staged(folder, overwrite=False) as staging:
            (staging / "file").write_text("new")
        assert [path.name for path in folder.iterdir()] == ["file"]


def test_a_folder_that_was_moved_aside_comes_back(tmp_path: Path) -> None:
    folder, left = tmp_path / "out", tmp_path / ".out.bake"
    (left / "old").mkdir(parents=True)
    (left / "old" / "file").write_text("old")
    with pytest.raises(OutputError, match="--overwrite"), staged(folder, overwrite=False):
        pass
    assert (folder / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_not_of_bake_is_not_removed(tmp_path: Path) -> None:
    own = tmp_path / ".out.bake" / "thesis.txt"
    own.parent.mkdir()
    own.write_text("precious")
    for call in (clean, lambda folder: staged(folder, overwrite=True).__enter__()):
        with pytest.raises(OutputError, match="is not of bake; move it away"):
            call(tmp_path / "out")
    own.parent.rename(tmp_path / "elsewhere")
    (tmp_path / ".out.bake").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="Not a directory"):
        clean(tmp_path / "out")
    assert (tmp_path / "elsewhere" / "thesis.txt").read_text() == "precious"


def test_room_is_asked_for_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "new" / "out"
    free = shutil.disk_usage(tmp_path).free
    check_room(folder, [5, 7])
    with pytest.raises(OutputError, match=r"out: \d+\.\d GB to write, and .* has \d+\.\d GB free"):
        check_room(folder, [free, free])
    check_room(folder, [free], there=free)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, hard))
    try:
        with pytest.raises(OutputError, match=r"has 30\.0 MB, .* may write 20\.0 MB; raise `ulim"):
            check_room(folder, [1, 30_000_000])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    # A file system as FAT is; and a folder that may not be written.
    monkeypatch.setattr(os, "pathconf", lambda *_: 32)
    check_room(folder, [(1 << 32) - 1])
    with pytest.raises(OutputError, match=r"holds files below 4\.3 GB"):
        check_room(folder, [1 << 32])
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="is not writable"):
        check_room(folder, [1])
    assert list(tmp_path.iterdir()) == []
