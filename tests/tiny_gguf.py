"""Tiny F32 GGUFs of the tiny checkpoints, for llama.cpp: what its converter does, no more.

The sources are llama.cpp's `conversion/<family>.py`. There is no vocabulary: ids alone.
"""

from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import AutoConfig

from bake.arch import Arch
from bake.checkpoint import Checkpoint
from bake.export.layout import permuted_rows
from bake.ggml import quantised
from bake.gguf_file import GGUFFile

# Values of config.json that llama.cpp reads, as integers and as real numbers.
COUNTS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.sliding_window": "sliding_window",
    "vocab_size": "vocab_size",
}
NUMBERS = {
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


def write_tiny_gguf(base: Checkpoint, arch: Arch, path: Path) -> None:
    """Write every tensor in F32 under its GGUF name, and the metadata of the config."""
    config = AutoConfig.from_pretrained(base.folder)
    kind = arch.gguf_architecture
    writer = GGUFWriter(path, kind)
    writer.add_string("tokenizer.ggml.model", "none")
    for key, name in COUNTS.items():
        if getattr(config, name, None) is not None:
            writer.add_uint32(f"{kind}.{key}", getattr(config, name))
    for key, name in NUMBERS.items():
        if getattr(config, name, None) is not None:
            writer.add_float32(f"{kind}.{key}", getattr(config, name))
    # llama.cpp takes a number or a list with one a layer; the list shows whether it follows.
    heads = [config.num_key_value_heads] * config.num_hidden_layers
    writer.add_array(f"{kind}.attention.head_count_kv", heads)
    scale = getattr(config, "logits_scaling", getattr(config, "logit_scale", None))
    if scale is not None:
        writer.add_float32(f"{kind}.logit_scale", scale)
    rope = _rope(config)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for key in ("key_length", "value_length"):
        writer.add_uint32(f"{kind}.attention.{key}", width)
    rotated = int(width * rope.get("partial_rotary_factor", 1.0))
    writer.add_uint32(f"{kind}.rope.dimension_count", rotated)
    writer.add_float32(f"{kind}.rope.freq_base", rope["rope_theta"])
    for name in base.tensors:
        weight = base.read(name).float() + arch.gguf_gain(name)
        permuted = arch.rotary_heads(name, base.config)
        if permuted:
            weight = permuted_rows(weight, permuted)
        if arch.gguf_architecture.startswith("qwen35") and name.endswith(
            "linear_attn.out_proj.weight"
        ):
            # llama.cpp conversion/qwen.py, `_reorder_v_heads`, dim=1.
            keys, values = config.linear_num_key_heads, config.linear_num_value_heads
            places = torch.arange(weight.shape[1]).reshape(keys, values // keys, -1)
            weight = weight[:, places.permute(1, 0, 2).reshape(-1)]
        writer.add_tensor(arch.gguf_name(name), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _rope(config: Any) -> dict[str, Any]:
    """The rotary embedding of full attention."""
    found: dict[str, Any] = config.rope_parameters
    return found.get("full_attention", found)


def requantised(base: GGUFFile, kind: str, name: str, relative: float, output: Path) -> GGUFFile:
    """The same file with matrices in another type and the one of this name some way off."""
    writer = GGUFWriter(output, base.architecture)
    for each in base.tensors:
        weight = base.read(each)
        if each == name:
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
            weight = weight + relative * weight.norm() / noise.norm() * noise
        if weight.dim() == 2 and weight.shape[1] % 32 == 0:
            stored = GGMLQuantizationType[kind]
            writer.add_tensor(each, quantised(weight.numpy(), stored), raw_dtype=stored)
        else:
            writer.add_tensor(each, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile.open(output)
