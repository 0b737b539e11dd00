"""Patching a GGUF: what is edited is what was asked, and the rest is byte for byte the base."""

import os
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bake.edits import (
    AddVector,
    CreatedTensor,
    Edit,
    LowRank,
    RemoveKeepingNorms,
    RemoveSubspace,
    apply_all,
)
from bake.errors import GGUFError, OutputError, VerificationError
from bake.export.compare import compare
from bake.export.gguf import PatchedTensor, patch
from bake.export.gguf_bytes import packed_pair
from bake.gguf_file import GGUFFile

WRITABLE_TYPES = F32, F16, BF16, Q8_0 = tuple(
    GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0")
)
Q4_1 = GGMLQuantizationType.Q4_1
LAYOUT = {
    "token_embd.weight": ((96, 64), Q8_0),
    "blk.0.attn_norm.weight": ((64,), F32),
    "blk.0.ffn_down.weight": ((64, 160), Q4_1),
    "blk.0.attn_output.weight": ((64, 64), F16),
    "blk.1.ffn_down.weight": ((64, 160), BF16),
    "blk.1.attn_output.weight": ((64, 64), F32),
    "blk.2.ffn_down.weight": ((256, 512), Q4_1),
    "output_norm.weight": ((63,), F32),
}
Folder = pytest.TempPathFactory


def write_gguf(
    path: Path,
    layout: Mapping[str, tuple[tuple[int, ...], GGMLQuantizationType]],
    keys: Mapping[str, str],
) -> None:
    random = np.random.default_rng(1)
    writer = GGUFWriter(path, "llama")
    for key, value in keys.items():
        writer.add_string(key, value)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    for name, (shape, kind) in layout.items():
        values = random.standard_normal(shape).astype(np.float32)
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory: Folder) -> GGUFFile:
    path = tmp_path_factory.mktemp("base") / "base.gguf"
    write_gguf(path, LAYOUT, {"general.name": "small"})
    return GGUFFile.open(path)


def rank_one(name: str, shape: tuple[int, ...], relative: float, weight: torch.Tensor) -> LowRank:
    """Return a random rank-one edit of `relative` times the norm of `weight`."""
    generator = torch.Generator().manual_seed(2)
    left = torch.randn(shape[0], 1, generator=generator)
    right = torch.randn(1, shape[1], generator=generator)
    return LowRank(name, left * (relative * weight.norm() / (left.norm() * right.norm())), right)


def basis(size: int, count: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    columns: torch.Tensor = torch.linalg.qr(torch.randn(size, count, generator=generator)).Q
    return columns


def stored(file: GGUFFile, name: str) -> bytes:
    entry = file.tensors[name]
    return file.path.read_bytes()[entry.offset : entry.offset + entry.nbytes]


def test_no_edit_gives_the_same_file(base: GGUFFile, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    assert patch(base, {"token_embd.weight": []}, output, edited_type=F16) == ()
    assert output.read_bytes() == base.path.read_bytes()
    assert len(compare(base, GGUFFile.open(output), set())) == len(LAYOUT)


def test_copying_does_not_need_the_kernel(
    base: GGUFFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    patch(base, {}, tmp_path / "out.gguf", edited_type=F16)
    assert (tmp_path / "out.gguf").read_bytes() == base.path.read_bytes()


@pytest.mark.parametrize("kind", WRITABLE_TYPES)
def test_an_edit_of_strength_zero_copies_the_bytes(
    base: GGUFFile, tmp_path: Path, kind: GGMLQuantizationType
) -> None:
    edits = {
        name: [RemoveSubspace(name, basis(shape[0]), strength=0.0)]
        for name, (shape, _) in LAYOUT.items()
        if len(shape) == 2
    }
    output = tmp_path / "out.gguf"
    reports = patch(base, edits, output, edited_type=kind)
    assert output.read_bytes() == base.path.read_bytes()
    for report in reports:
        own = LAYOUT[report.name][1]
        assert report == PatchedTensor(report.name, own, own, 1.0, 0.0, 0.0)


def test_a_created_bias_follows_its_stem(base: GGUFFile, tmp_path: Path) -> None:
    vectors = {
        "blk.1.ffn_down.bias": torch.linspace(-1, 1, 64),
        "blk.0.ffn_down.bias": torch.zeros(64),
    }
    created = [
        CreatedTensor(name, (64,), "F32", name.replace("bias", "weight")) for name in vectors
    ]
    edits = {name: [AddVector(name, vector)] for name, vector in vectors.items()}
    output = tmp_path / "out.gguf"
    reports = patch(base, edits, output, edited_type=Q8_0, created=created)
    patched = GGUFFile.open(output)
    expected = list(LAYOUT)
    expected.insert(expected.index("blk.0.ffn_down.weight") + 1, "blk.0.ffn_down.bias")
    expected.insert(expected.index("blk.1.ffn_down.weight") + 1, "blk.1.ffn_down.bias")
    assert list(patched.tensors) == expected
    for name, vector in vectors.items():
        assert patched.tensors[name].type == F32
        assert torch.equal(patched.read(name), vector)
    assert [report.name for report in reports] == ["blk.0.ffn_down.bias", "blk.1.ffn_down.bias"]
    for report in reports:
        assert report == PatchedTensor(report.name, None, F32, 1.0, 0.0, 0.0)
    assert list(compare(base, patched, vectors.keys())) == list(LAYOUT)


def test_tensors_get_other_names_and_pairs_other_values(base: GGUFFile, tmp_path: Path) -> None:
    name, output = "blk.1.ffn_down.weight", tmp_path / "out.gguf"
    renamed = {name: "blk.2.ffn_down.weight", "blk.2.ffn_down.weight": "blk.3.ffn_down.weight"}
    created = CreatedTensor("new", (8, 4), "F16", name, 0.5, ((0, 1.0), (4, -1.0)))
    pairs = {
        "general.name": packed_pair("general.name", GGUFValueType.STRING, "a longer name"),
        "llama.windows": packed_pair("llama.windows", GGUFValueType.BOOL, [True, False, True]),
    }
    edit = rank_one(name, (64, 160), 0.1, base.read(name))
    renamed["new"] = name
    reports = patch(
        base,
        {name: [edit]},
        output,
        edited_type=F16,
        created=[created],
        renamed=renamed,
        pairs=pairs,
    )
    patched = GGUFFile.open(output)
    touched = {name, "new"}
    untouched = compare(base, patched, touched, renamed, pairs)
    assert set(untouched) == patched.tensors.keys() - {renamed[one] for one in touched}
    order = list(LAYOUT)
    order.insert(order.index(name) + 1, "new")
    assert list(patched.tensors) == [renamed.get(one, one) for one in order]
    assert [one.name for one in reports] == ["blk.2.ffn_down.weight", name]
    wanted = torch.full((8, 4), 0.5)
    wanted[range(4), range(4)], wanted[range(4, 8), range(4)] = 1.0, -1.0
    assert torch.equal(patched.read(name), wanted)
    assert stored(patched, "blk.3.ffn_down.weight") == stored(base, "blk.2.ffn_down.weight")
    assert patched.metadata["general.name"] == "a longer name"
    assert patched.array("llama.windows") == [True, False, True]
    for wrong in ({}, {**renamed, "blk.0.ffn_down.weight": "blk.9.ffn_down.weight"}):
        with pytest.raises(VerificationError, match="lost the tensor"):
            compare(base, patched, touched, wrong, pairs)
    with pytest.raises(VerificationError, match=r"metadata of 'general\.name' changed"):
        compare(base, patched, touched, renamed)


def test_untouched_tensors_and_metadata_stay_byte_for_byte(base: GGUFFile, tmp_path: Path) -> None:
    name = "blk.0.ffn_down.weight"
    output = tmp_path / "out.gguf"
    added = {"bake.recipe": "steps:\n  - größer", "bake.version": ""}
    pairs = {key: packed_pair(key, GGUFValueType.STRING, text) for key, text in added.items()}
    edit = rank_one(name, (64, 160), 0.1, base.read(name))
    patch(base, {name: [edit]}, output, edited_type=F16, pairs=pairs)
    patched = GGUFFile.open(output)
    for other in LAYOUT:
        if other != name:
            assert stored(patched, other) == stored(base, other)
            assert patched.tensors[other].type == base.tensors[other].type
    assert patched.metadata == {**base.metadata, **added}
    first, second = base.metadata_range, patched.metadata_range
    assert second.nbytes > first.nbytes
    kept = slice(first.start, first.start + first.nbytes)
    assert output.read_bytes()[kept] == base.path.read_bytes()[kept]


@pytest.mark.parametrize("kind", WRITABLE_TYPES)
def test_what_an_edited_tensor_is_written_as(
    base: GGUFFile, tmp_path: Path, kind: GGMLQuantizationType
) -> None:
    edits: dict[str, list[Edit]] = {
        name: [RemoveSubspace(name, basis(shape[0]))]
        for name, (shape, _) in LAYOUT.items()
        if len(shape) == 2
    }
    edits["output_norm.weight"] = [AddVector("output_norm.weight", torch.ones(63))]
    output = tmp_path / "out.gguf"
    reports = {each.name: each for each in patch(base, edits, output, edited_type=kind)}
    patched = GGUFFile.open(output)
    for name in edits:
        own = LAYOUT[name][1]
        expected = own if own in (F32, F16, BF16) else kind
        assert patched.tensors[name].type == expected == reports[name].written_type
        assert reports[name].base_type == own
        # What is read back is the composed edit, cast once to the type that was written.
        edited = apply_all(edits[name], base.read(name))
        cast = dequantize(quantize(edited.numpy(), expected), expected)
        assert np.array_equal(patched.read(name).numpy(), cast), name
    bounds = {F32: 1e-6, F16: 1e-3, BF16: 8e-3, Q8_0: 2e-2}
    for name, report in reports.items():
        assert report.residual <= bounds[report.written_type], name
        assert report.surviving_share == pytest.approx(1, abs=3e-2), name


def test_a_small_edit_of_a_4_bit_tensor_survives_in_8_bits_only(
    base: GGUFFile, tmp_path: Path
) -> None:
    name = "blk.2.ffn_down.weight"
    weight = base.read(name)
    edit = rank_one(name, (256, 512), 0.005, weight)
    (report,) = patch(base, {name: [edit]}, tmp_path / "out.gguf", edited_type=Q8_0)
    assert report.base_type == Q4_1
    assert report.written_type == Q8_0
    assert 0.98 < report.surviving_share < 1.02
    # The same edit in the base's own type: its weights lie on the lattice of 4 bits,
    # and what moves them by less than half a step is rounded away.
    wanted = edit.left @ edit.right
    again = torch.from_numpy(dequantize(quantize((weight + wanted).numpy(), Q4_1), Q4_1))
    kept = float(((again - weight) * wanted).sum() / (wanted * wanted).sum())
    assert kept < 0.2


def test_an_edit_below_the_precision_of_the_type_is_reported_lost(
    base: GGUFFile, tmp_path: Path
) -> None:
    name = "blk.1.ffn_down.weight"
    edit = rank_one(name, (64, 160), 1e-6, base.read(name))
    (report,) = patch(base, {name: [edit]}, tmp_path / "out.gguf", edited_type=F16)
    assert report.written_type == BF16
    assert report.surviving_share == pytest.approx(0, abs=0.05)
    assert report.noise == pytest.approx(1, abs=0.05)


def test_composed_edits_are_each_measured(base: GGUFFile, tmp_path: Path) -> None:
    name = "blk.1.attn_output.weight"
    # The second edit writes the direction that the first one removed: on the tensor as
    # written the first promise is void, yet both were kept when they were made.
    edits: list[Edit] = [
        RemoveSubspace(name, basis(64, 2)),
        LowRank(name, basis(64, 2)[:, :1], torch.ones(1, 64)),
    ]
    output = tmp_path / "out.gguf"
    (report,) = patch(base, {name: edits}, output, edited_type=Q8_0)
    assert report.residual < 1e-6
    assert edits[0].residual(base.read(name), GGUFFile.open(output).read(name)) > 0.5


def test_norms_are_kept_in_8_bits(base: GGUFFile, tmp_path: Path) -> None:
    name = "blk.2.ffn_down.weight"
    before, edit = base.read(name), RemoveKeepingNorms(name, basis(256))
    (report,) = patch(base, {name: [edit]}, tmp_path / "out.gguf", edited_type=Q8_0)
    after = GGUFFile.open(tmp_path / "out.gguf").read(name)
    assert report.residual == pytest.approx(edit.residual(before, after), rel=1e-3)
    assert report.residual < 2e-2
    norms = after.norm(dim=0) / before.norm(dim=0)
    plain = RemoveSubspace(name, basis(256)).apply(before).norm(dim=0) / before.norm(dim=0)
    assert float((norms - 1).abs().mean()) < 0.2 * float((plain - 1).abs().mean())


@pytest.mark.parametrize("name", ["blk.1.attn_output.weight", "blk.0.ffn_down.weight"])
def test_an_edit_that_finds_nothing_left_is_measured_like_the_first(
    base: GGUFFile, tmp_path: Path, name: str
) -> None:
    once = [RemoveSubspace(name, basis(64))]
    (first,) = patch(base, {name: once}, tmp_path / "once.gguf", edited_type=Q8_0)
    (second,) = patch(base, {name: 2 * once}, tmp_path / "twice.gguf", edited_type=Q8_0)
    assert second.residual == pytest.approx(first.residual, rel=0.1, abs=1e-6)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(relative=st.floats(1e-3, 10), names=st.sets(st.sampled_from(sorted(LAYOUT)), max_size=4))
def test_edits_touch_their_tensors_and_no_other(
    base: GGUFFile, tmp_path: Path, relative: float, names: set[str]
) -> None:
    output = tmp_path / "out.gguf"
    output.unlink(missing_ok=True)
    edits = {}
    for name in names:
        shape, weight = LAYOUT[name][0], base.read(name)
        edits[name] = (
            [AddVector(name, relative * torch.ones(shape))]
            if len(shape) == 1
            else [rank_one(name, shape, relative, weight)]
        )
    written: list[int] = []
    reports = patch(base, edits, output, edited_type=F32, progress=written.append)
    patched = GGUFFile.open(output)
    assert set(compare(base, patched, names)) == LAYOUT.keys() - names
    assert {report.name for report in reports} == names
    assert sum(written) == sum(tensor.nbytes for tensor in patched.tensors.values())
    for report in reports:
        assert report.surviving_share == pytest.approx(1, abs=0.06)


VECTOR = AddVector("", torch.ones(5))


def created(
    name: str,
    shape: tuple[int, ...] = (63,),
    beside: str = "output_norm.weight",
    value: float = 0.0,
) -> CreatedTensor:
    return CreatedTensor(name, shape, "F32", beside, value)


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown tensor": ({"edits": {"blk.9.ffn_down.weight": [VECTOR]}}, "'blk.9.ffn_down.weight'"),
    "unknown tensor without an edit": ({"edits": {"nothing": []}}, "'nothing'"),
    "vector of another length": (
        {"edits": {"output_norm.weight": [VECTOR]}},
        r"'output_norm.weight' \[63\] does not fit AddVector \(vector \[5\]\)",
    ),
    "matrices of another shape": (
        {"edits": {"token_embd.weight": [LowRank("", torch.ones(96, 1), torch.ones(1, 9))]}},
        r"\[96, 64\] does not fit LowRank \(left \[96, 1\], right \[1, 9\]\)",
    ),
    "edit that changes the shape": (
        {"edits": {"output_norm.weight": [AddVector("", torch.ones(2, 63))]}},
        r"the result has the shape \[2, 63\]",
    ),
    "edit that is not finite": (
        {"edits": {"output_norm.weight": [AddVector("", torch.full((63,), torch.inf))]}},
        "not finite as F32",
    ),
    "edit that overflows": (
        {"edits": {"blk.0.attn_output.weight": [AddVector("", torch.full((64,), 1e6))]}},
        "not finite as F16",
    ),
    "created tensor exists": (
        {"created": [created("output_norm.weight")]},
        "has a tensor 'output_norm.weight' already",
    ),
    "created tensor beside nothing": (
        {"created": [created("a.bias", beside="a.weight")]},
        "no tensor 'a.weight', which 'a.bias' follows",
    ),
    "created tensor not finite": ({"created": [created("a.bias", value=torch.nan)]}, "not finite"),
    "created tensor empty": ({"created": [created("a.bias", (0,))]}, r"shape \[0\]"),
    "created name too long": ({"created": [created("a" * 64)]}, "no tensor name"),
    "new name too long": ({"renamed": {"output_norm.weight": "a" * 64}}, "no tensor name"),
    "metadata key breaks the header": (
        {
            "pairs": {
                "general.alignment": packed_pair("general.alignment", GGUFValueType.STRING, "8")
            }
        },
        "type STRING",
    ),
    "type that is not written": (
        {"edited_type": GGMLQuantizationType.Q8_K},
        "Q8_K; choose auto, same, or one of f32, f16, bf16, q8_0, q6_k",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_what_is_wrong(base: GGUFFile, tmp_path: Path, case: str) -> None:
    arguments, message = REFUSALS[case]
    with pytest.raises(GGUFError, match=message) as caught:
        patch(base, output=tmp_path / "out.gguf", **{"edits": {}, "edited_type": Q8_0} | arguments)
    assert "\n" not in str(caught.value)


def test_the_output_is_never_overwritten(base: GGUFFile, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    output.write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists already"):
        patch(base, {}, output, edited_type=F16)
    assert output.read_bytes() == b"mine"
    with pytest.raises(OutputError, match="No such file"):
        patch(base, {}, tmp_path / "none" / "out.gguf", edited_type=F16)


def test_a_full_disk_is_an_output_error(base: GGUFFile, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OutputError, match="File too large"):
            patch(base, {}, output, edited_type=F16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(GGUFError):
        GGUFFile.open(output)  # The header comes last, so half an output is no GGUF.


def test_a_base_that_shrinks_is_a_gguf_error(tmp_path: Path) -> None:
    path = tmp_path / "base.gguf"
    write_gguf(path, LAYOUT, {})
    file = GGUFFile.open(path)
    os.truncate(path, file.tensors["output_norm.weight"].offset)
    with pytest.raises(GGUFError, match="became shorter"):
        patch(file, {}, tmp_path / "out.gguf", edited_type=F16)


@pytest.mark.parametrize("name", LAYOUT)
def test_compare_finds_one_changed_byte(base: GGUFFile, tmp_path: Path, name: str) -> None:
    path = tmp_path / "changed.gguf"
    content = bytearray(base.path.read_bytes())
    content[base.tensors[name].offset + base.tensors[name].nbytes - 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(VerificationError, match=name):
        compare(base, GGUFFile.open(path), set())
    assert name not in compare(base, GGUFFile.open(path), {name})


def test_compare_finds_what_else_changed(base: GGUFFile, tmp_path: Path) -> None:
    def variant(
        layout: Mapping[str, tuple[tuple[int, ...], GGMLQuantizationType]],
        keys: Mapping[str, str],
    ) -> GGUFFile:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf"
        write_gguf(path, layout, keys)
        return GGUFFile.open(path)

    name = {"general.name": "small"}
    last = {**LAYOUT, "z.weight": ((4,), F32)}
    cases = [
        (variant(LAYOUT, {"general.name": "other"}), set(), "'general.name' changed"),
        (variant(LAYOUT, {}), set(), "lost the metadata key 'general.name'"),
        (variant(last, name), set(), "not planned, 'z.weight'"),
        (variant(LAYOUT, name), {"z.weight"}, "lost the tensor 'z.weight'"),
        (
            variant({k: v for k, v in LAYOUT.items() if k != "token_embd.weight"}, name),
            {"token_embd.weight"},
            "lost the tensor 'token_embd.weight'",
        ),
        (
            variant({**LAYOUT, "output_norm.weight": ((63,), F16)}, name),
            set(),
            r"was F32 \[63\] and is F16 \[63\]",
        ),
    ]
    for patched, touched, message in cases:
        with pytest.raises(VerificationError, match=message):
            compare(base, patched, touched)
    assert len(compare(base, variant(last, name), {"z.weight"})) == len(LAYOUT)
