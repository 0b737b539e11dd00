"""Tiny random models, built from transformers' own config classes and saved to disk."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import AutoModelForCausalLM, AutoModelForMultimodalLM

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    # As wide as the stream, so that an axis taken by shape would go unnoticed.
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
_HEADS = {"head_dim": 8}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
_LINEAR = _HEADS | {
    # Three linear layers and a full one.
    "num_hidden_layers": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# The first layer is dense.
_GROUPED = _EXPERTS | {
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_LATENT = _GROUPED | {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
# Multipliers other than 1, so that a row that forgets one fails.
_GRANITE = {"residual_multiplier": 0.4, "embedding_multiplier": 1.5, "logits_scaling": 2.0}
TINY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "ministral": _HEADS | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "ministral3": _HEADS
    | {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 4,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        }
    },
    "mixtral": _EXPERTS,
    "qwen2": {},
    "qwen2_moe": _EXPERTS,
    "qwen3": _HEADS,
    "qwen3_moe": _HEADS | _EXPERTS,
    "qwen3_next": _LINEAR | _EXPERTS,
    "qwen3_5_text": _LINEAR,
    "qwen3_5_moe_text": _LINEAR | _EXPERTS,
    "smollm3": {},
    "gemma": _HEADS,
    "gemma2": _HEADS,
    "gemma3_text": _HEADS,
    "phi": {},
    "phi3": {},
    "gpt_oss": _HEADS | _EXPERTS,
    "glm4": _HEADS,
    "glm4_moe": _HEADS | _GROUPED,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "olmo2": {},
    "olmo3": {},
    "granite": _GRANITE,
    "granitemoe": _GRANITE | _EXPERTS,
    "cohere": {},
    "cohere2": {},
    "stablelm": {},
    "starcoder2": {},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 32},
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_expand": 1,
        "mamba_chunk_size": 8,
        "embedding_multiplier": 1.7,
        "attention_out_multiplier": 0.6,
        "ssm_out_multiplier": 0.7,
        "mlp_multipliers": [0.9, 0.5],
    },
    "lfm2": {"full_attn_idxs": [1], "block_ff_dim": 32, "block_auto_adjust_ff_dim": False},
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION = {
    "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "temporal_patch_size": 1,
        "num_position_embeddings": 4,
    }
}
# Multimodal wrappers: the model type of the text model, and what else the config needs.
WRAPPERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": (
        "gemma3_text",
        {
            "vision_config": {"model_type": "siglip_vision_model"} | _VISION,
            "mm_tokens_per_image": 4,
        },
    ),
    "mistral3": (
        "mistral",
        {"vision_config": {"model_type": "pixtral", "head_dim": 8} | _VISION},
    ),
    "llava": ("llama", {"vision_config": {"model_type": "clip_vision_model"} | _VISION}),
    "qwen3_5": ("qwen3_5_text", _QWEN_VISION),
    "qwen3_5_moe": ("qwen3_5_moe_text", _QWEN_VISION),
    "idefics3": ("llama", {"vision_config": _VISION}),
    # Its vision tower has blocks with a self_attn.out_proj too.
    "lfm2_vl": ("lfm2", {"vision_config": {"model_type": "siglip2_vision_model"} | _VISION}),
    "granite_speech": (
        "granite",
        {
            "encoder_config": {"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "dim_head": 8},
            "projector_config": {
                "model_type": "blip_2_qformer",
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 16,
                "encoder_hidden_size": 16,
            },
            "has_lora_adapter": False,
        },
    ),
    "qwen2_audio": (
        "qwen2",
        {
            "audio_config": {
                "d_model": 16,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 16,
            }
        },
    ),
}
TEMPLATE = (
    "{% for message in messages %}<s> {{ message.role }} {{ message.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def write_tiny(
    model_type: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    shard: str = "5GB",
    **changes: Any,
) -> None:
    """Save a tiny random model with a tokenizer of 96 words."""
    sizes = SIZES | TINY[model_type] | changes
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**sizes))
    _draw(model)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(folder)


def write_place(folder: Path, recipe: str, roles: Iterable[str]) -> Path:
    """A folder with a tiny llama, a file of prompts for each role, and `recipe.yaml`."""
    write_tiny("llama", folder / "model")
    for number, role in enumerate(roles):
        lines = [f"w{20 * number + i} w{90 - i} w{number}" for i in range(18)]
        (folder / f"{role}.txt").write_text("\n".join(lines))
    (folder / "recipe.yaml").write_text(recipe)
    return folder


def write_wrapper(
    model_type: str, folder: Path, rename: Callable[[str], str] = str, **changes: Any
) -> None:
    """Save a tiny random wrapper whole, its tensors renamed; `changes` are of its text model."""
    text, others = WRAPPERS[model_type]
    inner = SIZES | TINY[text] | {"model_type": text} | changes
    torch.manual_seed(0)
    tied = inner["tie_word_embeddings"]
    config = CONFIG_MAPPING[model_type](text_config=inner, tie_word_embeddings=tied, **others)
    model = AutoModelForMultimodalLM.from_config(config)
    _draw(model)
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    write_tokenizer(folder)


def _draw(model: torch.nn.Module) -> None:
    with torch.no_grad():
        # The default initialisation is so small that every edit would look exact.
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3) if parameter.ndim > 1 else parameter.uniform_(0.5, 1.5)


def write_tokenizer(folder: Path, template: str | None = TEMPLATE) -> None:
    """Save the tokenizer of 96 words with a chat template."""
    _tokenizer(["<unk>", "<s>", "</s>", "user", "assistant"], template).save_pretrained(folder)


def _tokenizer(special: Iterable[str], template: str | None) -> PreTrainedTokenizerFast:
    words = [*special, *(f"w{number}" for number in range(91))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        chat_template=template,
    )
