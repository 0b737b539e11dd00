"""`bake verify`: a folder against the hashes in its manifest."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bake.commands import main
from bake.errors import ManifestError
from bake.manifest import differences, file_hash, read_outputs, write_manifest

FILES = ("model.safetensors", "steering/directions.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two files and their manifest."""
    (tmp_path / "steering").mkdir()
    for name in FILES:
        (tmp_path / name).write_bytes(name.encode() * 100)
    write_manifest(tmp_path, {"outputs": {name: file_hash(tmp_path / name) for name in FILES}})
    return tmp_path


def test_an_untouched_folder_is_as_written_and_each_byte_is_read_once(folder: Path) -> None:
    read: list[int] = []
    (folder / ".gitattributes").write_text("of the Hub")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "note").write_text("of its client")
    assert differences(folder, read_outputs(folder), read.append) == []
    assert sum(read) == sum((folder / name).stat().st_size for name in FILES)


def flip(folder: Path) -> None:
    data = bytearray((folder / FILES[1]).read_bytes())
    data[7] ^= 1
    (folder / FILES[1]).write_bytes(data)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "one bit": (flip, f"{FILES[1]}: changed since the bake"),
    "a file gone": (lambda folder: (folder / FILES[0]).unlink(), f"{FILES[0]}: missing"),
    "a file more": (
        lambda folder: (folder / "other.safetensors").write_bytes(b"x"),
        "other.safetensors: not of the bake",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_folder_is_named_file_by_file(
    folder: Path,
    change: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil, said = CHANGES[change]
    spoil(folder)
    monkeypatch.setattr(sys, "argv", ["bake", "verify", str(folder)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 4
    assert capsys.readouterr().err.splitlines()[-1] == f"bake: {folder}/{said}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "give the folder of a bake"),
        ("{", "not valid JSON"),
        ("{}", "outputs: expected"),
        ('{"outputs": {"a": 1}}', "outputs: expected"),
        (b"\xff", "not valid JSON"),
    ],
)
def test_a_folder_without_a_manifest_is_refused(
    tmp_path: Path, text: str | bytes | None, said: str
) -> None:
    if text is not None:
        (tmp_path / "bake.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ManifestError, match=said):
        read_outputs(tmp_path)
