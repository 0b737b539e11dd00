"""Byte ranges between files, by whatever the system has."""

import errno
import os
from pathlib import Path

import pytest

from bake import copying
from bake.copying import Span, copy_span, pieces
from bake.errors import CheckpointError


def refuse(*_: object) -> int:
    raise OSError(errno.EXDEV, "no")


def once(*arguments: int) -> int:
    """A copy that the kernel breaks off, and goes on with no more."""
    start = arguments[3]
    if start != 100 and start % 4096:
        return 0
    return COPY(*arguments[:2], min(1000, arguments[2]), *arguments[3:])


COPY = os.copy_file_range


@pytest.mark.parametrize("missing", [(), ("copy_file_range",), ("copy_file_range", "sendfile")])
@pytest.mark.parametrize("how", ["absent", "refused", "broken off"])
def test_every_way_copies_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...], how: str
) -> None:
    monkeypatch.setattr(copying, "CHUNK", 3 * 4096)
    monkeypatch.setattr(copying, "BUFFER", 777)
    for name in missing:
        if how == "absent":
            monkeypatch.delattr(os, name)
        else:
            way = once if how == "broken off" and name == "copy_file_range" else refuse
            monkeypatch.setattr(os, name, way)
    data = os.urandom(50_000)
    (tmp_path / "from").write_bytes(data)
    (tmp_path / "to").write_bytes(bytes(60_000))
    span = Span(tmp_path / "from", 100, tmp_path / "to", 5_000, 45_000)
    parts = list(pieces(span))
    assert all(one.start % 4096 == 0 for one in parts[1:])
    for one in reversed(parts):
        copy_span(one)
    wanted = bytes(5_000) + data[100:45_100] + bytes(10_000)
    assert (tmp_path / "to").read_bytes() == wanted


def test_a_file_that_became_shorter_is_named(tmp_path: Path) -> None:
    (tmp_path / "from").write_bytes(b"short")
    (tmp_path / "to").write_bytes(b"")
    with pytest.raises(CheckpointError, match="from: became shorter"):
        copy_span(Span(tmp_path / "from", 0, tmp_path / "to", 0, 50))
