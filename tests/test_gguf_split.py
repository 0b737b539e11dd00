"""Models split into several files: read as one, written in the same parts."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFValueType, GGUFWriter

from bake.archs import find_arch
from bake.checkpoint import Checkpoint
from bake.edits import AddVector, CreatedTensor, LowRank
from bake.errors import GGUFError, OutputError, VerificationError
from bake.export.compare import compare
from bake.export.gguf import patch
from bake.export.gguf_bytes import packed_pair, packed_string
from bake.export.split import in_parts
from bake.gguf_file import GGUFFile, part_names, parts_named
from bake.llama import LlamaModel
from tests.tiny_gguf import write_tiny_gguf

NAMES = [f"blk.{layer}.{name}" for layer in range(3) for name in ("norm.weight", "down.weight")]
PARTS = [NAMES[:2], NAMES[2:4], NAMES[4:]]


def write_parts(file: GGUFFile, output: Path, groups: Sequence[Sequence[str]], **lies: int) -> Path:
    """Write a file in parts as llama-gguf-split does; `lies` are of the header of the second."""
    content = file.path.read_bytes()
    paths = part_names(output, len(groups))
    total = lies.get("total", sum(map(len, groups)))
    for number, (path, names) in enumerate(zip(paths, groups, strict=True)):
        told = {"no": number, "count": len(groups)} | (lies if number == 1 else {})
        pairs = [content[one.start : one.start + one.nbytes] for one in file.pairs.values()]
        pairs = [] if number else pairs
        pairs += [
            packed_pair("split.no", GGUFValueType.UINT16, told["no"]),
            packed_pair("split.count", GGUFValueType.UINT16, told["count"]),
            packed_pair("split.tensors.count", GGUFValueType.INT32, total),
        ]
        head, data = b"".join(pairs), b""
        for name in names:
            one = file.tensors[name]
            head += packed_string(name) + struct.pack(
                f"<I{len(one.shape)}QIQ", len(one.shape), *one.shape[::-1], one.type, len(data)
            )
            data += content[one.offset : one.offset + one.nbytes]
            data += bytes(-len(data) % 32)
        head = b"GGUF" + struct.pack("<IQQ", 3, len(names), len(pairs)) + head
        path.write_bytes(head + bytes(-len(head) % 32) + data)
    return paths[0]


def write_split(folder: Path, groups: Sequence[Sequence[str]] = PARTS, **lies: int) -> Path:
    random = np.random.default_rng(0)
    writer = GGUFWriter(folder / "whole.gguf", "llama")
    writer.add_string("general.name", "split")
    for name in NAMES:
        shape = (64,) if "norm" in name else (64, 96)
        writer.add_tensor(name, random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return write_parts(GGUFFile.open(folder / "whole.gguf"), folder / "m.gguf", groups, **lies)


def test_parts_are_read_as_one(tmp_path: Path) -> None:
    file = GGUFFile.open(write_split(tmp_path))
    assert list(file.tensors) == NAMES
    assert [tensor.part for tensor in file.tensors.values()] == [0, 0, 1, 1, 2, 2]
    for number, names in enumerate(PARTS):
        part = file.files[number]
        assert part.path.name == f"m-{number + 1:05d}-of-00003.gguf"
        assert list(part.tensors) == names
        for name in names:
            assert torch.equal(part.read(name), file.read(name))
    assert (file.architecture, file.metadata["general.name"]) == ("llama", "split")


@pytest.mark.parametrize("groups", [PARTS, [[], NAMES[:1], NAMES[1:]]])
def test_the_parts_are_written_as_they_were(tmp_path: Path, groups: list[list[str]]) -> None:
    base = GGUFFile.open(write_split(tmp_path, groups))
    assert patch(base, {}, tmp_path / "out.gguf", edited_type="auto") == ()
    outputs = part_names(tmp_path / "out.gguf", 3)
    for old, new in zip(base.files, outputs, strict=True):
        assert new.read_bytes() == old.path.read_bytes()
    assert compare(base, GGUFFile.open(outputs[0]), set()) == tuple(base.tensors)


def test_what_is_edited_and_created_stays_in_its_part(tmp_path: Path) -> None:
    base = GGUFFile.open(write_split(tmp_path))
    name, bias = "blk.1.down.weight", "blk.2.down.bias"
    edits = {
        name: [LowRank(name, torch.ones(64, 1), torch.ones(1, 96))],
        bias: [AddVector(bias, torch.ones(64))],
    }
    created = [CreatedTensor(bias, (64,), "F32", "blk.2.down.weight")]
    pairs = {"general.name": packed_pair("general.name", GGUFValueType.STRING, "patched")}
    reports = patch(
        *(base, edits, tmp_path / "out.gguf"), edited_type="auto", created=created, pairs=pairs
    )
    patched = GGUFFile.open(tmp_path / "out-00001-of-00003.gguf")
    assert [one.name for one in reports] == [name, bias]
    assert [list(part.tensors) for part in patched.files] == [*PARTS[:2], [*PARTS[2], bias]]
    assert all(part.metadata["split.tensors.count"] == 7 for part in patched.files)
    assert patched.metadata["general.name"] == "patched"
    torch.testing.assert_close(patched.read(name), base.read(name) + 1)
    assert torch.equal(patched.read(bias), torch.ones(64))
    untouched = compare(base, patched, edits.keys(), pairs=pairs)
    assert set(untouched) == set(NAMES) - {name}
    with pytest.raises(OutputError, match=r"out-00001-of-00003\.gguf: exists already"):
        patch(base, {}, tmp_path / "out.gguf", edited_type="auto")
    last = patched.files[2].path
    content = bytearray(last.read_bytes())
    content[patched.files[2].tensors["blk.2.norm.weight"].offset] ^= 1
    last.write_bytes(content)
    with pytest.raises(VerificationError, match=r"00003-of-00003.gguf: tensor 'blk.2.norm.weight'"):
        compare(base, GGUFFile.open(patched.path), edits.keys(), pairs=pairs)


def test_a_file_is_cut_as_llama_gguf_split_does(tmp_path: Path) -> None:
    """Greedily, by the tensors' padded bytes; one that is larger than a part is alone in it."""
    write_split(tmp_path)
    whole = GGUFFile.open(tmp_path / "whole.gguf")
    norm, down = 4 * 64, 4 * 64 * 96
    for most, groups in {
        down + norm: PARTS,
        2 * down + 2 * norm: [NAMES[:4], NAMES[4:]],
        down + norm - 1: [[name] for name in NAMES],
        1: [[name] for name in NAMES],
        3 * (down + norm): [NAMES],
    }.items():
        laid_out = in_parts(whole, most)
        patch(laid_out, {}, tmp_path / f"{most}.gguf", edited_type="auto")
        found = part_names(tmp_path / f"{most}.gguf", len(groups))
        assert compare(laid_out, GGUFFile.open(found[0]), set()) == tuple(NAMES)
        if len(groups) > 1:
            write_parts(whole, tmp_path / "theirs.gguf", groups)
            theirs = part_names(tmp_path / "theirs.gguf", len(groups))
            assert [one.read_bytes() for one in found] == [one.read_bytes() for one in theirs]
        else:
            assert found[0].read_bytes() == whole.path.read_bytes()


REFUSALS = {
    "another number": (PARTS, {"no": 2}, r"00002-of-00003.gguf: should be number 1 .* says 2 of 3"),
    "another count": (PARTS, {"count": 4}, r"header says 1 of 4"),
    "too many claimed": (PARTS, {"total": 7}, r"split.tensors.count is 7, and the parts have 6"),
    "a tensor twice": ([*PARTS[:2], NAMES[:1]], {}, r"'blk.0.norm.weight' is in another part too"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_parts_that_do_not_belong_together(tmp_path: Path, case: str) -> None:
    groups, lies, message = REFUSALS[case]
    with pytest.raises(GGUFError, match=message) as caught:
        GGUFFile.open(write_split(tmp_path, groups, **lies))
    assert "\n" not in str(caught.value)


def test_a_part_alone_or_under_another_name(tmp_path: Path) -> None:
    path = write_split(tmp_path)
    second = path.with_name("m-00002-of-00003.gguf")
    with pytest.raises(GGUFError, match=r"one of 3 parts \(number 1, from 0\); give the first"):
        GGUFFile.open(second)
    second.rename(tmp_path / "kept")
    with pytest.raises(GGUFError, match=r"m-00002-of-00003\.gguf is missing") as caught:
        GGUFFile.open(path)
    assert "\n" not in str(caught.value)
    path.rename(tmp_path / "renamed.gguf")
    with pytest.raises(GGUFError, match=r"name ends in -00001-of-00003\.gguf"):
        GGUFFile.open(tmp_path / "renamed.gguf")


def test_a_part_is_cut(tmp_path: Path) -> None:
    path = write_split(tmp_path)
    third = path.with_name("m-00003-of-00003.gguf")
    third.write_bytes(third.read_bytes()[:-1000])
    with pytest.raises(GGUFError, match="of a file of"):
        GGUFFile.open(path)


def test_names_of_parts() -> None:
    assert part_names(Path("a/v1.5.gguf"), 1) == (Path("a/v1.5.gguf"),)
    assert part_names(Path("a/v1.5.gguf"), 2)[1] == Path("a/v1.5-00002-of-00002.gguf")
    assert parts_named(Path("a/v1.5-00001-of-00012.gguf")) == 12
    assert parts_named(Path("a/v1.5.gguf")) == 1


def test_llama_cpp_loads_what_was_written_in_parts(tiny_llama: Path, tmp_path: Path) -> None:
    base = Checkpoint.open(tiny_llama)
    arch = find_arch(base.config, "config.json", base.tensors)
    whole = tmp_path / "whole.gguf"
    write_tiny_gguf(base, arch, whole)
    file = GGUFFile.open(whole)
    names = list(file.tensors)
    parts = write_parts(file, tmp_path / "parts.gguf", [names[:5], names[5:]])
    bias = "blk.1.ffn_down.bias"
    vector = torch.linspace(-1, 1, base.read("model.norm.weight").shape[0])
    created = [CreatedTensor(bias, tuple(vector.shape), "F32", "blk.1.ffn_down.weight")]
    found = []
    for path, output in ((whole, "one.gguf"), (parts, "two.gguf")):
        file = GGUFFile.open(path)
        edits = {bias: [AddVector(bias, vector)]}
        patch(file, edits, tmp_path / output, edited_type="auto", created=created)
        written = part_names(tmp_path / output, len(file.files))[0]
        for one in (path, written):
            with LlamaModel(one, context=16, threads=1) as model:
                found.append(model.logits([1, 7, 30, 11]))
    assert np.array_equal(found[0], found[2])
    assert np.array_equal(found[1], found[3])
    assert np.abs(found[0] - found[1]).max() > 1e-3
