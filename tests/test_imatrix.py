"""Importance matrices: both formats of llama.cpp, and what is no importance matrix."""

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bake.errors import GGUFError
from bake.gguf_file import GGUFFile
from bake.imatrix import Importance, read_importance, write_importance

DENSE, STACKED = "blk.0.ffn_down.weight", "blk.0.ffn_down_exps.weight"
FOUND = Importance(
    {
        DENSE: np.array([[2.0, 4.0, 6.0]], np.float32),
        STACKED: np.array([[8.0, 4.0], [0.0, 0.0]], np.float32),
    },
    {DENSE: np.array([2.0], np.float32), STACKED: np.array([4.0, 0.0], np.float32)},
    ("prompts/text", "more"),
    3,
    512,
)


def legacy(*entries: tuple[str, int, tuple[float, ...]], tail: bytes = b"") -> bytes:
    """The bytes of tools/imatrix/imatrix.cpp, `save_imatrix_legacy`."""
    content = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        content += struct.pack("<i", len(name)) + name.encode()
        content += struct.pack(f"<ii{len(values)}f", calls, len(values), *values)
    return content + tail


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    write_importance(FOUND, path)
    again = read_importance(path)
    assert (again.datasets, again.chunks, again.chunk_size) == (("prompts/text", "more"), 3, 512)
    for name in (DENSE, STACKED):
        assert np.array_equal(again.sums[name], FOUND.sums[name])
        assert np.array_equal(again.counts[name], FOUND.counts[name])
    # As llama.cpp's loader looks for it (common/imatrix-loader.cpp).
    reader = GGUFReader(path)
    assert set(reader.fields) >= {"general.type", "imatrix.datasets", "imatrix.chunk_count"}
    assert "general.architecture" not in reader.fields
    assert [one.name for one in reader.tensors] == [
        f"{name}{part}" for name in (DENSE, STACKED) for part in (".in_sum2", ".counts")
    ]


def test_the_means_are_by_token_and_expert() -> None:
    """An expert that no token chose counts all columns alike, as in llama-quantize."""
    means = FOUND.means()
    assert means[DENSE].tolist() == [1, 2, 3]
    assert means[STACKED].tolist() == [2, 1, 1, 1]
    assert list(FOUND.renamed({DENSE: "other"}).means()) == ["other", STACKED]


def test_the_old_format(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    tail = struct.pack("<ii", 7, 5) + b"a.txt"
    path.write_bytes(legacy((DENSE, 4, (8.0, 4.0)), ("x", 0, (3.0,)), tail=tail))
    found = read_importance(path)
    assert {name: list(one) for name, one in found.means().items()} == {DENSE: [2, 1], "x": [3]}
    assert (found.chunks, found.datasets) == (7, ("a.txt",))
    path.write_bytes(legacy((DENSE, 4, (8.0, 4.0))))
    assert (read_importance(path).chunks, read_importance(path).datasets) == (0, ())


REFUSALS = {
    "empty": (b"", "ends too early"),
    "text": (b"hello, hello", "is no importance matrix|ends too early"),
    "no entry": (struct.pack("<i", 0), "is no importance matrix"),
    "a negative count": (struct.pack("<i", -5), "is no importance matrix"),
    "more entries than bytes": (struct.pack("<i", 1 << 30), "is no importance matrix"),
    "a name beyond the end": (struct.pack("<ii", 1, 4000) + b"blk", "ends too early"),
    "values beyond the end": (legacy((DENSE, 1, (1.0, 2.0)))[:-3], "ends too early|is no"),
    "a negative square": (legacy((DENSE, 1, (-1.0,))), "no mean of squares"),
    "not a number": (legacy((DENSE, 1, (float("nan"),))), "no mean of squares"),
    "a cut GGUF": (b"GGUF\3\0\0\0", "needs"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_no_importance_matrix_is_one_line(tmp_path: Path, case: str) -> None:
    content, message = REFUSALS[case]
    path = tmp_path / "imatrix.dat"
    path.write_bytes(content)
    with pytest.raises(GGUFError, match=message) as caught:
        read_importance(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match="cannot be read: No such file"):
        read_importance(tmp_path / "none.dat")


def test_other_ggufs_are_no_importance_matrices(tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    write_importance(FOUND, whole)
    content = whole.read_bytes()
    for old, new in ((b"imatrix.chunk_size", b"imatrix.chunk_xxxx"), (b".in_sum2", b".in_sum3")):
        (tmp_path / "other.gguf").write_bytes(content.replace(old, new))
        with pytest.raises(GGUFError, match="is no importance matrix of llama"):
            read_importance(tmp_path / "other.gguf")
    (tmp_path / "other.gguf").write_bytes(content.replace(b".counts", b".countz"))
    with pytest.raises(GGUFError, match=r"has no tensor 'blk\.0\.ffn_down\.weight\.counts'"):
        read_importance(tmp_path / "other.gguf")
    assert GGUFFile.open(whole).array("imatrix.datasets") == ["prompts/text", "more"]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.integers(0, 10**6))
def test_mutated_files_are_read_or_refused(tmp_path: Path, place: int, byte: int, cut: int) -> None:
    whole, old = tmp_path / "whole.gguf", tmp_path / "broken"
    whole.unlink(missing_ok=True)
    write_importance(FOUND, whole)
    for content in (bytearray(whole.read_bytes()), bytearray(legacy((DENSE, 4, (8.0, 4.0))))):
        content[place % len(content)] = byte
        old.write_bytes(content[: len(content) - cut % (2 * len(content))])
        try:
            read_importance(old).means()
        except GGUFError as error:
            assert "\n" not in str(error)
