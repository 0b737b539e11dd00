"""The architecture table: one frozen row per `model_type`.

Rows differ by `dataclasses.replace`; nothing in bake branches on a model's name. The
facts were read in transformers 5.23 (`models/<type>/modeling_<type>.py`) and in
llama.cpp's loader (`src/models/<arch>.cpp`, commit 0c1e57098), and every row passes
the same tests through the disk (tests/test_archs.py).
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from bake.arch import Arch, BiasSlot, Block, Branch, Dense, Writer
from bake.errors import ArchitectureError
from bake.wrappers import SECTION, text_numbers, wrapped

__all__ = ["ARCHS", "find_arch"]

_EVERYWHERE = frozenset({"transformers", "llama.cpp", "ollama", "vllm", "sglang", "mlx"})
_TRANSFORMERS = frozenset({"transformers"})
_ATTENTION_BIAS = BiasSlot(
    "attention_bias",
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    _EVERYWHERE,
)
_MLP_BIAS = BiasSlot(
    "mlp_bias",
    ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    # sglang hard-codes the MLP of llama without a bias (srt/models/llama.py:101).
    _EVERYWHERE - {"sglang"},
)
_O = Writer("self_attn.o_proj")
_DOWN = Writer("mlp.down_proj")
_ATTENTION = Branch("attention", "self_attn", (_O,))
_MLP = Branch("mlp", "mlp", (_DOWN,))
_NORMS = ("input_layernorm", "post_attention_layernorm")
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.rotary_emb.inv_freq")
_QK_NORM = ("self_attn.q_norm", "self_attn.k_norm")
_GATED = ("mlp.gate_proj", "mlp.up_proj")


# Why a row has no inserted block.
_EXPERTS_IN_IT = "its MLP is a mixture of experts in every block, and no expert sees every token"
_UNGATED = "its MLP has no gate, and its writers have native biases for the vector"
_WINDOWS = ("layer_types",)
_LISTED_WINDOWS = ("attention.sliding_window_pattern", "sliding_attention")
# Blocks are mixtures of experts there, whatever config.json says (qwen3moe.cpp:40).
_NO_DENSE = tuple(
    (name, "has no dense block among mixtures of experts") for name in ("llama.cpp", "ollama")
)
_DENSE_UNREAD = tuple(
    (name, "was not read for dense blocks among mixtures of experts") for name in ("mlx", "sglang")
)
# Layers of several kinds, which these take from a layer's number (mlx_lm/models/qwen3_5.py:212,
# sglang/srt/configs/qwen3_next.py, `layers_block_type`).
_INTERVAL = tuple(
    (name, "takes a block's kind from its number (full_attention_interval)")
    for name in ("mlx", "sglang")
)
_LISTED_LINEAR = ("attention.recurrent_layers", "linear_attention")


def _slot(writer: Writer, slot: BiasSlot, *runtimes: str) -> Writer:
    """A writer with a bias slot, which only some runtimes serve if they are named."""
    return replace(writer, bias=replace(slot, runtimes=frozenset(runtimes)) if runtimes else slot)


def _with(branch: Branch, writer: Writer) -> Branch:
    return replace(branch, writers=(writer,))


# Models of the Llama kind. transformers models/llama/modeling_llama.py:158-160, 220-229.
_LLAMA = Arch(
    model_type="llama",
    gguf_architecture="llama",
    branches=(
        _with(_ATTENTION, _slot(_O, _ATTENTION_BIAS)),
        _with(_MLP, _slot(_DOWN, _MLP_BIAS)),
    ),
    readers=(*_NORMS, *_QKV, *_GATED),
    rotary=(
        ("self_attn.q_proj", "num_attention_heads"),
        ("self_attn.k_proj", "num_key_value_heads"),
    ),
    block=Block(),
)
# The next classes hard-code their writers without a bias.
_MISTRAL = replace(_LLAMA, model_type="mistral", branches=(_ATTENTION, _MLP))
_PLAIN = replace(_MISTRAL, rotary=())
# Layers from max_window_layers on have a window, where there is one (models/qwen2/
# configuration_qwen2.py:88).
_QWEN2 = replace(
    _PLAIN,
    model_type="qwen2",
    gguf_architecture="qwen2",
    block=Block(per_layer=_WINDOWS, leading=("max_window_layers",)),
)
# llama.cpp refuses a qwen3 file with attn_output.bias; vLLM and MLX have no slot for it.
_QWEN3 = replace(
    _QWEN2,
    model_type="qwen3",
    gguf_architecture="qwen3",
    branches=(
        _with(_ATTENTION, _slot(_O, _ATTENTION_BIAS, "transformers", "sglang")),
        _MLP,
    ),
    readers=(*_QWEN2.readers, *_QK_NORM),
)
# llama.cpp's graph would add both biases, but its loader never creates them (smollm3.cpp).
_SMOLLM3 = replace(
    _PLAIN,
    model_type="smollm3",
    gguf_architecture="smollm3",
    branches=(
        _with(_ATTENTION, _slot(_O, _ATTENTION_BIAS, "transformers", "vllm", "mlx")),
        _with(_MLP, _slot(_DOWN, _MLP_BIAS, "transformers", "vllm", "mlx")),
    ),
    block=Block(
        per_layer=("layer_types", "no_rope_layers"),
        unserved=tuple(
            (name, "takes every 4th block for one without rotary embedding (smollm3.cpp:5)")
            for name in ("llama.cpp", "ollama")
        ),
    ),
)
# transformers models/granite/modeling_granite.py:272, 277; sglang has no biases.
_RESIDUAL = ("residual_multiplier",)
_GRANITE = replace(
    _LLAMA,
    model_type="granite",
    embedding_scale=("embedding_multiplier",),
    gguf_architecture="granite",
    branches=(
        replace(
            _with(_ATTENTION, _slot(_O, _ATTENTION_BIAS, *(_EVERYWHERE - {"sglang"}))),
            scale=_RESIDUAL,
        ),
        replace(_LLAMA.branches[1], scale=_RESIDUAL),
    ),
)
_GEMMA = replace(
    _PLAIN,
    model_type="gemma",
    gguf_architecture="gemma",
    embedding_scale="sqrt(width)",
    branches=(
        _with(_ATTENTION, _slot(_O, _ATTENTION_BIAS, "transformers")),
        _MLP,
    ),
    block=Block(norm_offset=1.0),
)
_FUSED = Block(gate="mlp.gate_up_proj", up="mlp.gate_up_proj")
_PHI3 = replace(
    _PLAIN,
    model_type="phi3",
    gguf_architecture="phi3",
    readers=(*_NORMS, "self_attn.qkv_proj", "mlp.gate_up_proj"),
    block=_FUSED,
)
_STARCODER2 = replace(
    _PLAIN,
    model_type="starcoder2",
    gguf_architecture="starcoder2",
    branches=(_ATTENTION, _with(_MLP, Writer("mlp.c_proj"))),
    readers=(*_NORMS, *_QKV, "mlp.c_fc"),
    block=_UNGATED,
)
_STABLELM = replace(
    _PLAIN,
    model_type="stablelm",
    gguf_architecture="stablelm",
    readers=(*_PLAIN.readers, "self_attn.q_layernorm", "self_attn.k_layernorm"),
    parallel="use_parallel_residual",
    # Where attention and MLP are parallel, both read the first norm.
    block=Block(norms=_NORMS),
)
# Attention and MLP read the same norm. transformers models/cohere2/modeling_cohere2.py:300-310.
_COHERE2 = replace(
    _PLAIN,
    model_type="cohere2",
    gguf_architecture="cohere2",
    branches=(
        _with(_ATTENTION, _slot(_O, _ATTENTION_BIAS, "transformers", "mlx")),
        _MLP,
    ),
    readers=("input_layernorm", *_QKV, *_GATED),
    parallel=True,
    block=Block(
        norms=("input_layernorm",),
        per_layer=_WINDOWS,
        unserved=(("mlx", "takes a block's window from its number (models/cohere2.py:59)"),),
        listed=_LISTED_WINDOWS,
    ),
)
_COHERE = replace(
    _COHERE2,
    model_type="cohere",
    gguf_architecture="command-r",
    readers=(*_COHERE2.readers, *_QK_NORM),
    block=Block(norms=("input_layernorm",)),
)
_PHI = replace(
    _PLAIN,
    model_type="phi",
    gguf_architecture="phi2",
    branches=(
        _with(_ATTENTION, Writer("self_attn.dense")),
        _with(_MLP, Writer("mlp.fc2")),
    ),
    readers=(
        *("input_layernorm", *_QKV, "mlp.fc1"),
        *("self_attn.q_layernorm", "self_attn.k_layernorm"),
    ),
    outside=("model.embed_tokens", "model.final_layernorm", "lm_head"),
    parallel=True,
    block=_UNGATED,
)

# Post-norms: the stream receives g * y / rms(y). Gemma's gain is 1 + weight
# (models/gemma2/modeling_gemma2.py, Gemma2RMSNorm).
_GEMMA2 = replace(
    _PLAIN,
    model_type="gemma2",
    gguf_architecture="gemma2",
    embedding_scale="sqrt(width)",
    branches=(
        replace(_ATTENTION, norm="post_attention_layernorm", norm_offset=1.0),
        replace(_MLP, norm="post_feedforward_layernorm", norm_offset=1.0),
    ),
    readers=("input_layernorm", "pre_feedforward_layernorm", *_QKV, *_GATED),
    # llama.cpp scales the attention of the 27B by its 46 layers (gemma2.cpp:18-28).
    block=Block(
        norms=("pre_feedforward_layernorm",),
        norm_offset=1.0,
        activation="hidden_activation",
        per_layer=_WINDOWS,
        unserved=(("sglang", "takes a block's window from its number (models/gemma2.py:173)"),),
        listed=_LISTED_WINDOWS,
        sizes=(46,),
    ),
)
# llama.cpp scales the attention of the 27B by its 62 layers (gemma3.cpp:19-31).
_GEMMA3 = replace(
    _GEMMA2,
    model_type="gemma3_text",
    gguf_architecture="gemma3",
    readers=(*_GEMMA2.readers, *_QK_NORM),
    block=Block(
        norms=("pre_feedforward_layernorm",),
        norm_offset=1.0,
        activation="hidden_activation",
        per_layer=_WINDOWS,
        unserved=(("mlx", "takes a block's window from its number (models/gemma3_text.py:55)"),),
        listed=_LISTED_WINDOWS,
        sizes=(62,),
    ),
)
_OLMO2 = replace(
    _PLAIN,
    model_type="olmo2",
    gguf_architecture="olmo2",
    branches=(
        replace(_ATTENTION, norm="post_attention_layernorm"),
        replace(_MLP, norm="post_feedforward_layernorm"),
    ),
    readers=(*_QKV, *_QK_NORM, *_GATED),
    # There is no norm in front of the MLP.
    block=Block(norms=()),
)
_OLMO3 = replace(
    _OLMO2, model_type="olmo3", block=Block(norms=(), per_layer=_WINDOWS, listed=_LISTED_WINDOWS)
)
_GLM4 = replace(
    _PLAIN,
    model_type="glm4",
    gguf_architecture="glm4",
    branches=(
        replace(_ATTENTION, norm="post_self_attn_layernorm"),
        replace(_MLP, norm="post_mlp_layernorm"),
    ),
    readers=(*_NORMS, *_QKV, "mlp.gate_up_proj"),
    block=_FUSED,
)

# Mixtures of experts: one tensor an expert on disk, beside dense layers and shared experts.
_EXPERTS = Writer("mlp.experts.{expert}.down_proj")
_EXPERT_READERS = (
    *("mlp.gate", "mlp.experts.{expert}.gate_proj", "mlp.experts.{expert}.up_proj"),
    "mlp.gate.e_score_correction_bias",
)


def _shared(name: str) -> tuple[str, ...]:
    return (f"mlp.{name}.gate_proj", f"mlp.{name}.up_proj", f"mlp.{name}_gate")


# The first blocks are dense.
_LEADING = Block(leading=("first_k_dense_replace",))
_MIXTRAL = replace(
    _MISTRAL,
    model_type="mixtral",
    block=_EXPERTS_IN_IT,
    branches=(
        _ATTENTION,
        _with(_MLP, Writer("block_sparse_moe.experts.{expert}.w2")),
    ),
    readers=(
        *(*_NORMS, *_QKV, "block_sparse_moe.gate"),
        *("block_sparse_moe.experts.{expert}.w1", "block_sparse_moe.experts.{expert}.w3"),
    ),
)
_QWEN2_MOE = replace(
    _PLAIN,
    model_type="qwen2_moe",
    block=Block(
        dense=Dense(),
        per_layer=_WINDOWS,
        leading=("max_window_layers",),
        unserved=(*_NO_DENSE, *_DENSE_UNREAD),
    ),
    gguf_architecture="qwen2moe",
    branches=(
        _ATTENTION,
        replace(_MLP, writers=(_DOWN, _EXPERTS, Writer("mlp.shared_expert.down_proj"))),
    ),
    readers=(*_PLAIN.readers, *_EXPERT_READERS, *_shared("shared_expert")),
)
_QWEN3_MOE = replace(
    _QWEN3,
    model_type="qwen3_moe",
    block=Block(dense=Dense(), unserved=(*_NO_DENSE, *_DENSE_UNREAD)),
    gguf_architecture="qwen3moe",
    branches=(_QWEN3.branches[0], replace(_MLP, writers=(_DOWN, _EXPERTS))),
    readers=(*_QWEN3.readers, *_EXPERT_READERS),
)
_GLM4_MOE = replace(
    _PLAIN,
    model_type="glm4_moe",
    block=_LEADING,
    gguf_architecture="glm4moe",
    branches=(
        _ATTENTION,
        replace(_MLP, writers=(_DOWN, _EXPERTS, Writer("mlp.shared_experts.down_proj"))),
    ),
    readers=(*_PLAIN.readers, *_QK_NORM, *_EXPERT_READERS, *_shared("shared_experts")),
)
# transformers models/deepseek_v2/modeling_deepseek_v2.py: attention_bias acts on q_a, kv_a, o.
_DEEPSEEK_V2 = replace(
    _GLM4_MOE,
    model_type="deepseek_v2",
    block=replace(
        _LEADING,
        unserved=tuple(
            (name, "splits kv_b_proj in its files, and bake writes no such tensors")
            for name in ("llama.cpp", "ollama")
        ),
    ),
    gguf_architecture="deepseek2",
    readers=(
        *(*_NORMS, *_GATED, *_EXPERT_READERS, *_shared("shared_experts")),
        *("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.q_a_layernorm"),
        *("self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.kv_a_layernorm"),
        *("self_attn.kv_b_proj", "self_attn.rotary_emb.inv_freq"),
    ),
)
_DEEPSEEK_V3 = replace(_DEEPSEEK_V2, model_type="deepseek_v3")
# One tensor for all experts, [experts, d_out, d_in].
_GRANITEMOE = replace(
    _GRANITE,
    model_type="granitemoe",
    block=_EXPERTS_IN_IT,
    gguf_architecture="granitemoe",
    branches=(
        replace(
            _with(_ATTENTION, _slot(_O, _ATTENTION_BIAS, "transformers", "llama.cpp", "ollama")),
            scale=_RESIDUAL,
        ),
        Branch(
            "mlp",
            "block_sparse_moe",
            (Writer("block_sparse_moe.output_linear"),),
            scale=_RESIDUAL,
        ),
    ),
    readers=(
        *(*_NORMS, *_QKV),
        *("block_sparse_moe.input_linear", "block_sparse_moe.router.layer"),
    ),
)
# [experts, d_in, d_out], with biases [experts, d_out]: models/gpt_oss/modeling_gpt_oss.py.
_GPT_OSS = replace(
    _PLAIN,
    model_type="gpt_oss",
    block=_EXPERTS_IN_IT,
    gguf_architecture="gpt-oss",
    branches=(
        _ATTENTION,
        _with(_MLP, Writer("mlp.experts.down_proj", -1, suffixes=("", "_bias"))),
    ),
    readers=(
        *(*_NORMS, *_QKV, "self_attn.sinks", "mlp.router"),
        *("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj_bias"),
    ),
)

# Blocks of several kinds: a layer has the mixer whose tensors it holds.
_LINEAR = Branch("attention", "linear_attn", (Writer("linear_attn.out_proj"),))
_TILED = _with(
    _LINEAR,
    Writer("linear_attn.out_proj", tiled=("linear_num_key_heads", "linear_num_value_heads")),
)
_QWEN3_NEXT = replace(
    _QWEN2_MOE,
    model_type="qwen3_next",
    block=Block(
        dense=Dense(), norm_offset=1.0, per_layer=_WINDOWS, unserved=(*_NO_DENSE, *_INTERVAL)
    ),
    gguf_architecture="qwen3next",
    branches=(_ATTENTION, _LINEAR, _QWEN2_MOE.branches[1]),
    readers=(
        *(*_QWEN2_MOE.readers, *_QK_NORM, "linear_attn.norm", "linear_attn.conv1d"),
        *("linear_attn.A_log", "linear_attn.dt_bias"),
        *("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"),
        *("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
        *("linear_attn.in_proj_a", "linear_attn.in_proj_b"),
    ),
    ignored=r"mtp\.",
)
# Published files have one tensor for all experts, [experts, d_out, d_in], as the class has.
_QWEN3_5_MOE = replace(
    _QWEN3_NEXT,
    model_type="qwen3_5_moe_text",
    block=_EXPERTS_IN_IT,
    gguf_architecture="qwen35moe",
    branches=(
        *(_ATTENTION, _TILED),
        replace(
            _QWEN3_NEXT.branches[2],
            writers=(
                *_QWEN3_NEXT.branches[2].writers,
                Writer("mlp.experts.down_proj", suffixes=("", "_bias")),
            ),
        ),
    ),
    readers=(*_QWEN3_NEXT.readers, "mlp.experts.gate_up_proj"),
)
_QWEN3_5 = replace(
    _QWEN3_NEXT,
    model_type="qwen3_5_text",
    block=Block(norm_offset=1.0, per_layer=_WINDOWS, unserved=_INTERVAL, listed=_LISTED_LINEAR),
    gguf_architecture="qwen35",
    branches=(_ATTENTION, _TILED, _MLP),
)
# transformers models/falcon_h1/modeling_falcon_h1.py:836-840, 921, 932. llama.cpp's converter
# multiplies the weights, the embedding too (conversion/falcon_h1.py, `modify_tensors`); its
# graph drops attn_output.bias.
_FALCON_H1 = replace(
    _PLAIN,
    model_type="falcon_h1",
    # Every block has both mixers.
    block=Block(
        gate="feed_forward.gate_proj",
        up="feed_forward.up_proj",
        norms=("pre_ff_layernorm",),
        gate_scale=("mlp_multipliers", 0),
    ),
    gguf_architecture="falcon-h1",
    embedding_scale=("embedding_multiplier",),
    embedding_folded=True,
    branches=(
        replace(
            _with(_ATTENTION, _slot(_O, _ATTENTION_BIAS, "transformers", "mlx")),
            scale=("attention_out_multiplier",),
            folded=True,
        ),
        Branch(
            "attention",
            "mamba",
            (Writer("mamba.out_proj"),),
            scale=("ssm_out_multiplier",),
            folded=True,
        ),
        Branch(
            "mlp",
            "feed_forward",
            (
                Writer(
                    "feed_forward.down_proj",
                    bias=BiasSlot(
                        "mlp_bias",
                        (
                            *("feed_forward.gate_proj", "feed_forward.up_proj"),
                            "feed_forward.down_proj",
                        ),
                        frozenset({"transformers", "llama.cpp", "ollama", "mlx"}),
                    ),
                ),
            ),
            scale=("mlp_multipliers", 1),
            folded=True,
        ),
    ),
    readers=(
        *("input_layernorm", "pre_ff_layernorm", *_QKV),
        *("feed_forward.gate_proj", "feed_forward.up_proj"),
        *("mamba.A_log", "mamba.D", "mamba.dt_bias", "mamba.conv1d", "mamba.in_proj", "mamba.norm"),
    ),
    outside=("model.embed_tokens", "model.final_layernorm", "lm_head"),
)
_LFM2 = replace(
    _PLAIN,
    model_type="lfm2",
    # MLX reads full_attn_idxs, the others layer_types; llama.cpp the heads of each layer.
    block=Block(
        gate="feed_forward.w1",
        up="feed_forward.w3",
        norms=("ffn_norm",),
        activation=None,
        per_layer=_WINDOWS,
        indices=("full_attn_idxs",),
    ),
    gguf_architecture="lfm2",
    branches=(
        _with(_ATTENTION, Writer("self_attn.out_proj")),
        Branch("attention", "conv", (Writer("conv.out_proj"),)),
        Branch("mlp", "feed_forward", (Writer("feed_forward.w2"),)),
    ),
    readers=(
        *("operator_norm", "ffn_norm", *_QKV),
        *("self_attn.q_layernorm", "self_attn.k_layernorm", "conv.conv", "conv.in_proj"),
        *("feed_forward.w1", "feed_forward.w3"),
    ),
    outside=("model.embed_tokens", "model.embedding_norm", "lm_head"),
)

# The elders. Every linear layer has a bias.
_GPT_NEOX = Arch(
    model_type="gpt_neox",
    block=_UNGATED,
    gguf_architecture="gptneox",
    branches=(
        Branch("attention", "attention", (Writer("attention.dense"),)),
        Branch("mlp", "mlp", (Writer("mlp.dense_4h_to_h"),)),
    ),
    readers=(
        *(*_NORMS, "attention.query_key_value", "mlp.dense_h_to_4h"),
        *("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
    ),
    layer="gpt_neox.layers.{layer}",
    embeddings=("gpt_neox.embed_in",),
    outside=("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out"),
    unembeddings=("embed_out",),
    parallel="use_parallel_residual",
)
# Conv1D: [d_in, d_out].
_GPT2 = Arch(
    model_type="gpt2",
    block=_UNGATED,
    gguf_architecture="gpt2",
    branches=(
        Branch("attention", "attn", (Writer("attn.c_proj", -1),)),
        Branch("mlp", "mlp", (Writer("mlp.c_proj", -1),)),
    ),
    readers=("ln_1", "ln_2", "attn.c_attn", "mlp.c_fc", "attn.bias", "attn.masked_bias"),
    layer="transformer.h.{layer}",
    embeddings=("transformer.wte", "transformer.wpe"),
    outside=("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"),
    layers_key="n_layer",
    width_key="n_embd",
)

ARCHS: Mapping[str, Arch] = {
    row.model_type: row
    for row in (
        _LLAMA,
        _MISTRAL,
        replace(_MISTRAL, model_type="ministral", block=Block(per_layer=_WINDOWS)),
        replace(_MISTRAL, model_type="ministral3", gguf_architecture="mistral3"),
        _MIXTRAL,
        _QWEN2,
        _QWEN2_MOE,
        _QWEN3,
        _QWEN3_MOE,
        _QWEN3_NEXT,
        _QWEN3_5,
        _QWEN3_5_MOE,
        _SMOLLM3,
        _GEMMA,
        _GEMMA2,
        _GEMMA3,
        _PHI,
        _PHI3,
        _GPT_OSS,
        _GLM4,
        _GLM4_MOE,
        _DEEPSEEK_V2,
        _DEEPSEEK_V3,
        _OLMO2,
        _OLMO3,
        _GRANITE,
        _GRANITEMOE,
        _COHERE,
        _COHERE2,
        _STABLELM,
        _STARCODER2,
        _GPT_NEOX,
        _GPT2,
        _FALCON_H1,
        _LFM2,
    )
}
# Streams that are not a plain sum, or that have writers which no row describes.
REFUSED: Mapping[str, str] = {
    "gemma4_text": "its blocks also write per-layer inputs and scale the whole stream "
    "(models/gemma4/modeling_gemma4.py:1391-1424)",
    "deepseek_v4": "its blocks mix several streams (hyper-connections)",
    "qwen4_exp_text": "its blocks mix several streams (hyper-connections)",
}


def find_arch(config: Mapping[str, object], where: str, names: Iterable[str] = ()) -> Arch:
    """The row for a config.json, read from `where`.

    The tensors' `names` show whether they have their prefix. For a multimodal checkpoint,
    which is known by its text_config, it is the row of the text model inside, at the place
    that they show. Raises ArchitectureError when the `model_type` is outside the table.
    """
    model_type = config.get("model_type")
    if model_type in ARCHS or not isinstance(config.get(SECTION), dict):
        return _row(model_type, where).without_prefix(names)
    numbers = text_numbers(config, where)
    row = _row(numbers.get("model_type"), f"{where}: {SECTION}")
    return wrapped(row, numbers, names, where)


def _row(model_type: object, where: str) -> Arch:
    if isinstance(model_type, str) and model_type in REFUSED:
        raise ArchitectureError(f"{where}: model_type '{model_type}': {REFUSED[model_type]}")
    if not isinstance(model_type, str) or model_type not in ARCHS:
        raise ArchitectureError(
            f"{where}: model_type {model_type!r} is not in bake's table; "
            f"it has {', '.join(sorted(ARCHS))}"
        )
    return ARCHS[model_type]
