"""What bake knows of each architecture: one frozen row per `model_type`.

A row names tensors as they are on disk. Rows differ by `dataclasses.replace`;
nothing in bake branches on a model's name. The facts were read in transformers
5.23 (`models/<type>/modeling_<type>.py`) and in llama.cpp's loader
(`src/models/<arch>.cpp`, commit 0c1e57098), and every row passes the same test
through the disk (tests/test_archs.py).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from bake.errors import ArchitectureError

__all__ = ["ARCHS", "Arch", "BiasSlot", "Reader", "Site", "Writer", "find_arch"]

Site = Literal["attention", "mlp"]


@dataclass(frozen=True)
class BiasSlot:
    """The config switch that gives a writer a bias, and every module that it gives one.

    The switch acts on all layers, so the siblings are written as zeros. `runtimes`
    are those that load the bias and add it; the others drop it, some of them without
    a word (vllm/model_executor/models/utils.py:457, sglang/srt/models/llama.py:757).
    """

    switch: str
    modules: tuple[str, ...]
    runtimes: frozenset[str]


@dataclass(frozen=True)
class Module:
    """A module of a decoder block: its name inside the block, and inside a GGUF's `blk.N`."""

    module: str
    gguf: str


@dataclass(frozen=True)
class Writer(Module):
    """A matrix [d_out, d_in] whose output is added to the residual stream.

    `bias` is the slot that the stock class loads and adds, if there is one.
    """

    bias: BiasSlot | None = None


@dataclass(frozen=True)
class Reader(Module):
    """Any other module of a decoder block.

    `rotary_heads` is the config key of the head count by which llama.cpp's
    converter permutes the rows (conversion/llama.py, `permute`), if it does.
    """

    rotary_heads: str | None = None


@dataclass(frozen=True)
class Arch:
    """A family of decoder-only models with a residual stream that is a plain sum."""

    model_type: str
    attention: Writer
    mlp: Writer
    readers: tuple[Reader, ...]
    gguf_architecture: str
    layer: str = "model.layers.{layer}"
    embedding: str = "model.embed_tokens"
    outside: tuple[str, ...] = ("model.embed_tokens", "model.norm", "lm_head")
    layers_key: str = "num_hidden_layers"
    width_key: str = "hidden_size"

    def writer(self, site: Site) -> Writer:
        """The block's writer at a site."""
        return self.attention if site == "attention" else self.mlp

    def module_name(self, layer: int, writer: Writer) -> str:
        """The full module name of a writer, without `.weight`."""
        return f"{self.layer.format(layer=layer)}.{writer.module}"

    def layer_count(self, config: Mapping[str, object]) -> int:
        """Number of decoder blocks, from config.json."""
        return _positive(config, self.layers_key)

    def width(self, config: Mapping[str, object]) -> int:
        """Width of the residual stream, from config.json."""
        return _positive(config, self.width_key)

    def check_layers(self, chosen: Iterable[int], config: Mapping[str, object], place: str) -> None:
        """Refuse layers that the model does not have; `place` is where the recipe names them."""
        last = self.layer_count(config) - 1
        for layer in chosen:
            if layer > last:
                raise ArchitectureError(
                    f"{place}: layer {layer} is out of range; the model has layers 0 to {last}"
                )

    def gguf_name(self, tensor: str) -> str:
        """The GGUF name of a block's weight or bias, or of the token embedding.

        Raises ArchitectureError for every other tensor.
        """
        if tensor == f"{self.embedding}.weight":
            return "token_embd.weight"
        layer, module, kind = self._parts(tensor)
        for known in self._modules():
            if known.module == module:
                return f"blk.{layer}.{known.gguf}.{kind}"
        raise ArchitectureError(f"{tensor}: no GGUF name is known for this tensor")

    def rotary_heads(self, tensor: str, config: Mapping[str, object]) -> int | None:
        """Heads by which a GGUF permutes the rows of this tensor; None when it does not."""
        module = self._parts(tensor)[1]
        for reader in self.readers:
            if reader.module == module and reader.rotary_heads:
                return _positive(config, reader.rotary_heads)
        return None

    def _modules(self) -> tuple[Module, ...]:
        return (self.attention, self.mlp, *self.readers)

    def _parts(self, tensor: str) -> tuple[str, str, str]:
        pattern = re.escape(self.layer).replace(r"\{layer\}", r"(\d+)")
        found = re.fullmatch(rf"{pattern}\.(.+)\.(weight|bias)", tensor)
        return (found[1], found[2], found[3]) if found else ("", "", "")

    def check_tensors(self, names: Iterable[str]) -> None:
        """Refuse a checkpoint that holds a tensor which the row does not explain.

        An unknown module may write to the stream; editing the known writers
        around it would be half an edit.
        """
        known = {known.module for known in self._modules()}
        outside = {f"{module}.{kind}" for module in self.outside for kind in ("weight", "bias")}
        for name in names:
            if self._parts(name)[1] not in known and name not in outside:
                raise ArchitectureError(
                    f"{name}: model_type '{self.model_type}' has no such tensor in bake's table; "
                    "the checkpoint is of a variant that bake does not know"
                )


_EVERYWHERE = frozenset({"transformers", "llama.cpp", "ollama", "vllm", "sglang", "mlx"})
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

# transformers models/llama/modeling_llama.py:158-160, 220-229; llama.cpp models/llama.cpp.
_LLAMA = Arch(
    model_type="llama",
    attention=Writer("self_attn.o_proj", "attn_output", _ATTENTION_BIAS),
    mlp=Writer("mlp.down_proj", "ffn_down", _MLP_BIAS),
    readers=(
        Reader("input_layernorm", "attn_norm"),
        Reader("self_attn.q_proj", "attn_q", rotary_heads="num_attention_heads"),
        Reader("self_attn.k_proj", "attn_k", rotary_heads="num_key_value_heads"),
        Reader("self_attn.v_proj", "attn_v"),
        Reader("post_attention_layernorm", "ffn_norm"),
        Reader("mlp.gate_proj", "ffn_gate"),
        Reader("mlp.up_proj", "ffn_up"),
    ),
    gguf_architecture="llama",
)
# The next two classes hard-code their writers without a bias.
_MISTRAL = replace(
    _LLAMA,
    model_type="mistral",
    attention=replace(_LLAMA.attention, bias=None),
    mlp=replace(_LLAMA.mlp, bias=None),
)
_QWEN2 = replace(
    _MISTRAL,
    model_type="qwen2",
    readers=tuple(replace(reader, rotary_heads=None) for reader in _MISTRAL.readers),
    gguf_architecture="qwen2",
)
# llama.cpp refuses a qwen3 file with attn_output.bias; vLLM and MLX have no slot for it.
_QWEN3 = replace(
    _QWEN2,
    model_type="qwen3",
    readers=(
        *_QWEN2.readers,
        Reader("self_attn.q_norm", "attn_q_norm"),
        Reader("self_attn.k_norm", "attn_k_norm"),
    ),
    attention=replace(
        _QWEN2.attention,
        bias=replace(_ATTENTION_BIAS, runtimes=frozenset({"transformers", "sglang"})),
    ),
    gguf_architecture="qwen3",
)

ARCHS: Mapping[str, Arch] = {row.model_type: row for row in (_LLAMA, _MISTRAL, _QWEN2, _QWEN3)}


def find_arch(config: Mapping[str, object], where: str) -> Arch:
    """The row for a config.json, read from `where`.

    Raises ArchitectureError when its `model_type` is outside the table.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHS:
        raise ArchitectureError(
            f"{where}: model_type {model_type!r} is not in bake's table; "
            f"it has {', '.join(sorted(ARCHS))}"
        )
    return ARCHS[model_type]


def _positive(config: Mapping[str, object], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ArchitectureError(f"config.json: {key} must be a positive integer, found {value!r}")
    return value
