"""Edits of low rank as a LoRA beside an untouched base: for PEFT and vLLM, and for llama.cpp.

A gate and a ridge carrier are low-rank writes, and an ablation W - λ R Rᵀ W is one too, of
B = -λ R and A = Rᵀ W: all are exact up to float32, on a quantised base as well, where A is taken
from its own weights. A LoRA has no biases, no norms and no blocks; edits of those are refused.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from gguf import GGUFWriter
from safetensors.torch import save
from torch import Tensor

from bake.arch import Arch
from bake.checkpoint import Checkpoint
from bake.edits import Edit, LowRank, RemoveSubspace
from bake.errors import ArchitectureError
from bake.export.layout import gguf_edits
from bake.gguf_file import GGUFFile
from bake.plan import Plan

__all__ = ["check_adapter", "low_rank", "write_gguf_lora", "write_peft"]


def check_adapter(plan: Plan, arch: Arch) -> None:
    """Refuse, from the plan alone, what a LoRA cannot hold.

    Raises ArchitectureError for edits of biases, embeddings and experts, for new tensors,
    and for a text model inside another one, whose modules PEFT knows by other names.
    """
    if arch.inner:
        raise ArchitectureError(
            "export.adapters: the modules of a text model inside a multimodal one have other "
            "names in memory; export the whole checkpoint instead"
        )
    writers = {
        one.weight: one
        for found in arch.written(edit.tensor for edit in plan.edits).values()
        for one in found
    }
    for edit in plan.edits:
        one = writers.get(edit.tensor)
        created = any(tensor.name == edit.tensor for tensor in plan.created)
        if one is None or created or "expert" in one.writer.module:
            raise ArchitectureError(
                f"export.adapters: {edit.tensor} ({edit.operator}, {edit.carrier}): a LoRA holds "
                "only writes to matrices that every token passes; use carrier: ridge, or leave "
                "adapters out"
            )


def low_rank(edits: Sequence[Edit], weight: Tensor) -> LowRank:
    """Return some edits of a matrix [rows, columns], composed in order, as one low-rank write.

    Raises ArchitectureError for an edit that is not of low rank.
    """
    lefts, rights = [], []
    for edit in edits:
        match edit:
            case LowRank():
                left, right = edit.left, edit.right
            case RemoveSubspace(axis=-2):
                left, right = -edit.strength * edit.basis, edit.basis.T @ weight
            case RemoveSubspace():
                left, right = -edit.strength * (weight @ edit.basis), edit.basis.T
            case _:
                raise ArchitectureError(
                    f"{edit.tensor}: {type(edit).__name__} is of full rank, and a LoRA is not; "
                    "use variant: plain, or leave adapters out"
                )
        lefts.append(left)
        rights.append(right)
        weight = edit.apply(weight)
    return LowRank(edits[0].tensor, torch.cat(lefts, 1), torch.cat(rights))


def write_peft(
    edits: Mapping[str, Sequence[Edit]], base: Checkpoint, arch: Arch, name: str, folder: Path
) -> None:
    """Write the edits of a checkpoint as a PEFT LoRA into a new folder.

    `name` is the base's. All modules have the largest rank, filled up with zeros, since vLLM
    knows only one, and alpha is the rank, so that the scale is 1.
    """
    found = {
        tensor: low_rank(chosen, base.read(tensor).float()) for tensor, chosen in edits.items()
    }
    rank = max(one.left.shape[1] for one in found.values())
    tensors, modules = {}, []
    transposed = False
    for tensor, one in found.items():
        module = tensor.removesuffix(".weight")
        left, right = one.left, one.right
        if arch.is_transposed(tensor):
            left, right, transposed = right.T, left.T, True
        missing = rank - left.shape[1]
        modules.append(module)
        start = f"base_model.model.{module}"
        # safetensors stores no views.
        padded = torch.nn.functional.pad(right, (0, 0, 0, missing))
        tensors[f"{start}.lora_A.weight"] = padded.contiguous().clone()
        padded = torch.nn.functional.pad(left, (0, missing))
        tensors[f"{start}.lora_B.weight"] = padded.contiguous().clone()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": modules,
        "inference_mode": True,
    }
    folder.mkdir()
    text = json.dumps(config, indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    # `save_file` makes a file for its owner alone.
    weights = save(tensors, metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").write_bytes(weights)


def write_gguf_lora(
    edits: Mapping[str, Sequence[Edit]],
    base: GGUFFile,
    arch: Arch,
    config: Mapping[str, object],
    name: str,
    path: Path,
) -> None:
    """Write the edits of a checkpoint as a LoRA for llama.cpp's `--lora`.

    Ollama took it as ADAPTER, and refuses it now (its server/create.go, 0029bb5).
    `base` is the GGUF that it is for: what an ablation takes out is read from its weights.
    An alpha of 0 is a scale of 1 (llama.cpp's src/llama-adapter.h, `get_scale`).
    """
    writer = GGUFWriter(path, arch.gguf_architecture)
    writer.add_type("adapter")
    writer.add_name(name)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    for tensor, chosen in gguf_edits(edits, arch, config).items():
        one = low_rank(chosen, base.read(tensor))
        writer.add_tensor(f"{tensor}.lora_a", one.right.contiguous().numpy())
        writer.add_tensor(f"{tensor}.lora_b", one.left.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
