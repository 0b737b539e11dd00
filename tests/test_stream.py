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
    hashes = write_checkpoint(checkpoint, {}, (), {}, output)
    names = sorted(path.name for path in base.iterdir())
    assert sorted(hashes) == names == sorted(path.name for path in output.iterdir())
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


def test_an_edit_of_a_missing_tensor_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    edit = LowRank("model.nowhere", torch.ones(1, 1), torch.ones(1, 1))
    with pytest.raises(CheckpointError, match=r"model\.nowhere"):
        write_checkpoint(Checkpoint.open(tiny_llama), {"model.nowhere": [edit]}, (), {}, tmp_path)
