"""A decoder block of the model's own that adds nothing yet, to be inserted behind a layer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from bake.arch import Arch, Block, Branch, Dense
from bake.checkpoint import Checkpoint, TensorInfo
from bake.edits import CreatedTensor
from bake.errors import ArchitectureError
from bake.insertion import Insertion, completed, inserted_config

__all__ = ["HALVES", "Blank", "Fill", "blank_block"]

# Those with act(z) - act(-z) = z, by the names that transformers has for them (activations.py).
HALVES: Final = frozenset(
    {
        *("silu", "swish", "relu", "gelu", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python"),
        *("gelu_pytorch_tanh", "quick_gelu"),
    }
)


@dataclass(frozen=True)
class Fill:
    """What a tensor of the block holds, as `CreatedTensor` says it."""

    value: float = 0.0
    diagonals: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Blank:
    """The tensors of a block behind `layer`, by their names inside it, as that layer's are.

    They go into the file of `beside`. `block` and `branch` say which is which.
    """

    arch: Arch
    layer: int
    number: int
    block: Block
    branch: Branch
    activation: str
    tensors: Mapping[str, TensorInfo]
    beside: str

    @property
    def gate(self) -> str:
        """The weight of the gate, inside the block."""
        return f"{self.block.gate}.weight"

    @property
    def up(self) -> str:
        """The weight beside the gate; the same one where both are fused."""
        return f"{self.block.up}.weight"

    @property
    def down(self) -> str:
        """The weight that writes to the stream."""
        return f"{self.branch.writers[0].module}.weight"

    @property
    def norms(self) -> tuple[str, ...]:
        """The weights of the norms in front of the MLP that there are."""
        names = (f"{norm}.weight" for norm in self.block.norms)
        return tuple(name for name in names if name in self.tensors)

    @property
    def neurons(self) -> int:
        """The width of the MLP."""
        return self.tensors[self.down].shape[-1]

    @property
    def first_up(self) -> int:
        """The row at which the neurons of `up` begin."""
        return self.neurons if self.gate == self.up else 0

    def name(self, inside: str) -> str:
        """The full name of a tensor, before anything is renamed."""
        return self.arch.block_module(self.number, inside)

    def created(self, fills: Mapping[str, Fill]) -> tuple[CreatedTensor, ...]:
        """The block's tensors, by their names inside it filled as said, zero elsewhere."""
        found = []
        for inside, info in self.tensors.items():
            fill = fills.get(inside, Fill())
            found.append(
                CreatedTensor(
                    *(self.name(inside), info.shape, info.dtype, self.beside),
                    value=fill.value,
                    diagonals=fill.diagonals,
                )
            )
        return tuple(found)

    def squares(self, slope: float, first: int = 0) -> dict[str, Fill]:
        """Two neurons a coordinate from `first` on, of slope s, whose sum is s |x|².

        Raises ArchitectureError for an MLP without so many.
        """
        width = self.tensors[self.down].shape[0]
        if self.neurons < 2 * width + first:
            more = f" and {first} more" if first else ""
            raise ArchitectureError(
                f"{self.tensors[self.down].name}: the MLP has {self.neurons} neurons, an inserted "
                f"block needs twice the width of the stream{more}, {2 * width + first}"
            )
        gates = ((first, slope), (first + width, -slope))
        below = self.first_up + first
        ups = ((below, 1.0), (below + width, -1.0))
        if self.gate == self.up:
            return {self.gate: Fill(diagonals=(*gates, *ups))}
        return {self.gate: Fill(diagonals=gates), self.up: Fill(diagonals=ups)}

    def unit_norms(self) -> dict[str, Fill]:
        """The norms in front of the MLP with gain 1."""
        return {name: Fill(1.0 - self.block.norm_offset) for name in self.norms}


def blank_block(base: Checkpoint, arch: Arch, layer: int, runtimes: Iterable[str]) -> Blank:
    """The block behind a layer, whose tensors are named and shaped as that layer's are.

    Raises ArchitectureError where the row has none, a runtime would not run it as it is, its
    activation is none of HALVES, and for half precision without a norm. Beside weights in FP8
    it is in BF16.
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
    activation = _activation(arch, block, base)
    tensors = _tensors(base, arch, layer)
    beside = list(tensors.values())[-1].name
    if block.dense and f"{block.gate}.weight" not in tensors:
        tensors = _made_dense(tensors, arch, block, block.dense, base)
    (branch,) = (one for one in arch.branches if one.site == "mlp")
    number = Insertion(arch.layer, count).behind(layer)
    found = Blank(arch, layer, number, block, branch, activation, tensors, beside)
    _check(found)
    return found


def _check(blank: Blank) -> None:
    """Refuse a block without what an inserted one needs."""
    missing = [name for name in (blank.gate, blank.up, blank.down) if name not in blank.tensors]
    if blank.block.norms and not blank.norms:
        missing.append(f"{blank.block.norms[0]}.weight")
    if missing:
        raise ArchitectureError(f"the block has no {missing[0]}, which an inserted one needs")
    up = blank.tensors[blank.up]
    if not blank.block.norms and up.dtype == "F16":
        raise ArchitectureError(
            f"{up.name}: is F16, which may overflow with the square of a stream that no "
            "norm has scaled; give a BF16 or F32 checkpoint"
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


def _activation(arch: Arch, block: Block, base: Checkpoint) -> str:
    """The name of the MLP's activation, by which transformers knows it."""
    if block.activation is None:
        return "silu"
    name = completed(arch, base.config).get(block.activation)
    if name not in HALVES:
        raise ArchitectureError(
            f"config.json: {arch.switch(block.activation)}: {name!r} is no activation of which two "
            "neurons make a square"
        )
    return str(name)
