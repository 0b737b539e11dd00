"""Tiny F32 GGUFs of the tiny checkpoints, for llama.cpp: what its converter does, no more.

The sources are llama.cpp's `conversion/<family>.py`. There is no vocabulary: ids alone.
"""

from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import AutoConfig

from bake.arch import Arch
from bake.checkpoint import Checkpoint
from bake.export.layout import patch_gguf, permuted_rows
from bake.ggml import quantised
from bake.gguf_file import GGUFFile
from bake.llama import LlamaModel
from bake.ops.add import Add
from bake.plan import make_plan
from tests.through_disk import IDS, interventions, recipe_of

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


# By the name of a file's type, as llama-quantize has it. Rows of 32 fall back from the K and IQ
# types to Q5_0, Q5_1, Q8_0 and IQ4_NL.
FILE_TYPES = {
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q6_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
    "IQ4_XS": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_XS,
}


def check_control_vector(base: Checkpoint, arch: Arch, gguf: GGUFFile) -> None:
    """A bias behind block 1, in every type of file: the logits of llama.cpp's control vector."""
    recipe = recipe_of({"op": "add", "layer": 1, "strength": 2.0, "carrier": "bias"})
    (added,) = interventions(base, arch, recipe)
    assert isinstance(added, Add)
    plan = make_plan(recipe, base, arch)
    edits = {edit.tensor: [edit] for edit in added.edits()}
    texts = IDS.tolist()
    for kind, number in FILE_TYPES.items():
        path, output = (gguf.path.with_name(f"{kind}.{what}.gguf") for what in ("base", "biased"))
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype, parameters.nthread = number, 1
        failed = llama_cpp.llama_model_quantize(
            str(gguf.path).encode(), str(path).encode(), parameters
        )
        assert not failed
        there = GGUFFile.open(path)
        patch_gguf(plan, arch, base.config, there, edits, output, edited_type="auto")
        with LlamaModel(path, context=16, parallel=1, threads=1) as model:
            before = [model.logits(ids) for ids in texts]
            vectors = torch.zeros(model.layers, model.hidden_size)
            vectors[1] = added.vector
            model.set_control_vector(vectors)
            steered = [model.logits(ids) for ids in texts]
        with LlamaModel(output, context=16, parallel=1, threads=1) as model:
            baked = [model.logits(ids) for ids in texts]
        assert np.array_equal(steered, baked), kind
        assert not np.array_equal(steered, before), kind
