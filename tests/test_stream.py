"""The write side of safetensors: bytes, layout, casts, created tensors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bake.checkpoint import Checkpoint
from bake.edits import AddVector, CreatedTensor, LowRank
from bake.errors import CheckpointError
from bake.stream import write_checkpoint
from bake.verify import check_files
from tests.tiny import write_tiny

NAME = "model.layers.1.mlp.down_proj.weight"


def rank_one(seed: int = 0, size: float = 0.1) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    left = size * torch.randn(32, 1, generator=generator)
    return LowRank(NAME, left, torch.randn(1, 32, generator=generator))


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_without_edits_every_byte_is_the_same(tmp_path: Path, shard: str) -> None:
    base, output = tmp_path / "base", tmp_path / "out"
    write_tiny("llama", base, shard=shard)
    output.mkdir()
    checkpoint = Checkpoint.open(base)
    write_checkpoint(checkpoint, {}, (), {}, output)
    names = sorted(path.name for path in base.iterdir())
    assert names == sorted(path.name for path in output.iterdir())
    for name in names:
        assert (base / name).read_bytes() == (output / name).read_bytes(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_edit_is_composed_in_float32_and_cast_once(tmp_path: Path, dtype: torch.dtype) -> None:
    base, output = tmp_path / "base", tmp_path / "out"
    write_tiny("llama", base, dtype=dtype)
    output.mkdir()
    edits = [rank_one(1, 1e-3), rank_one(2, 1e-3)]
    write_checkpoint(Checkpoint.open(base), {NAME: edits}, (), {}, output)
    before, after = load_file(base / "model.safetensors"), load_file(output / "model.safetensors")
    wanted = edits[1].apply(edits[0].apply(before[NAME].float())).to(dtype)
    assert torch.equal(after[NAME], wanted)
    for name in before.keys() - {NAME}:
        assert torch.equal(before[name], after[name])


def test_created_tensors_take_their_place_in_shard_and_index(tmp_path: Path) -> None:
    base, output = tmp_path / "base", tmp_path / "out"
    write_tiny("llama", base, shard="40KB")
    output.mkdir()
    checkpoint = Checkpoint.open(base)
    bias = NAME.replace("weight", "bias")
    created = (CreatedTensor(bias, (32,), "F32", NAME),)
    edits = {bias: [AddVector(bias, torch.arange(32.0))]}
    write_checkpoint(checkpoint, edits, created, {"mlp_bias": True}, output)
    written = Checkpoint.open(output)
    assert torch.equal(written.read(bias), torch.arange(32.0))
    assert written.find(bias).file.name == checkpoint.find(NAME).file.name
    index = json.loads((output / "model.safetensors.index.json").read_text())
    old = json.loads((base / "model.safetensors.index.json").read_text())
    assert index["weight_map"][bias] == written.find(bias).file.name
    assert index["metadata"]["total_size"] == old["metadata"]["total_size"] + 32 * 4


def test_what_is_copied_stays_in_its_place_within_blocks(tmp_path: Path) -> None:
    """So that file systems can share the blocks: new tensors come last, behind a padded header."""
    base, output = tmp_path / "base", tmp_path / "out"
    write_tiny("llama", base)
    output.mkdir()
    checkpoint = Checkpoint.open(base)
    created = (CreatedTensor(NAME.replace("weight", "bias"), (33,), "F16", NAME),)
    write_checkpoint(checkpoint, {}, created, {}, output)
    written = Checkpoint.open(output)
    moved = {written.find(name).start - info.start for name, info in checkpoint.tensors.items()}
    assert len(moved) == 1
    assert moved.pop() % 4096 == 0
    assert load_file(output / "model.safetensors").keys() == written.tensors.keys()


def test_every_type_is_copied(tmp_path: Path) -> None:
    """Those of safetensors/src/tensor.rs, some of which torch does not have."""
    sizes = {"F4": 12, "F6_E2M3": 18, "F6_E3M2": 18, "F8_E8M0": 24, "C64": 192, "BOOL": 24}
    sizes |= {"U64": 192, "U32": 96, "U16": 48, "F8_E5M2FNUZ": 24, "F8_E4M3FNUZ": 24, "I16": 48}
    header, end = {}, 0
    for dtype, size in sizes.items():
        header[dtype] = {"dtype": dtype, "shape": [4, 6], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    base, output = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    output.mkdir()
    data = len(text).to_bytes(8, "little") + text + bytes(place % 251 for place in range(end))
    (base / "model.safetensors").write_bytes(data)
    (base / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(base)
    write_checkpoint(checkpoint, {}, (), {}, output)
    assert (output / "model.safetensors").read_bytes() == data
    check_files(checkpoint, Checkpoint.open(output), {}, ())
    with pytest.raises(CheckpointError, match="torch has no tensors of F4"):
        checkpoint.read("F4")


def test_a_config_keeps_its_keys_and_their_order(tmp_path: Path) -> None:
    base, output = tmp_path / "base", tmp_path / "out"
    write_tiny("llama", base)
    config = json.loads((base / "config.json").read_text()) | {"rope_theta": 1e5, "n_ctx": 7}
    (base / "config.json").write_text(json.dumps(config))
    output.mkdir()
    write_checkpoint(Checkpoint.open(base), {}, (), {"mlp_bias": True}, output)
    written = json.loads((output / "config.json").read_text())
    assert written == config | {"mlp_bias": True}
    assert list(written) == list(config)


def test_an_edit_that_is_not_finite_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    edit = LowRank(NAME, torch.full((32, 1), 1e30), torch.full((1, 32), 1e30))
    with pytest.raises(CheckpointError, match="not finite"):
        write_checkpoint(Checkpoint.open(tiny_llama), {NAME: [edit]}, (), {}, tmp_path)


def test_an_edit_that_overflows_its_type_is_refused(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path / "base", dtype=torch.float16)
    base = Checkpoint.open(tmp_path / "base")
    (tmp_path / "out").mkdir()
    edit = LowRank(NAME, torch.full((32, 1), 300.0), torch.full((1, 32), 300.0))
    with pytest.raises(CheckpointError, match="not finite in F16"):
        write_checkpoint(base, {NAME: [edit]}, (), {}, tmp_path / "out")


def test_an_edit_of_a_missing_tensor_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    edit = LowRank("model.nowhere", torch.ones(1, 1), torch.ones(1, 1))
    with pytest.raises(CheckpointError, match=r"model\.nowhere"):
        write_checkpoint(Checkpoint.open(tiny_llama), {"model.nowhere": [edit]}, (), {}, tmp_path)
