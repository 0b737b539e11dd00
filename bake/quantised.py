"""Quantised checkpoints: those in FP8 with a scale a block, and a refusal for every other kind.

An FP8 weight W8 [d_out, d_in] has a scale [d_out / a, d_in / b] beside it, or one number:
W = W8 · scale, block by block, is exact in float32. A tensor that bake edits is written in
bfloat16 without its scale, and its module joins `modules_to_not_convert` of config.json, which
transformers (integrations/finegrained_fp8.py, `replace_with_fp8_linear`) and vLLM
(model_executor/layers/quantization/fp8.py, `from_config`) read; the rest stays in FP8.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from bake.errors import ArchitectureError, CheckpointError

__all__ = [
    "SECTION",
    "check_quantisation",
    "companions",
    "dequantised",
    "left_unquantised",
    "scale_by_row",
    "scaled",
]

SECTION: Final = "quantization_config"
# What stands beside an FP8 weight, by the end of its name.
COMPANIONS: Final = ("_scale_inv", ".activation_scale")
# Tensors that no unquantised checkpoint has, by the end of their names.
_PACKED: Final = (
    *(".qweight", ".qzeros", ".g_idx", ".weight_packed", ".SCB", ".absmax", ".quant_map"),
    *(".weight_scale", ".weight_scale_2", ".weight_zero_point", "_proj_blocks", "_proj_scales"),
    *(".weight_scale_inv", ".qscale_weight"),
)
_AFTERWARDS: Final = "give the unquantised checkpoint, and quantise what bake writes"
_REMEDIES: Final[Mapping[str, str]] = {
    "gptq": f"GPTQ fits its integers to the old weights; {_AFTERWARDS}",
    "awq": f"AWQ fits its integers to the old weights; {_AFTERWARDS}",
    "bitsandbytes": "bitsandbytes quantises while it loads, so give the unquantised checkpoint; "
    "what bake writes loads with the same load_in_4bit or load_in_8bit",
    "compressed-tensors": _AFTERWARDS,
    "mxfp4": "give a bfloat16 copy, which from_pretrained(..., quantization_config="
    "Mxfp4Config(dequantize=True)) and save_pretrained write",
}


def check_quantisation(config: Mapping[str, Any], where: str, names: Iterable[str]) -> bool:
    """Whether a checkpoint is in FP8 that bake reads; False for an unquantised one.

    `where` is its config.json. Raises CheckpointError, naming the key or a tensor, for every
    other way to be quantised.
    """
    found = next((name for name in names if name.endswith(_PACKED)), "")
    key = next((key for key in (SECTION, "compression_config") if key in config), None)
    if key is None:
        nested = next((one for one in config if SECTION in _section(config[one])), None)
        if nested:
            raise CheckpointError(f"{where}: {nested}.{SECTION}: is quantised; {_AFTERWARDS}")
        if found:
            raise CheckpointError(
                f"{where}: {found} is a part of a quantised weight, but there is no {SECTION}; "
                f"{_AFTERWARDS}"
            )
        return False
    chosen = _section(config[key])
    method = chosen.get("quant_method") or "unknown"
    if method == "fp8":
        _check_fp8(chosen, where)
        return True
    example = f", as in {found}" if found else ""
    raise CheckpointError(
        f"{where}: {key}.quant_method: is {method!r}, which packs the weights{example}; "
        f"{_REMEDIES.get(str(method), _AFTERWARDS)}"
    )


def _check_fp8(chosen: Mapping[str, Any], where: str) -> None:
    """Refuse the kinds of FP8 whose scales mean something else."""
    wanted = {"scale_fmt": (None, "float"), "expert_dtype": (None, "fp8"), "fmt": (None, "e4m3")}
    for key, values in wanted.items():
        if chosen.get(key) not in values:
            raise CheckpointError(
                f"{where}: {SECTION}.{key}: is {chosen[key]!r}, bake reads FP8 with "
                f"{values[1]!r} alone; give a bfloat16 copy"
            )
    block = chosen.get("weight_block_size", [128, 128])
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(one) is int for one in block)
    ):
        raise CheckpointError(
            f"{where}: {SECTION}.weight_block_size: expected two whole numbers, found {block!r}"
        )


def companions(weight: str) -> tuple[str, ...]:
    """The names that may stand beside an FP8 weight: its scale first."""
    return (weight + COMPANIONS[0], weight.removesuffix(".weight") + COMPANIONS[1])


def dequantised(weight: Tensor, scale: Tensor, name: str) -> Tensor:
    """W8 · scale in float32: one scale for all of W8 [.., m, n], or [.., rows, columns] blocks.

    Raises what `scale_by_row` does.
    """
    return scaled(weight, scale_by_row(scale, weight.shape, name))


def scale_by_row(scale: Tensor, shape: Sequence[int], name: str) -> Tensor:
    """The factors of each row of W8 [.., m, n], [.., m, columns] in float32, or the one of all [].

    Raises CheckpointError for blocks that do not divide the weight, as transformers does, and
    for scales that are no real numbers. Blocks are as wide as a power of two, so where it
    comes out otherwise the last one is a smaller one.
    """
    factors = scale.to(torch.float32)
    if scale.dtype.is_floating_point and factors.numel() == 1:
        return factors.reshape(())
    rows, columns = factors.shape[-2:] if factors.ndim == len(shape) else (0, 0)
    if not scale.dtype.is_floating_point or not (
        _divides(rows, shape[-2]) and _divides(columns, shape[-1])
    ):
        raise CheckpointError(
            f"{name}: its scale is {scale.dtype} {tuple(scale.shape)}, which does not divide "
            f"{tuple(shape)} into equal blocks; give a bfloat16 copy"
        )
    return factors.repeat_interleave(shape[-2] // rows, -2)


def scaled(values: Tensor, by_row: Tensor) -> Tensor:
    """Rows of W8 times their factors, in float32."""
    if by_row.ndim:
        by_row = by_row.repeat_interleave(values.shape[-1] // by_row.shape[-1], -1)
    return values.to(torch.float32) * by_row


def _divides(blocks: int, length: int) -> bool:
    """Whether so many blocks of a scale each make a length: one, or some of a power of two."""
    if blocks < 1 or length % blocks:
        return False
    return blocks == 1 or (length // blocks).bit_count() == 1


def left_unquantised(
    config: Mapping[str, Any],
    written: Sequence[str],
    matrices: Iterable[str],
    moved: Callable[[str], str],
) -> dict[str, object]:
    """What changes in config.json, by path, when the weights `written` are in bfloat16.

    `moved` says what a module of the list that config.json has is called afterwards. Without
    such a list, transformers leaves out what its class says; a list replaces that, so
    `matrices`, those that are not quantised on disk, are then named too. Raises
    ArchitectureError for one expert, since a layer's experts are of one type in memory.
    """
    if not written:
        return {}
    modules = [name.removesuffix(".weight") for name in written]
    for module in modules:
        if re.search(r"\.experts\.", module):
            raise ArchitectureError(
                f"{module}.weight: is an expert in FP8, and runtimes hold all experts of a layer "
                "in one type; leave its layer out, or give a bfloat16 copy"
            )
    chosen = _section(config[SECTION])
    key = "ignored_layers" if "ignored_layers" in chosen else "modules_to_not_convert"
    named = chosen.get(key)
    if named:
        before = [moved(name) for name in named]
    else:
        before = [name.removesuffix(".weight") for name in matrices]
    return {f"{SECTION}.{key}": [*before, *(one for one in modules if one not in before)]}


def _section(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
