"""Quantised checkpoints: refused in one line, but FP8, whose edited tensors leave FP8."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import (
    Fp8Dequantize,
    FP8Linear,
    replace_with_fp8_linear,
)
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from bake.archs import find_arch
from bake.checkpoint import Checkpoint
from bake.errors import ArchitectureError, CheckpointError, VerificationError
from bake.hooks import steered
from bake.model import LiveModel
from bake.plan import make_plan
from bake.quantised import dequantised
from bake.recipe import Recipe
from bake.verify import Divergence, check_files
from tests.through_disk import BATCH, baked, drawn, interventions, recipe_of
from tests.tiny import write_tiny

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ = {"quant_method": "awq", "bits": 4, "version": "gemm"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
DOWN = "model.layers.1.mlp.down_proj"
EXPERTS = "model.layers.0.mlp.experts.down_proj"


def write_headers(folder: Path, config: Mapping[str, object], *names: str) -> Path:
    save_file({name: torch.zeros(2, 2) for name in names}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | dict(config)))
    return folder


@pytest.mark.parametrize(
    ("config", "tensor", "named", "remedy"),
    [
        ({"quantization_config": GPTQ}, f"{DOWN}.qweight", "'gptq'", "quantise what bake writes"),
        ({"quantization_config": AWQ}, f"{DOWN}.qweight", "'awq'", "quantise what bake writes"),
        ({"quantization_config": BNB}, f"{DOWN}.weight.absmax", "'bitsandbytes'", "load_in_4bit"),
        (
            {"quantization_config": PACKED},
            *(f"{DOWN}.weight_packed", "'compressed-tensors'", "quantise what bake writes"),
        ),
        (
            {"compression_config": PACKED},
            *(f"{DOWN}.weight_packed", r"compression_config\.quant_method", "quantise what bake"),
        ),
        (
            {"quantization_config": MXFP4},
            *(f"{EXPERTS}_blocks", "'mxfp4'", r"Mxfp4Config\(dequantize=True\)"),
        ),
        ({"quantization_config": {}}, f"{DOWN}.weight", "'unknown'", "quantise what bake writes"),
        ({}, f"{DOWN}.qweight", rf"{DOWN}\.qweight is a part", "quantise what bake writes"),
        ({}, f"{DOWN}.weight_scale_inv", r"there is no quantization_config", "unquantised"),
        (
            {"text_config": {"quantization_config": GPTQ}},
            *(f"{DOWN}.weight", r"text_config\.quantization_config", "quantise what bake writes"),
        ),
        (
            {"quantization_config": FP8 | {"scale_fmt": "ue8m0"}},
            *(f"{DOWN}.weight", r"quantization_config\.scale_fmt: is 'ue8m0'", "bfloat16 copy"),
        ),
        (
            {"quantization_config": FP8 | {"expert_dtype": "fp4"}},
            *(f"{DOWN}.weight", r"quantization_config\.expert_dtype: is 'fp4'", "bfloat16 copy"),
        ),
        (
            {"quantization_config": FP8 | {"fmt": "e5m2"}},
            *(f"{DOWN}.weight", r"quantization_config\.fmt: is 'e5m2'", "bfloat16 copy"),
        ),
        (
            {"quantization_config": FP8 | {"weight_block_size": [128]}},
            *(f"{DOWN}.weight", r"weight_block_size: expected two", r"found \[128\]"),
        ),
    ],
    ids=str,
)
def test_what_cannot_be_edited_is_one_line(
    tmp_path: Path, config: dict[str, object], tensor: str, named: str, remedy: str
) -> None:
    folder = write_headers(tmp_path, config, tensor)
    with pytest.raises(CheckpointError, match=f"config.json: .*{named}.*{remedy}") as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "mxfp4"])
def test_a_packed_tensor_is_named(tmp_path: Path, method: str) -> None:
    folder = write_headers(
        tmp_path, {"quantization_config": {"quant_method": method}}, f"{DOWN}.weight_packed"
    )
    with pytest.raises(CheckpointError, match=rf"as in {DOWN}\.weight_packed; "):
        Checkpoint.open(folder)


def quantise(weight: Tensor, block: int | None) -> tuple[Tensor, Tensor]:
    """FP8 values and their scales: one a block of block x block, or one in all."""
    blocks = weight.float()[None, :, None, :]
    if block:
        rows, columns = (length // block for length in weight.shape)
        blocks = weight.float().view(rows, block, columns, block)
    scale = blocks.abs().amax((1, 3)) / 448
    values = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).view(weight.shape)
    return values, scale if block else scale.reshape(())


def write_fp8(folder: Path, model_type: str = "llama", block: int | None = 16, **more: Any) -> None:
    """A tiny checkpoint whose projections are in FP8, as DeepSeek's and Qwen's files are."""
    write_tiny(model_type, folder, dtype=torch.bfloat16, **more)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            tensors[name], tensors[f"{name}_scale_inv"] = quantise(tensors[name], block)
            if block is None:
                static = name.removesuffix(".weight") + ".activation_scale"
                tensors[static] = torch.tensor(0.02)
        save_file(tensors, file, {"format": "pt"})
    write_index(folder)
    scheme = {"weight_block_size": block and [block, block]}
    scheme |= {"activation_scheme": "dynamic" if block else "static"}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = FP8 | scheme
    (folder / "config.json").write_text(json.dumps(config))


def write_index(folder: Path) -> None:
    """Write the index of a sharded checkpoint anew."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
        sizes = (one.nbytes for found in files.values() for one in found.values())
        content = {
            "metadata": {"total_size": sum(sizes)},
            "weight_map": {name: file for file, found in files.items() for name in found},
        }
        index.write_text(json.dumps(content))


def fp8_modules(folder: Path) -> set[str]:
    """The modules that transformers puts in FP8 on a graphics card."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    chosen = FineGrainedFP8Config.from_dict(dict(config.quantization_config))
    skipped = FineGrainedFP8HfQuantizer.get_modules_to_not_convert(
        empty, chosen.modules_to_not_convert, empty._keep_in_fp32_modules
    )
    replace_with_fp8_linear(empty, skipped, chosen, pre_quantized=True)
    return {name for name, one in empty.named_modules() if isinstance(one, FP8Linear)}


def everything() -> Recipe:
    """Every operator, and the biases that a switch creates beside weights in FP8."""
    return recipe_of(
        {"op": "gate", "layers": [0], "sites": ["attention"], "strength": 4.0},
        {"op": "ablate", "layers": [1]},
        {"op": "add", "layer": 2, "strength": 2.0, "carrier": "bias"},
    )


@pytest.mark.parametrize(
    ("block", "more"),
    [(16, {}), (None, {}), (16, {"shard": "20KB"})],
    ids=["blocks", "one scale", "shards"],
)
def test_edited_weights_leave_fp8_and_stock_classes_load_the_rest(
    tmp_path: Path, block: int | None, more: dict[str, Any]
) -> None:
    folder, output = tmp_path / "base", tmp_path / "out"
    write_fp8(folder, block=block, **more)
    base = Checkpoint.open(folder)
    arch = find_arch(base.config, "config.json", base.tensors)
    recipe = everything()
    plan = make_plan(recipe, base, arch)
    assert "what is edited or inserted is written in BF16" in plan.table()
    baked(base, arch, recipe, output)

    model, after = (LiveModel.load(one, arch, torch.float32) for one in (folder, output))
    before = model.logits(BATCH)
    with steered(model, interventions(base, arch, recipe)):
        hooked = model.logits(BATCH)
    total = Divergence()
    total.add(*(one.flatten(0, 1) for one in (before, hooked, after.logits(BATCH))))
    assert total.effect > 1
    assert total.lost_share < recipe.verify.lost_share

    written = {
        name: one for file in output.glob("*.safetensors") for name, one in load_file(file).items()
    }
    edited = {edit.tensor for edit in plan.edits if edit.tensor.endswith("weight")}
    assert edited == {
        *(f"model.layers.{one}.self_attn.o_proj.weight" for one in (0, 1)),
        f"{DOWN}.weight",
    }
    for name, one in written.items():
        if name.endswith("_proj.weight"):
            assert one.dtype == (torch.bfloat16 if name in edited else torch.float8_e4m3fn)
            assert (f"{name}_scale_inv" in written) == (name not in edited)
            static = name.removesuffix(".weight") + ".activation_scale"
            assert (static in written) == (name not in edited and block is None)
    index = output / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        assert set(content["weight_map"]) == set(written)
        assert content["metadata"]["total_size"] == sum(one.nbytes for one in written.values())

    # On a graphics card transformers puts FP8 modules where these weights are, and only there.
    assert fp8_modules(output) == {
        name.removesuffix(".weight") for name, one in written.items() if one.dtype.itemsize == 1
    }


@pytest.mark.parametrize("listed", [None, "modules_to_not_convert", "ignored_layers"])
def test_a_block_beside_weights_in_fp8(tmp_path: Path, listed: str | None) -> None:
    """The block is in BF16, the blocks behind keep FP8 and their scales under their new names."""
    folder, output = tmp_path / "base", tmp_path / "out"
    write_fp8(folder, intermediate_size=80, shard="20KB")
    alone = "model.layers.2.self_attn.q_proj"
    if listed:
        leave_fp8(folder, f"{alone}.weight")
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"][listed] = ["lm_head", alone, "model.layers.*.mlp.gate"]
        (folder / "config.json").write_text(json.dumps(config))
    base = Checkpoint.open(folder)
    arch = find_arch(base.config, "config.json", base.tensors)
    recipe = recipe_of(
        {"op": "ablate", "layers": [2]},
        {"op": "add", "layer": 1, "strength": 2.0, "carrier": "block"},
    )
    model = LiveModel.load(folder, arch, torch.float32)
    before = model.logits(BATCH)
    with steered(model, interventions(base, arch, recipe)):
        hooked = model.logits(BATCH)
    baked(base, arch, recipe, output)
    after = LiveModel.load(output, arch, torch.float32).logits(BATCH)
    total = Divergence()
    total.add(*(one.flatten(0, 1) for one in (before, hooked, after)))
    assert total.lost_share < recipe.verify.lost_share

    written = {
        name: one for file in output.glob("*.safetensors") for name, one in load_file(file).items()
    }
    moved = "model.layers.3"
    plain = {f"{moved}.self_attn.o_proj", f"{moved}.mlp.down_proj"} | (
        {f"{moved}.self_attn.q_proj"} if listed else set()
    )
    halves = {
        name.removesuffix(".weight")
        for name, one in written.items()
        if name.endswith("_proj.weight") and one.dtype == torch.bfloat16
    }
    assert {name for name in halves if not name.startswith("model.layers.2.")} == plain
    assert len(halves) == len(plain) + 7
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(written)
    assert f"{moved}.mlp.up_proj.weight_scale_inv" in written
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    if listed:
        assert config[listed][:3] == [
            *("lm_head", f"{moved}.self_attn.q_proj", "model.layers.*.mlp.gate")
        ]
    assert fp8_modules(output) == {
        name.removesuffix(".weight") for name, one in written.items() if one.dtype.itemsize == 1
    }


def test_a_module_that_the_config_names_in_its_own_way_is_not_moved(tmp_path: Path) -> None:
    write_fp8(tmp_path, intermediate_size=80)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["layers.2.mlp.gate"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = Checkpoint.open(tmp_path)
    arch = find_arch(base.config, "config.json", base.tensors)
    add = {"op": "add", "layer": 1, "strength": 2.0, "carrier": "block"}
    with pytest.raises(ArchitectureError, match=r"names layers\.2\.mlp\.gate, which is no module"):
        make_plan(recipe_of(add), base, arch)
    make_plan(recipe_of({"op": "ablate", "layers": [1]}), base, arch)


def leave_fp8(folder: Path, name: str) -> None:
    """Write one of the weights in BF16, as published files have some."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name] = dequantised(tensors[name], tensors.pop(f"{name}_scale_inv"), name)
            tensors[name] = tensors[name].bfloat16()
            save_file(tensors, file, {"format": "pt"})
    write_index(folder)


def test_a_changed_scale_is_found(tmp_path: Path) -> None:
    write_fp8(tmp_path / "base")
    base = Checkpoint.open(tmp_path / "base")
    arch = find_arch(base.config, "config.json")
    baked(base, arch, recipe_of({"op": "ablate", "layers": [1]}), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight_scale_inv"][0, 0] *= 2
    save_file(tensors, file, {"format": "pt"})
    edits = {
        edit.tensor: [edit]
        for one in interventions(base, arch, recipe_of({"op": "ablate", "layers": [1]}))
        for edit in one.edits()
    }
    with pytest.raises(VerificationError, match=r"up_proj\.weight_scale_inv differs"):
        check_files(base, Checkpoint.open(tmp_path / "out"), edits, set())


@pytest.mark.parametrize("block", [16, None])
def test_dequantised_is_what_transformers_makes_of_it(block: int | None) -> None:
    values, scale = quantise(drawn(1, 48, 32), block)
    theirs = Fp8Dequantize(None)._dequantize_one(values, scale, torch.float32)
    assert torch.equal(dequantised(values, scale, "weight"), theirs)


@pytest.mark.parametrize(
    ("shape", "scale"),
    [
        ((32, 32), drawn(2, 3, 2)),
        # Blocks of 16 of which the last has 8 are no two blocks of 12.
        ((24, 32), drawn(2, 2, 2)),
        ((32, 24), drawn(2, 2, 2)),
        ((32, 32), drawn(2, 2)),
        # Exponents, as MXFP8 has them.
        ((32, 32), torch.full((2, 2), 127, dtype=torch.uint8)),
        ((32, 32), torch.full((1, 1), 127, dtype=torch.uint8)),
    ],
)
def test_scales_that_mean_something_else_are_refused(shape: tuple[int, int], scale: Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"weight: its scale is torch\.\w+ \(.* give a bfl"):
        dequantised(drawn(1, *shape), scale, "weight")


def test_a_scale_a_row_is_read() -> None:
    weight, scale = drawn(1, 24, 40), drawn(2, 24, 1)
    assert torch.equal(dequantised(weight, scale, "weight"), weight * scale)


def test_one_expert_of_a_layer_cannot_leave_fp8(tmp_path: Path) -> None:
    write_fp8(tmp_path, "qwen3_moe")
    base = Checkpoint.open(tmp_path)
    arch = find_arch(base.config, "config.json", base.tensors)
    with pytest.raises(ArchitectureError, match=r"experts\.0\.down_proj\.weight: .* in FP8"):
        make_plan(recipe_of({"op": "ablate", "layers": [0]}), base, arch)
    make_plan(
        recipe_of({"op": "gate", "layers": [0], "sites": ["attention"], "strength": 1.0}),
        base,
        arch,
    )


def test_an_fp8_weight_without_its_scale_is_refused(tmp_path: Path) -> None:
    write_fp8(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"{DOWN}.weight_scale_inv"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{DOWN}\.weight is F8_E4M3, and there is no"):
        Checkpoint.open(tmp_path)
