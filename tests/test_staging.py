"""Output appears when it is complete, and never otherwise."""

import errno
import resource
from pathlib import Path

import pytest

from bake.checkpoint import Checkpoint
from bake.errors import OutputError
from bake.staging import staged, staged_file
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
        if self.name.startswith(".out.") and target == folder:
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
