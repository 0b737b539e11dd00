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

from collections.abc import Iterable
from math import log2

from bake.arch import Arch
from bake.carriers.blank import Fill, blank_block
from bake.carriers.carried import Carried
from bake.checkpoint import Checkpoint

__all__ = ["block_carrier"]


def block_carrier(base: Checkpoint, arch: Arch, layer: int, runtimes: Iterable[str]) -> Carried:
    """The block behind a layer, with the tensor that takes the vector.

    Raises ArchitectureError where `blank_block` does, and for an MLP that is too narrow.
    """
    blank = blank_block(base, arch, layer, runtimes)
    width, branch = arch.width(base.config), blank.branch
    slope = 2.0 ** round(-log2(width) / 2)
    fills = blank.squares(slope) | blank.unit_norms()
    if branch.norm:
        fills[blank.down] = Fill(1.0 / slope)
        fills[f"{branch.norm}.weight"] = Fill(-branch.norm_offset)
        carrying, multiplier, neurons = f"{branch.norm}.weight", 1.0, 0
    else:
        carrying, numbers = blank.down, arch.numbers(base.config)
        multiplier = width * slope * blank.block.gate_multiplier(numbers)
        multiplier *= branch.multiplier(numbers)
        neurons = blank.neurons
    info = blank.tensors[carrying]
    return Carried(
        "block",
        *(blank.name(carrying), info.shape, info.dtype, multiplier),
        arch.block_module(layer, branch.module),
        branch.writers[0].axis,
        neurons=neurons,
        created=blank.created(fills),
        inserted=(layer,),
    )
