"""Multimodal checkpoints: the row of the text model inside, with the names of their disk.

A text model is named in two ways on disk: saved whole inside the wrapper
(`language_model.model.layers.0`, `language_model.lm_head`), or without its head
(`model.language_model.layers.0`, `lm_head`). Which one it is, and under what name, the
tensors say. Everything beside the text model is copied.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from bake.arch import Arch, Block, Branch, Inner
from bake.errors import ArchitectureError

__all__ = ["SECTION", "stock_config", "text_numbers", "wrapped"]

SECTION = "text_config"
# vLLM builds the text model's own class (model_executor/models/llava.py,
# init_vllm_registered_model) and a GGUF holds the text model alone; MLX has classes without
# biases (mlx_vlm/models/llava/language.py), and SGLang's were not read.
RUNTIMES = frozenset({"transformers", "llama.cpp", "ollama", "vllm"})
_UNREAD = tuple(
    (name, "has classes of its own for multimodal models") for name in ("mlx", "sglang")
)


def text_numbers(config: Mapping[str, Any], where: str) -> Mapping[str, object]:
    """The text model's part of a wrapper's config.json, as the stock class completes it.

    Published files leave out what equals the defaults of their class, the width and the
    number of layers included. Raises ArchitectureError when transformers cannot read it.
    """
    section = getattr(stock_config(config, where), SECTION, None)
    if section is None:
        raise ArchitectureError(f"{where}: {SECTION}: transformers reads none in this model_type")
    numbers: dict[str, object] = section.to_dict()
    return numbers


def stock_config(config: Mapping[str, Any], where: str) -> Any:
    """A config.json as the class of its `model_type` reads and completes it.

    Raises ArchitectureError when transformers cannot read it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config.get("model_type")
    try:
        plain = json.loads(json.dumps(config), object_hook=_special_float)
        return CONFIG_MAPPING[model_type].from_dict(plain)
    except (KeyError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ArchitectureError(
            f"{where}: model_type {model_type!r} is none that transformers can read "
            f"({type(error).__name__}: {reason})"
        ) from error


def _special_float(found: dict[str, Any]) -> object:
    """An infinity as transformers writes it: {"__float__": "Infinity"}."""
    return float(found["__float__"]) if found.keys() == {"__float__"} else found


def wrapped(row: Arch, numbers: Mapping[str, object], names: Iterable[str], where: str) -> Arch:
    """The row of a text model, as it lies among the tensors `names` of a wrapper.

    Raises ArchitectureError when they hold no such text model, or more than one.
    """
    known = frozenset(names)
    inner = Inner(row, SECTION, numbers)
    found = [at for at in (_moved(inner, root, known) for root in _roots(row, known)) if at]
    if len(found) != 1:
        places = ", ".join(one.layer for one in found) or "no tensors"
        raise ArchitectureError(
            f"{where}: {SECTION}: model_type '{row.model_type}' with {row.layer_count(numbers)} "
            f"layers: found {places} that could be its blocks; the checkpoint is of a variant "
            "that bake does not know"
        )
    return found[0]


def _roots(row: Arch, known: frozenset[str]) -> list[str]:
    """The modules that have every embedding of the text model."""
    tails = [f"{module.removeprefix(row.root)}.weight" for module in row.embeddings]
    roots = {name.removesuffix(tails[0]) for name in known if name.endswith(tails[0])}
    return sorted(root for root in roots if all(root + tail in known for tail in tails))


def _moved(inner: Inner, root: str, known: frozenset[str]) -> Arch | None:
    """The row with its text model at `root`; None where that has not all of the blocks."""
    row = inner.row
    # A text model that was saved whole has its head beside its root, and nothing else there.
    whole = root.removesuffix(f".{row.root}")
    heads = {head: _head(root, head, known) for head in row.unembeddings}

    def move(module: str) -> str:
        return heads.get(module, root + module.removeprefix(row.root))

    moved = replace(
        row,
        inner=inner,
        layer=move(row.layer),
        embeddings=tuple(map(move, row.embeddings)),
        outside=tuple(map(move, row.outside)),
        unembeddings=tuple(map(move, row.unembeddings)),
        branches=tuple(map(_served, row.branches)),
        block=_served_block(row.block),
        ignored=rf"(?!{re.escape(whole)}\.)",
    )
    layers = range(row.layer_count(inner.numbers))
    return moved if set(layers) <= set(moved.written(known)) else None


def _head(root: str, head: str, known: frozenset[str]) -> str:
    """The name of the text model's head: the one nearest to its root; its own where it is tied."""
    parts = root.split(".")
    around = [".".join((*parts[:depth], head)) for depth in range(len(parts), -1, -1)]
    return next((name for name in around if f"{name}.weight" in known), head)


def _served_block(block: Block | str) -> Block | str:
    """The inserted block, for the runtimes whose classes for wrappers were read."""
    return block if isinstance(block, str) else replace(block, unserved=(*block.unserved, *_UNREAD))


def _served(branch: Branch) -> Branch:
    """The branch with its bias slots narrowed to the runtimes that load wrappers' biases."""
    return replace(
        branch,
        writers=tuple(
            replace(one, bias=one.bias and replace(one.bias, runtimes=one.bias.runtimes & RUNTIMES))
            for one in branch.writers
        ),
    )
