"""The GGUF reader: what gguf-py writes is read back, and nothing hostile gets past it."""

import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bake.errors import GGUFError
from bake.gguf_file import GGUFArray, GGUFFile, GGUFTensor, Span, padded

U32, TEXT, ARRAY = GGUFValueType.UINT32, GGUFValueType.STRING, GGUFValueType.ARRAY
F32, Q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0
STORED = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
"""Types of the matrices of the small file: all that gguf-py can also write."""


def write_small(path: Path) -> dict[str, np.ndarray]:
    """Write a GGUF with every kind of value and tensor; return what its tensors decode to."""
    random = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    writer.add_name("größer")
    writer.add_uint8("t.u8", 200)
    writer.add_int8("t.i8", -3)
    writer.add_uint16("t.u16", 60000)
    writer.add_int16("t.i16", -300)
    writer.add_int32("t.i32", -70000)
    writer.add_uint64("t.u64", 1 << 63)
    writer.add_int64("t.i64", -(1 << 62))
    writer.add_float32("t.f32", 0.5)
    writer.add_float64("t.f64", 1e300)
    writer.add_bool("t.bool", True)
    writer.add_array("t.strings", ["a", "bc", "", "ä"])
    writer.add_array("t.numbers", [1, 2, 3])
    values = {"norm.weight": random.standard_normal(64).astype(np.float32)}
    writer.add_tensor("norm.weight", values["norm.weight"])
    for name in STORED:
        kind = GGMLQuantizationType[name]
        stored = quantize(random.standard_normal((3, 64)).astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=kind)
        values[f"{name}.weight"] = dequantize(stored, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def text(value: str | bytes) -> bytes:
    encoded = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(encoded)) + encoded


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(
    name: str | bytes = "a.weight",
    dimensions: tuple[int, ...] = (32, 2),
    kind: int = F32,
    offset: int = 0,
) -> bytes:
    shape = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


ARCHITECTURE = pair("general.architecture", TEXT, text("llama"))


def whole(
    pairs: tuple[bytes, ...] = (ARCHITECTURE,),
    tensors: tuple[bytes, ...] = (tensor(),),
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: int = 1024,
) -> bytes:
    """Return a GGUF of these parts; `counts` are the numbers of tensors and pairs it claims."""
    counts = counts or (len(tensors), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)
    return head + bytes(padded(len(head), 32) - len(head)) + bytes(data)


def extra(key: str | bytes, kind: int, value: bytes) -> bytes:
    return whole(pairs=(ARCHITECTURE, pair(key, kind, value)))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return path, write_small(path)


def test_reads_what_gguf_py_wrote(small: tuple[Path, dict[str, np.ndarray]]) -> None:
    path, values = small
    file = GGUFFile.open(path)
    assert file.architecture == "llama"
    assert (file.version, file.alignment) == (3, 32)
    assert dict(file.metadata) == {
        "general.architecture": "llama",
        "general.name": "größer",
        "t.u8": 200,
        "t.i8": -3,
        "t.u16": 60000,
        "t.i16": -300,
        "t.i32": -70000,
        "t.u64": 1 << 63,
        "t.i64": -(1 << 62),
        "t.f32": 0.5,
        "t.f64": 1e300,
        "t.bool": True,
        "t.strings": GGUFArray(TEXT, 4),
        "t.numbers": GGUFArray(GGUFValueType.INT32, 3),
    }
    assert list(file.tensors) == list(values)
    assert file.tensors["Q4_1.weight"].shape == (3, 64)
    assert file.tensors["norm.weight"].offset == file.data_start
    for name, expected in values.items():
        found = file.read(name)
        assert found.dtype == torch.float32
        assert np.array_equal(found.numpy(), expected), name
        found.add_(1)  # The tensor is the caller's own, not a view of the file.
        assert np.array_equal(file.read(name).numpy(), expected), name


def test_pairs_tile_the_metadata(small: tuple[Path, dict[str, np.ndarray]]) -> None:
    file = GGUFFile.open(small[0])
    position = file.metadata_range.start
    assert position == 24
    for span in file.pairs.values():
        assert span.start == position
        position += span.nbytes
    assert position == 24 + file.metadata_range.nbytes
    stored = small[0].read_bytes()
    name = file.pairs["general.name"]
    assert stored[name.start : name.start + name.nbytes] == pair(
        "general.name", TEXT, text("größer")
    )


def test_strings_across_windows_are_skipped(tmp_path: Path) -> None:
    words = [b"x" * length for length in (700_000, 3, 2_500_000, 0, 9)]
    value = struct.pack("<IQ", TEXT, len(words)) + b"".join(map(text, words))
    path = tmp_path / "long.gguf"
    path.write_bytes(
        whole(pairs=(pair("t.words", ARRAY, value), ARCHITECTURE, pair("t.end", U32, bytes(4))))
    )
    file = GGUFFile.open(path)
    assert file.metadata["t.words"] == GGUFArray(TEXT, 5)
    assert file.metadata["t.end"] == 0
    assert file.tensors["a.weight"] == GGUFTensor(
        "a.weight", F32, (2, 32), file.data_start, 2 * 32 * 4
    )


def test_every_truncation_is_refused(
    small: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    stored = small[0].read_bytes()
    last = list(GGUFFile.open(small[0]).tensors.values())[-1]
    path = tmp_path / "cut.gguf"
    for length in range(last.offset + last.nbytes):
        path.write_bytes(stored[:length])
        with pytest.raises(GGUFError) as caught:
            GGUFFile.open(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    path.write_bytes(stored[: last.offset + last.nbytes])
    GGUFFile.open(path)  # The padding after the last tensor is nobody's.


HOSTILE = {
    "empty file": (b"", "magic"),
    "bad magic": (b"GGML" + whole()[4:], "not with b'GGUF'"),
    "version 0": (whole(version=0), "version 0"),
    "version 1": (whole(version=1), "version 1"),
    "version 4": (whole(version=4), "version 4"),
    "big-endian": (whole(version=0x03000000), "big-endian"),
    "more tensors than bytes": (whole(counts=(1 << 19, 1)), "list of 524288 tensors"),
    "more pairs than bytes": (whole(counts=(1, 1 << 19)), "list of 524288 metadata pairs"),
    "endless tensors": (whole(counts=((1 << 64) - 1, 1)), "claims 18446744073709551615 tensors"),
    "endless pairs": (whole(counts=(1, 1 << 63)), "claims 9223372036854775808 metadata"),
    "no architecture": (whole(pairs=(pair("a", U32, bytes(4)),)), "general.architecture"),
    "architecture a number": (
        whole(pairs=(pair("general.architecture", U32, bytes(4)),)),
        "general.architecture",
    ),
    "key twice": (whole(pairs=(ARCHITECTURE, ARCHITECTURE)), "is there twice"),
    "key empty": (extra("", U32, bytes(4)), "empty"),
    "key not UTF-8": (extra(b"\xff\xfe", U32, bytes(4)), "not UTF-8"),
    "key with a zero": (extra("a\0b", U32, bytes(4)), "zero byte"),
    "key endless": (whole(pairs=(struct.pack("<Q", 1 << 62),)), "claims 4611686018427387904"),
    "value type unknown": (extra("a", 13, bytes(4)), "unknown type 13"),
    "string endless": (extra("a", TEXT, struct.pack("<Q", 1 << 40)), "claims 1099511627776"),
    "string past the end": (extra("a", TEXT, struct.pack("<Q", 1 << 20)), "left"),
    "array type unknown": (extra("a", ARRAY, struct.pack("<IQ", 99, 1)), "unknown type 99"),
    "array of arrays": (extra("a", ARRAY, struct.pack("<IQ", ARRAY, 1)), "array of arrays"),
    "array endless": (extra("a", ARRAY, struct.pack("<IQ", U32, 1 << 62)), "left"),
    "strings endless": (extra("a", ARRAY, struct.pack("<IQ", TEXT, 1 << 60)), "left"),
    "strings past the end": (
        extra("a", ARRAY, struct.pack("<IQ", TEXT, 2) + text("x") + struct.pack("<Q", 1 << 50)),
        "left",
    ),
    "alignment 0": (extra("general.alignment", U32, struct.pack("<I", 0)), "is 0, not a power"),
    "alignment 48": (extra("general.alignment", U32, struct.pack("<I", 48)), "is 48, not a power"),
    "alignment huge": (extra("general.alignment", U32, struct.pack("<I", 1 << 31)), "power of two"),
    "alignment a string": (extra("general.alignment", TEXT, text("32")), "type STRING"),
    "split": (
        extra("split.count", GGUFValueType.UINT16, struct.pack("<H", 3)),
        "one of 3 parts (number None, from 0)",
    ),
    "tensor twice": (whole(tensors=(tensor(), tensor(offset=256))), "is there twice"),
    "tensor name empty": (whole(tensors=(tensor(""),)), "empty"),
    "tensor name too long": (whole(tensors=(tensor("x" * 64),)), "claims 64 bytes"),
    "five dimensions": (whole(tensors=(tensor(dimensions=(1,) * 5),)), "claims 5 dimensions"),
    "dimension 0": (whole(tensors=(tensor(dimensions=(32, 0)),)), "dimension of 0"),
    "dimensions endless": (
        whole(tensors=(tensor(dimensions=((1 << 64) - 1,) * 4),)),
        "of a file of",
    ),
    "dimensions that wrap to 0": (
        whole(tensors=(tensor(dimensions=(1 << 32, 1 << 32)),)),
        "of a file of",
    ),
    "tensor type unknown": (whole(tensors=(tensor(kind=77),)), "unknown type 77"),
    "tensor type removed": (whole(tensors=(tensor(kind=4),)), "unknown type 4"),
    "row not of whole blocks": (whole(tensors=(tensor(dimensions=(33, 2), kind=Q8_0),)), "rows"),
    "offset misaligned": (whole(tensors=(tensor(offset=4),)), "lies at 4 of the data"),
    "offset beyond": (whole(tensors=(tensor(offset=(1 << 64) - 32),)), "lies at"),
    "tensors overlap": (
        whole(tensors=(tensor("a"), tensor("b", offset=128))),
        "lies at 128 of the data, not at 256",
    ),
    "gap between tensors": (
        whole(tensors=(tensor("a"), tensor("b", offset=512))),
        "lies at 512 of the data, not at 256",
    ),
    "data cut": (whole(data=255), "of a file of"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    stored, fragment = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(stored)
    tracemalloc.start()
    try:
        with pytest.raises(GGUFError) as caught:
            GGUFFile.open(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert fragment in message
    assert "; " in message, "no remedy"
    assert "\n" not in message
    assert peak < 4 << 20, "a claim of the header set the size of an allocation"


def missing(folder: Path) -> Path:
    return folder / "missing.gguf"


def directory(folder: Path) -> Path:
    return folder


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def zero_byte(folder: Path) -> Path:
    return folder / "a\0b"


@pytest.mark.parametrize("make", [missing, directory, pipe, zero_byte])
def test_what_is_no_file_is_refused(make: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match="path"):
        GGUFFile.open(make(tmp_path))


def test_a_number_of_dimensions_may_be_zero(tmp_path: Path) -> None:
    path = tmp_path / "scalar.gguf"
    path.write_bytes(whole(tensors=(tensor(dimensions=()),)))
    assert GGUFFile.open(path).read("a.weight").shape == ()


def test_reading_a_tensor_that_is_not_there(small: tuple[Path, dict[str, np.ndarray]]) -> None:
    with pytest.raises(GGUFError, match=r"has no tensor 'blk\.0\.nothing'"):
        GGUFFile.open(small[0]).read("blk.0.nothing")


def test_reading_numbers_that_gguf_py_cannot_decode(tmp_path: Path) -> None:
    path = tmp_path / "integers.gguf"
    path.write_bytes(whole(tensors=(tensor(kind=GGMLQuantizationType.I32),)))
    with pytest.raises(GGUFError, match="of type I32"):
        GGUFFile.open(path).read("a.weight")


def test_a_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "shrinks.gguf"
    path.write_bytes(whole())
    file = GGUFFile.open(path)
    for length in (file.data_start + 100, 10):
        os.truncate(path, length)
        with pytest.raises(GGUFError, match="ends before"):
            file.read("a.weight")


def test_version_2_and_another_alignment(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    aligned = pair("general.alignment", U32, struct.pack("<I", 64))
    path.write_bytes(whole(pairs=(ARCHITECTURE, aligned), version=2) + bytes(64))
    file = GGUFFile.open(path)
    assert (file.version, file.alignment, file.data_start % 64) == (2, 64, 0)
    assert file.metadata_range == Span(24, len(ARCHITECTURE) + len(aligned))


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_mutated_file_opens_or_is_refused(
    small: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, data: st.DataObject
) -> None:
    stored = bytearray(small[0].read_bytes())
    header = GGUFFile.open(small[0]).data_start
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header - 1))
        new = data.draw(
            st.binary(min_size=1, max_size=8)
            | st.integers(0, (1 << 64) - 1).map(lambda number: number.to_bytes(8, "little"))
            | st.sampled_from([b"\xff" * 8, bytes(8), bytes(7) + b"\x80"])
        )
        # Either the bytes are overwritten, or others are put in or taken out there.
        stored[at : at + data.draw(st.sampled_from([len(new), 0, 2 * len(new)]))] = new
    path = tmp_path / "mutated.gguf"
    path.write_bytes(stored)
    try:
        file = GGUFFile.open(path)
    except GGUFError as error:
        assert "\n" not in str(error)
        return
    for name, entry in file.tensors.items():
        try:
            assert tuple(file.read(name).shape) == entry.shape
        except GGUFError as error:
            assert "cannot turn into numbers" in str(error)
