"""Tiny random models, built from transformers' own config classes and saved to disk."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

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
TINY: dict[str, Any] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
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
    sizes = SIZES | changes
    if model_type == "qwen3":
        sizes = {"head_dim": 8, **sizes}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TINY[model_type](**sizes))
    with torch.no_grad():
        # The default initialisation is so small that every edit would look exact.
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3) if parameter.ndim > 1 else parameter.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    _tokenizer(["<unk>", "<s>", "</s>", "user", "assistant"]).save_pretrained(folder)


def _tokenizer(special: Iterable[str]) -> PreTrainedTokenizerFast:
    words = [*special, *(f"w{number}" for number in range(91))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )
