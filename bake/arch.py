"""What an architecture is to bake: where its blocks write to the residual stream.

The rows are in `bake.archs`. Names are those on disk; `{expert}` in a name stands
for a number, one tensor an expert.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Literal

from bake.errors import ArchitectureError

__all__ = [
    "Arch",
    "Axis",
    "BiasSlot",
    "Block",
    "Branch",
    "Dense",
    "Inner",
    "PostNorm",
    "Site",
    "Writer",
    "Written",
]

Site = Literal["attention", "mlp"]
# The axis of a writer's weight that the stream has: rows of [.., d_out, d_in], or
# the last axis of GPT-2's Conv1D, of gpt-oss' experts and of embeddings.
Axis = Literal[-2, -1]


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
class Writer:
    """A matrix whose output is added to the residual stream, by its name inside a block.

    `bias` is the slot that the stock class loads and adds, if there is one. `suffixes`
    end the names of its weight and of its bias. `tiled` are the keys of config.json that count
    the key heads and the value heads by which llama.cpp's converter orders its columns anew
    (conversion/qwen.py, `_reorder_v_heads`).
    """

    module: str
    axis: Axis = -2
    bias: BiasSlot | None = None
    suffixes: tuple[str, str] = (".weight", ".bias")
    tiled: tuple[str, str] | None = None


@dataclass(frozen=True)
class Branch:
    """One sum that a block adds to the stream.

    `module` is, in memory, what returns the sum of the `writers`. Behind it may come
    a post-norm, named inside the block, whose gain is `norm_offset` + its weight; and a
    number of config.json at the path `scale`, which a `folded` GGUF has in its weights.
    """

    site: Site
    module: str
    writers: tuple[Writer, ...]
    norm: str | None = None
    norm_offset: float = 0.0
    scale: tuple[str | int, ...] = ()
    folded: bool = False

    def multiplier(self, numbers: Mapping[str, object]) -> float:
        """The number that multiplies the branch, of `Arch.numbers`; 1 where the class has none."""
        return _number(numbers, self.scale)


@dataclass(frozen=True)
class PostNorm:
    """A norm between a writer and the stream, by its full name; its gain is `offset` + weight."""

    module: str
    offset: float

    @property
    def weight(self) -> str:
        """The name of its tensor."""
        return f"{self.module}.weight"


@dataclass(frozen=True)
class Written:
    """A writer of one layer as its tensors: `bias` is None where the checkpoint has none."""

    layer: int
    branch: Branch
    writer: Writer
    weight: str
    bias: str | None

    @property
    def module(self) -> str:
        """The full module name of a plain writer."""
        return self.weight.removesuffix(".weight")


@dataclass(frozen=True)
class Dense:
    """The keys of config.json by which a mixture of experts has dense blocks too.

    `listed` has their numbers, `width` is that of their MLP, and `step` must be 1: at any
    other, blocks are dense by their number.
    """

    listed: str = "mlp_only_layers"
    width: str = "intermediate_size"
    step: str = "decoder_sparse_step"


@dataclass(frozen=True)
class Block:
    """The roles of a dense block's modules, for an inserted one that adds a constant.

    Its MLP is down(act(m gate x) * up x), where x comes through `norms`, whose gain is
    `norm_offset` + weight, or is the stream itself; `gate` and `up` may be one module with
    the gate's rows first. m is the number of config.json at the path `gate_scale`, which a
    GGUF has in the weights, 1 without one. The key `activation` of config.json names act,
    which is SiLU where there is none. `per_layer` are the keys with an entry for every layer,
    `leading` those that count layers from the first one, `indices` those that list the numbers
    of layers; in a mixture of experts the block may be dense by the keys `dense`. `unserved`
    are runtimes that would run the block or those behind it as others, each with the reason.
    llama.cpp reads from the list `listed` in the GGUF, by key and entry of `layer_types`, which
    layers are of that kind, and treats models of these `sizes`, in layers, as others.
    """

    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    norms: tuple[str, ...] = ("post_attention_layernorm",)
    norm_offset: float = 0.0
    gate_scale: tuple[str | int, ...] = ()
    activation: str | None = "hidden_act"
    per_layer: tuple[str, ...] = ()
    leading: tuple[str, ...] = ()
    indices: tuple[str, ...] = ()
    dense: Dense | None = None
    unserved: tuple[tuple[str, str], ...] = ()
    listed: tuple[str, str] | None = None
    sizes: tuple[int, ...] = ()

    def gate_multiplier(self, numbers: Mapping[str, object]) -> float:
        """The number that multiplies the gate, of `Arch.numbers`; 1 where the class has none."""
        return _number(numbers, self.gate_scale)

    def refusals(self, before: int, after: int) -> Mapping[str, str]:
        """By runtime, why it would not serve a model of `before` layers that gets `after`."""
        known = [size for size in self.sizes if size in (before, after)]
        reason = f"takes a model of {known[0]} layers for another size" if known else ""
        counted = {runtime: reason for runtime in ("llama.cpp", "ollama") if known}
        return dict(self.unserved) | counted


@dataclass(frozen=True)
class Inner:
    """The text model inside a multimodal checkpoint.

    `row` has the names that it has alone. Its part of config.json is under the key
    `section`; `numbers` are that part as its class completes it.
    """

    row: "Arch"
    section: str
    numbers: Mapping[str, object]


@dataclass(frozen=True)
class Arch:
    """A family of decoder-only models with a residual stream that is a plain sum.

    `readers` are a block's other modules and parameters, `outside` those beside the
    blocks, `embeddings` the modules that the stream starts from. `rotary` maps a
    module to the config key of the head count by which llama.cpp's converter permutes
    its rows (conversion/llama.py, `permute`). In a `parallel` block all branches read
    the same stream; a name means the config key that says so. `block` says how to fill an
    inserted block, or why none can be inserted. `embedding_scale` leads to the number that
    multiplies the embedding, which a GGUF has in the weights where it is `embedding_folded`.
    Tensors that `ignored` matches are kept by stock classes out of the model, and copied.
    `prefix` is what a checkpoint of the base class alone leaves out of every name. `inner` is
    set for a multimodal checkpoint (`bake.wrappers`), whose names are then those on its disk.
    """

    model_type: str
    gguf_architecture: str
    branches: tuple[Branch, ...]
    readers: tuple[str, ...]
    layer: str = "model.layers.{layer}"
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    outside: tuple[str, ...] = ("model.embed_tokens", "model.norm", "lm_head")
    unembeddings: tuple[str, ...] = ("lm_head",)
    layers_key: str = "num_hidden_layers"
    width_key: str = "hidden_size"
    rotary: tuple[tuple[str, str], ...] = ()
    parallel: bool | str = False
    block: Block | str = "no row of how to fill a block of its own"
    embedding_scale: tuple[str | int, ...] | Literal["sqrt(width)"] = ()
    embedding_folded: bool = False
    ignored: str = ""
    prefix: str = ""
    inner: Inner | None = None

    @property
    def root(self) -> str:
        """The name of the module that holds the blocks, on disk."""
        return ".".join(self.layer.split(".")[:-2])

    def without_prefix(self, names: Iterable[str]) -> "Arch":
        """The row as a checkpoint of the base class alone has it, if its tensors are these.

        Stock classes load such names as well: the Hub's gpt2 has `h.0.attn.c_attn.weight`.
        """
        known, root = frozenset(names), f"{self.root}."
        first = f"{self.embeddings[0]}.weight"
        if first in known or first.removeprefix(root) not in known:
            return self
        return replace(
            self,
            layer=self.layer.removeprefix(root),
            embeddings=tuple(module.removeprefix(root) for module in self.embeddings),
            outside=tuple(module.removeprefix(root) for module in self.outside),
            prefix=self.root,
        )

    def numbers(self, config: Mapping[str, object]) -> Mapping[str, object]:
        """What config.json says of the text model."""
        return self.inner.numbers if self.inner else config

    def switch(self, key: str) -> str:
        """The path in config.json of one of the text model's keys, joined by dots."""
        return f"{self.inner.section}.{key}" if self.inner else key

    def layer_count(self, config: Mapping[str, object]) -> int:
        """Number of decoder blocks, from config.json."""
        return _positive(self.numbers(config), self.layers_key)

    def width(self, config: Mapping[str, object]) -> int:
        """Width of the residual stream, from config.json."""
        return _positive(self.numbers(config), self.width_key)

    def embedding_multiplier(self, config: Mapping[str, object]) -> float:
        """The number that multiplies the token embedding; 1 where the class has none."""
        if self.embedding_scale == "sqrt(width)":
            return float(self.width(config) ** 0.5)
        return _number(self.numbers(config), self.embedding_scale)

    def is_parallel(self, config: Mapping[str, object]) -> bool:
        """Whether all branches of a block read the same stream."""
        if isinstance(self.parallel, str):
            return bool(self.numbers(config).get(self.parallel, False))
        return self.parallel

    def block_module(self, layer: int, module: str) -> str:
        """The full name of a block's module."""
        return f"{self.layer.format(layer=layer)}.{module}"

    def post_norm(self, layer: int, branch: Branch) -> PostNorm | None:
        """The norm behind a branch of a layer, if there is one."""
        if branch.norm is None:
            return None
        return PostNorm(self.block_module(layer, branch.norm), branch.norm_offset)

    def check_layers(self, chosen: Iterable[int], config: Mapping[str, object], place: str) -> None:
        """Refuse layers that the model does not have; `place` is where the recipe names them."""
        last = self.layer_count(config) - 1
        for layer in chosen:
            if layer > last:
                raise ArchitectureError(
                    f"{place}: layer {layer} is out of range; the model has layers 0 to {last}"
                )

    def written(self, names: Iterable[str]) -> Mapping[int, tuple[Written, ...]]:
        """By layer, every writer that a checkpoint with these tensors has, attention first."""
        known = frozenset(names)
        found: dict[int, list[Written]] = {}
        # Most names of the largest checkpoints are seen not to be a writer's by their end.
        likely = {name: self._inside(name) for name in known if name.endswith(self._ends)}
        places = {name: one for name, one in likely.items() if one[1] in self._weights}
        for name in sorted(places, key=_natural):
            layer, inside = places[name]
            branch, writer = self._weights[inside]
            weight, bias = writer.suffixes
            beside = f"{name.removesuffix(weight)}{bias}"
            found.setdefault(layer, []).append(
                Written(layer, branch, writer, name, beside if beside in known else None)
            )
        order = {branch: place for place, branch in enumerate(self.branches)}
        return {
            layer: tuple(sorted(writers, key=lambda one: order[one.branch]))
            for layer, writers in sorted(found.items())
        }

    def is_transposed(self, tensor: str) -> bool:
        """Whether a GGUF, where every matrix is [d_out, d_in], holds this tensor transposed."""
        found = self._weights.get(self._inside(tensor)[1])
        return found is not None and found[1].axis == -1

    def gguf_factor(self, tensor: str, config: Mapping[str, object]) -> float:
        """By what llama.cpp's converter multiplied this tensor."""
        if self.embedding_folded and tensor in (f"{module}.weight" for module in self.embeddings):
            return self.embedding_multiplier(config)
        inside = re.sub(r"\.bias$", ".weight", self._inside(tensor)[1])
        if isinstance(self.block, Block) and inside == f"{self.block.gate}.weight":
            return self.block.gate_multiplier(self.numbers(config))
        found = self._weights.get(inside)
        return found[0].multiplier(self.numbers(config)) if found and found[0].folded else 1.0

    def gguf_gain(self, tensor: str) -> float:
        """What llama.cpp's converter adds to a norm's weight: Gemma's 1 (conversion/gemma.py)."""
        offset = self.block.norm_offset if isinstance(self.block, Block) else 0.0
        return offset if tensor.endswith("norm.weight") else 0.0

    def tiled_heads(self, tensor: str, config: Mapping[str, object]) -> tuple[int, int] | None:
        """Key heads and value heads by which a GGUF orders this tensor's columns, if it does."""
        found = self._weights.get(self._inside(tensor)[1])
        if found is None or found[1].tiled is None:
            return None
        keys, values = (_positive(self.numbers(config), key) for key in found[1].tiled)
        return keys, values

    def tied(self, names: Iterable[str]) -> bool:
        """Whether the embedding is also the unembedding: there is no other one on disk."""
        known = frozenset(names)
        return not any(f"{module}.weight" in known for module in self.unembeddings)

    def rotary_heads(self, tensor: str, config: Mapping[str, object]) -> int | None:
        """Heads by which a GGUF permutes the rows of this tensor; None when it does not."""
        inside = self._inside(tensor)[1]
        for module, key in self.rotary:
            if inside.removesuffix(".weight").removesuffix(".bias") == module:
                return _positive(self.numbers(config), key)
        return None

    def gguf_name(self, tensor: str) -> str:
        """The GGUF name of a tensor; that of an expert's is the stack of all experts.

        Raises ArchitectureError for a tensor that gguf's own table does not know.
        """
        stem, kind = self._alone(tensor), ""
        for suffix in (".weight", ".bias", "_bias"):
            if tensor.endswith(suffix):
                stem, kind = stem.removesuffix(suffix), suffix
        stack = re.sub(r"\.experts\.\d+", ".experts", stem)
        names = _gguf_names(self.gguf_architecture)
        # The converter calls dt_bias a bias of dt_proj (conversion/mamba.py).
        name = names.get_name(stack) or (kind == "_bias" and names.get_name(f"{stack}_proj"))
        if not name:
            raise ArchitectureError(f"{tensor}: no GGUF name is known for this tensor")
        # A parameter on its own has no suffix there, but for experts (conversion/gpt_oss.py).
        if not kind and ".experts." not in stem:
            return str(name)
        return f"{name}.{'bias' if kind.endswith('bias') else 'weight'}"

    def check_tensors(self, names: Iterable[str], config: Mapping[str, object]) -> None:
        """Refuse a checkpoint that holds a tensor which the row does not explain.

        An unknown module may write to the stream; editing the known writers
        around it would be half an edit. So would a block without one of its writers.
        """
        known = frozenset(names)
        count = self.layer_count(config)
        unknown = []
        for name in known:
            layer, inside = self._inside(name)
            if layer >= count or (self.ignored and re.match(self.ignored, name)):
                continue
            if inside not in self._inside_names and name not in self._outside_names:
                unknown.append(name)
        if unknown:
            raise ArchitectureError(
                f"{min(unknown, key=_natural)}: model_type '{self.model_type}' has no such tensor "
                "in bake's table; the checkpoint is of a variant that bake does not know"
            )
        written = self.written(known)
        for layer in range(count):
            sites = {one.branch.site for one in written.get(layer, ())}
            for site in {branch.site for branch in self.branches} - sites:
                raise ArchitectureError(
                    f"{self.layer.format(layer=layer)}: no tensor writes its {site} to the stream; "
                    f"is the model_type '{self.model_type}'?"
                )

    def _alone(self, tensor: str) -> str:
        """The name that a tensor has where the text model is saved alone, with its head."""
        if self.prefix:
            return f"{self.prefix}.{tensor}"
        if self.inner is None:
            return tensor
        row = self.inner.row
        heads = zip(self.unembeddings, row.unembeddings, strict=True)
        for here, alone in ((self.root, row.root), *heads):
            if tensor.startswith(f"{here}."):
                return alone + tensor.removeprefix(here)
        return tensor

    @cached_property
    def _weights(self) -> Mapping[str, tuple[Branch, Writer]]:
        return {
            writer.module + writer.suffixes[0]: (branch, writer)
            for branch in self.branches
            for writer in branch.writers
        }

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        return tuple({name.rpartition("}")[2] for name in self._weights})

    @cached_property
    def _inside_names(self) -> frozenset[str]:
        writers = {
            writer.module + suffix
            for branch in self.branches
            for writer in branch.writers
            for suffix in writer.suffixes
        }
        return frozenset(writers | set(_tensors((*self.readers, *self._norms))))

    @property
    def _norms(self) -> tuple[str, ...]:
        return tuple(branch.norm for branch in self.branches if branch.norm)

    @cached_property
    def _outside_names(self) -> frozenset[str]:
        return frozenset(_tensors(self.outside))

    @cached_property
    def _block(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.layer).replace(r"\{layer\}", r"(\d+)") + r"\.(.+)")

    def _inside(self, tensor: str) -> tuple[int, str]:
        """The layer of a tensor and its name inside the block, expert numbers left open."""
        found = self._block.fullmatch(tensor)
        if not found:
            return -1, ""
        before, experts, behind = found[2].partition("experts.")
        number, dot, rest = behind.partition(".")
        named = f"{before}{experts}{{expert}}.{rest}" if dot and number.isdecimal() else found[2]
        return int(found[1]), named


def _tensors(modules: Iterable[str]) -> Iterator[str]:
    """The names that a module's tensors, or a bare parameter, can have."""
    for module in modules:
        yield from (module, f"{module}.weight", f"{module}.bias")


@cache
def _gguf_names(architecture: str) -> Any:
    """gguf's own table from names of many conventions to its own."""
    from gguf.constants import MODEL_ARCH_NAMES
    from gguf.tensor_mapping import get_tensor_name_map

    for arch, name in MODEL_ARCH_NAMES.items():
        if name == architecture:
            return get_tensor_name_map(arch, 512)
    raise ArchitectureError(f"{architecture}: this version of gguf does not know the architecture")


def _natural(name: str) -> list[Any]:
    """Sort key that counts numbers as numbers."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _number(config: Mapping[str, object], path: tuple[str | int, ...]) -> float:
    """The number at a path of config.json; 1 where the class's own default holds."""
    if not path:
        return 1.0
    found: Any = config
    for key in path:
        try:
            found = found[key]
        except (KeyError, IndexError, TypeError):
            return 1.0
    if not isinstance(found, int | float) or not found:
        name = ".".join(map(str, path))
        raise ArchitectureError(f"config.json: {name} must be a number, found {found!r}")
    return float(found)


def _positive(config: Mapping[str, object], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ArchitectureError(f"config.json: {key} must be a positive integer, found {value!r}")
    return value
