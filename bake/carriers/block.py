"""The `block` carrier: one inserted decoder block adds the vector, exactly, without a bias.

Its attention writes zero. Its MLP has for every coordinate i of its input x the two neurons
(gate, up) = (s e_i, e_i) and (-s e_i, -e_i). An activation with act(z) - act(-z) = z makes
s x_i² of each pair: act(s x_i) x_i - act(-s x_i) x_i. So all of them together give s |x|².

- Behind a norm with gain 1, |x|² = d, but for the norm's ε: every column of the down
  projection is v / (s d), over the multipliers of the gate and of the branch.
- With a post-norm any positive number in all coordinates becomes 1 in all of them, but for
  ε: the down projection is 1 / s, and the post-norm's gain is v.

s is a power of two near d^-1/2, so that neither the neurons nor the columns are far from 1 in
half precision or in eight bits. Everything else in the block is zero.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import log2
from typing import Final

from bake.arch import Arch, Block, Branch, Dense
from bake.carriers.carried import Carried
from bake.checkpoint import Checkpoint, TensorInfo
from bake.edits import CreatedTensor
from bake.errors import ArchitectureError
from bake.insertion import Insertion, completed, inserted_config

__all__ = ["block_carrier"]

# Those with act(z) - act(-z) = z, by the names that transformers has for them (activations.py).
HALVES: Final = frozenset(
    {
        *("silu", "swish", "relu", "gelu", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python"),
        *("gelu_pytorch_tanh", "quick_gelu"),
    }
)


@dataclass(frozen=True)
class _Fill:
    """What a tensor of the block holds, as `CreatedTensor` says it."""

    value: float = 0.0
    diagonals: tuple[tuple[int, float], ...] = ()


def block_carrier(base: Checkpoint, arch: Arch, layer: int, runtimes: Iterable[str]) -> Carried:
    """The block behind a layer, whose tensors are named and shaped as that layer's are.

    Raises ArchitectureError where the row has none, a runtime would not run it as it is, the
    MLP is too narrow or its activation another, and for half precision without a norm. Beside
    weights in FP8 it is in BF16.
    """
    block = arch.block
    if isinstance(block, str):
        raise ArchitectureError(f"model_type '{arch.model_type}': {block}")
    count = arch.layer_count(base.config)
    refusals = block.refusals(count, count + 1)
    for runtime in runtimes:
        if runtime in refusals:
            raise ArchitectureError(f"{runtime} {refusals[runtime]}")
    inserted_config(arch, block, base.config, (layer,))
    _check_activation(arch, block, base)
    tensors = _tensors(base, arch, layer)
    last = list(tensors.values())[-1].name
    if block.dense and f"{block.gate}.weight" not in tensors:
        tensors = _made_dense(tensors, arch, block, block.dense, base)
    (branch,) = (one for one in arch.branches if one.site == "mlp")
    width = arch.width(base.config)
    slope = 2.0 ** round(-log2(width) / 2)
    fills = _fills(block, branch, tensors, width, slope)
    number = Insertion(arch.layer, count).behind(layer)
    created = {}
    for inside, info in tensors.items():
        name, fill = arch.block_module(number, inside), fills.get(inside, _Fill())
        created[inside] = CreatedTensor(
            *(name, info.shape, info.dtype, last), value=fill.value, diagonals=fill.diagonals
        )
    if branch.norm:
        carrying, multiplier, neurons = created[f"{branch.norm}.weight"], 1.0, 0
    else:
        carrying = created[f"{branch.writers[0].module}.weight"]
        numbers = arch.numbers(base.config)
        multiplier = width * slope * block.gate_multiplier(numbers) * branch.multiplier(numbers)
        neurons = carrying.shape[-1]
    return Carried(
        "block",
        *(carrying.name, carrying.shape, carrying.dtype, multiplier),
        arch.block_module(layer, branch.module),
        branch.writers[0].axis,
        neurons=neurons,
        created=tuple(created.values()),
        inserted=(layer,),
    )


def _tensors(base: Checkpoint, arch: Arch, layer: int) -> dict[str, TensorInfo]:
    """The tensors of a layer by their names inside the block, in the order of the files."""
    found: dict[str, TensorInfo] = {}
    count = arch.layer_count(base.config)
    here = f"{arch.layer.format(layer=layer)}."
    insertion = Insertion(arch.layer, count)
    for name, info in base.tensors.items():
        if insertion.original(name):
            raise ArchitectureError(
                f"{name}: is behind the last of the model's {count} layers, so none can be inserted"
            )
        if name.startswith(here):
            found[name.removeprefix(here)] = info
    return found


def _made_dense(
    tensors: Mapping[str, TensorInfo], arch: Arch, block: Block, dense: Dense, base: Checkpoint
) -> dict[str, TensorInfo]:
    """The tensors of a block of experts, with a dense MLP in place of these."""
    (branch,) = (one for one in arch.branches if one.site == "mlp")
    kept = {
        name: info for name, info in tensors.items() if not name.startswith(f"{branch.module}.")
    }
    width, neurons = arch.width(base.config), completed(arch, base.config)[dense.width]
    assert isinstance(neurons, int)
    like = next(info for info in kept.values() if len(info.shape) == 2)
    for module, shape in (
        (block.gate, (neurons, width)),
        (block.up, (neurons, width)),
        (branch.writers[0].module, (width, neurons)),
    ):
        kept[f"{module}.weight"] = like._replace(shape=shape)
    return kept


def _check_activation(arch: Arch, block: Block, base: Checkpoint) -> None:
    if block.activation is None:
        return
    name = completed(arch, base.config).get(block.activation)
    if name not in HALVES:
        raise ArchitectureError(
            f"config.json: {arch.switch(block.activation)}: {name!r} is no activation of which two "
            "neurons make a square"
        )


def _fills(
    block: Block, branch: Branch, tensors: Mapping[str, TensorInfo], width: int, slope: float
) -> dict[str, _Fill]:
    """What the tensors hold that are not zero, by their names inside the block."""
    gate, up = (f"{module}.weight" for module in (block.gate, block.up))
    down = f"{branch.writers[0].module}.weight"
    norms = [f"{norm}.weight" for norm in block.norms]
    missing = [name for name in (gate, up, down) if name not in tensors]
    if norms and not tensors.keys() & set(norms):
        missing += norms
    if missing:
        raise ArchitectureError(f"the block has no {missing[0]}, which an inserted one needs")
    neurons = tensors[down].shape[-1]
    if neurons < 2 * width:
        raise ArchitectureError(
            f"{tensors[down].name}: the MLP has {neurons} neurons, an inserted block needs twice "
            f"the width of the stream, {2 * width}"
        )
    if not block.norms and tensors[up].dtype == "F16":
        raise ArchitectureError(
            f"{tensors[up].name}: is F16, which may overflow with the square of a stream that no "
            "norm has scaled; give a BF16 or F32 checkpoint"
        )
    first = neurons if gate == up else 0
    fills = {gate: _Fill(diagonals=((0, slope), (width, -slope)))}
    below = fills[gate].diagonals if gate == up else ()
    fills[up] = _Fill(diagonals=(*below, (first, 1.0), (first + width, -1.0)))
    fills |= {name: _Fill(1.0 - block.norm_offset) for name in norms}
    if branch.norm:
        fills[down] = _Fill(1.0 / slope)
        fills[f"{branch.norm}.weight"] = _Fill(-branch.norm_offset)
    return fills
