"""What a killed write leaves is taken for written only where it is."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from bake import written
from bake.blocks import workers
from bake.checkpoint import Checkpoint
from bake.stream import write_checkpoint
from tests.test_stream import NAME, rank_one
from tests.tiny import write_tiny

FILE = "model.safetensors"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base, and a folder in which it was written, but for one file."""
    write_tiny("llama", tmp_path / "base")
    (tmp_path / "out").mkdir()
    write(tmp_path, 1)
    (tmp_path / "out" / "tokenizer.json").unlink()
    return tmp_path


def write(place: Path, seed: int, device: str = "cpu") -> list[int]:
    done: list[int] = []
    write_checkpoint(
        *(Checkpoint.open(place / "base"), {NAME: [rank_one(seed)]}, (), {}, place / "out"),
        progress=done.append,
        journal=place / "journal",
        device=device,
    )
    return done


def spoil(place: Path, name: str) -> bytes:
    """Another byte in the middle of a tensor; returns the file as it was."""
    file = place / "out" / FILE
    before = file.read_bytes()
    info = Checkpoint.open(place / "base").find(name)
    middle = (info.start + info.stop) // 2
    file.write_bytes(before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :])
    return before


def test_what_is_written_is_not_written_again(place: Path) -> None:
    before = spoil(place, "model.embed_tokens.weight")
    done = write(place, 1)
    # Nobody but bake writes there, and the machine has not been off: it is not read again.
    assert (place / "out" / FILE).read_bytes() != before
    assert (place / "out" / "tokenizer.json").exists()
    assert sum(done) == sum(load_size(place))


@pytest.mark.parametrize("run", ["the same", "another"])
def test_what_another_process_wrote_counts_too(place: Path, run: str) -> None:
    """Its journal lies beside the main one's, and is of the same run or goes."""
    begin, *parts = (place / "journal").read_text().splitlines(keepends=True)
    (place / "journal").write_text(begin)
    beside = begin if run == "the same" else begin.replace('"run": "', '"run": "0')
    (place / "journal.1").write_text("".join([beside, *parts]))
    before = spoil(place, "model.embed_tokens.weight")
    write(place, 1)
    assert ((place / "out" / FILE).read_bytes() == before) == (run == "another")
    assert not (place / "journal.1").exists()
    assert sorted((place / "journal").read_text().splitlines()[1:]) == sorted(
        one.strip() for one in parts
    )


def load_size(place: Path) -> list[int]:
    return [one.nbytes for one in load_file(place / "base" / FILE).values()]


def test_an_edited_tensor_counts_where_its_bytes_are_as_the_journal_has_them(place: Path) -> None:
    before = spoil(place, NAME)
    write(place, 1)
    assert (place / "out" / FILE).read_bytes() == before


def test_after_a_loss_of_power_copies_do_not_count(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = spoil(place, "model.embed_tokens.weight")
    (place / "boot").write_text("another")
    monkeypatch.setattr(written, "BOOT", place / "boot")
    write(place, 1)
    assert (place / "out" / FILE).read_bytes() == before


@pytest.mark.parametrize("how", ["another edit", "another base", "another device", "no journal"])
def test_what_another_bake_wrote_goes(
    place: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    # Whatever the device is called, the processor computes.
    monkeypatch.setattr("bake.stream.workers", lambda _: workers())
    device = "cuda:1" if how == "another device" else "cpu"
    (place / "out" / "political.gguf").write_text("left")
    before = spoil(place, "model.embed_tokens.weight")
    if how == "another base":
        (place / "base" / FILE).touch()
    if how == "no journal":
        (place / "journal").write_text("{half a li")
    write(place, 2 if how == "another edit" else 1, device)
    assert not (place / "out" / "political.gguf").exists()
    assert ((place / "out" / FILE).read_bytes() == before) is (how != "another edit")
    (place / "fresh").mkdir()
    (place / "out").rename(place / "old")
    (place / "fresh").rename(place / "out")
    write(place, 2 if how == "another edit" else 1)
    assert (place / "out" / FILE).read_bytes() == (place / "old" / FILE).read_bytes()
