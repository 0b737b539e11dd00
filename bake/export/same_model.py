"""Is a GGUF of the checkpoint's model? Asked of weights, where headers cannot tell."""

from math import exp2

import torch
from gguf import GGML_QUANT_SIZES
from torch import Tensor

from bake.arch import Arch, Written
from bake.checkpoint import Checkpoint
from bake.errors import GGUFError
from bake.export.layout import tiled_columns
from bake.export.requantise import FLOATS
from bake.gguf_file import GGUFFile, GGUFTensor

__all__ = ["check_same_model"]

_OWN_ROUNDING = 0.02
"""What conversion between formats of 16 bits, or a merge in another order, may make at most."""


def check_same_model(gguf: GGUFFile, base: Checkpoint, arch: Arch) -> None:
    """Compare the writers of the first, the middle and the last block with the checkpoint's.

    Raises GGUFError where a matrix is further away than the rounding of its type explains.
    """
    written = arch.written(base.tensors)
    layers = sorted(written)
    for layer in {layers[0], layers[len(layers) // 2], layers[-1]}:
        for one in written[layer]:
            tensor = gguf.tensors.get(arch.gguf_name(one.weight))
            if tensor is None or "expert" in one.writer.module:
                continue
            distance = _distance(gguf.read(tensor.name), _expected(base, arch, one))
            if not distance <= _explained(tensor):
                raise GGUFError(
                    f"{gguf.path}: {tensor.name} is {distance:.0%} away from the checkpoint's, and "
                    f"{tensor.type.name} explains {_explained(tensor):.0%} at most: it is of "
                    "another model; give a GGUF of the same one"
                )


def _expected(base: Checkpoint, arch: Arch, one: Written) -> Tensor:
    weight = base.read(one.weight).float() * arch.gguf_factor(one.weight, base.config)
    if arch.is_transposed(one.weight):
        return weight.T
    return tiled_columns(weight, arch.tiled_heads(one.weight, base.config))


def _distance(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|; infinite where the shapes differ."""
    if found.shape != expected.shape:
        return torch.inf
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def _explained(tensor: GGUFTensor) -> float:
    """Four times what a type of b bits a weight is off by, which is about 1.5 · 2⁻ᵇ."""
    block, size = GGML_QUANT_SIZES[tensor.type]
    bits = 16.0 if tensor.type in FLOATS else 8 * int(size) / int(block)
    return min(0.9, max(_OWN_ROUNDING, 6 * exp2(-bits)))
