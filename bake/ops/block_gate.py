"""`gate`, `form: block`: an inserted decoder block adds v · γ(x), γ a clipped ramp of a probe.

x is what the block's MLP reads, the stream behind a norm of gain 1. With z = pᵀx, the probe, and
q = cᵀx, a readout of the constant 1,

    γ = q (act(s z) - act(s (z - q))) / s,

two neurons with (gate, up) = (s p, c) and (s (p - c), c), and ± v / s in the down projection. For
a large s, act(s z) / s is max(z, 0) for SiLU, GELU and ReLU alike, so γ is q · clip(z, 0, q): 0
where z < 0, 1 where z > 1, but for what q is from 1. The hook is this function and no ideal of it.

The block's attention writes zero. Where a post-norm follows the MLP, it would blow up any γ to the
same length; so one channel j, where v is least, gets K = κ √d |x|² / d of two neurons a coordinate
(`bake.carriers.block`), far longer than v, and the norm's gain is κ, but 0 in channel j. The
stream receives v γ / sqrt(1 + |v γ|² / κ² d), v without channel j.
"""

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import ceil, log2
from typing import Final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bake.arch import Arch
from bake.carriers.blank import Blank, Fill, blank_block
from bake.checkpoint import Checkpoint
from bake.edits import AddVector, CreatedTensor, Edit, LowRank, PlannedEdit, Step
from bake.errors import ArchitectureError
from bake.hooks import on_output
from bake.model import LiveModel
from bake.ops.operator import Measured
from bake.recipe import Gate as Spec

__all__ = ["STEEP", "BlockGate", "block_gate_step", "block_gates", "mlp_input", "ramp"]

# s: the ramp's corners are round by 0.28 / s (SiLU) of its height. Rounding errors do not grow
# with it, since all of a neuron does.
STEEP: Final = 64.0
# How much longer K is than v: the post-norm then shortens v by 1 in 2 · 16².
LONGER: Final = 16.0


def ramp(x: Tensor, probes: Tensor, constant: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """γ [.., m] for x [.., d], probes p [m, d] and the constant's readout c [d], as above."""
    q = (x @ constant)[..., None]
    rising, falling = act(x @ (STEEP * probes).T), act(x @ (STEEP * (probes - constant)).T)
    return q * (rising - falling) / STEEP


@dataclass(frozen=True, eq=False)
class BlockGate:
    """Add Σ vⱼ γⱼ behind a layer: `vectors` [m, d], strength included, `probes` [m, d].

    `constant` [d] reads 1 off what the MLP of the `blank` block reads; `multiplier` is what
    the class multiplies the MLP's output by, `gate_multiplier` what it multiplies the gate by.
    """

    blank: Blank
    vectors: Tensor
    probes: Tensor
    constant: Tensor
    multiplier: float = 1.0
    gate_multiplier: float = 1.0

    def attach(self, model: LiveModel) -> Iterable[RemovableHandle]:
        """Hook the output of the block in front."""
        from transformers.activations import ACT2FN

        act = ACT2FN[self.blank.activation]
        read, norm = mlp_input(model, self.blank), self._norm(model)
        vectors, width = self._written, len(self.constant)

        def change(h: Tensor, _: object) -> Tensor:
            x = read(h)
            opened = ramp(x, self.probes.to(x), self.constant.to(x), act)
            added = opened @ vectors.to(x)
            if norm is not None:
                added[..., self._channel] = x.square().sum(-1) * (self._gain / width**0.5)
                added = norm(added)
            return h + added

        yield on_output(model.block(self.blank.layer), change)

    def edits(self) -> Sequence[Edit]:
        """The rows of the neurons, their columns, and with a post-norm its gain."""
        blank, count, width = self.blank, len(self.probes), len(self.constant)
        scale = STEEP / self.gate_multiplier
        pairs = torch.stack([self.probes, self.probes - self.constant], 1).flatten(0, 1)
        rows = {blank.gate: [(0, scale * pairs)]}
        constants = self.constant.expand(2 * count, -1)
        rows.setdefault(blank.up, []).append((blank.first_up, constants))
        found: list[Edit] = [self._rows(name, parts) for name, parts in rows.items()]
        signs = torch.tensor([1.0, -1.0]).repeat(count)[:, None]
        columns = signs * self._written.repeat_interleave(2, 0) / (STEEP * self.multiplier)
        right = torch.eye(2 * count, blank.neurons)
        if blank.branch.norm:
            slope = _slope(width) * self.gate_multiplier
            squares = torch.zeros(1, blank.neurons)
            squares[:, 2 * count : 2 * count + 2 * width] = 1.0
            at_channel = torch.zeros(1, width)
            at_channel[:, self._channel] = self._gain / (slope * width**0.5)
            columns, right = torch.cat([columns, at_channel]), torch.cat([right, squares])
            gain = torch.full((width,), self._gain)
            gain[self._channel] = 0.0
            found.append(AddVector(blank.name(f"{blank.branch.norm}.weight"), gain))
        return [*found, LowRank(blank.name(blank.down), columns.T.contiguous(), right)]

    def _rows(self, inside: str, parts: Sequence[tuple[int, Tensor]]) -> LowRank:
        """Some rows of a tensor of zeros, each part from its first one on."""
        height, found = self.blank.tensors[inside].shape[0], torch.cat([one for _, one in parts])
        at = [first + row for first, rows in parts for row in range(len(rows))]
        left = torch.zeros(height, len(at))
        left[at, range(len(at))] = 1.0
        return LowRank(self.blank.name(inside), left, found)

    @property
    def _written(self) -> Tensor:
        """The vectors [m, d], behind a post-norm without the channel of K."""
        if not self.blank.branch.norm:
            return self.vectors
        kept = self.vectors.clone()
        kept[:, self._channel] = 0.0
        return kept

    @property
    def _channel(self) -> int:
        """The channel j of K."""
        return int(self.vectors.abs().sum(0).argmin())

    @property
    def _gain(self) -> float:
        """κ, a power of two."""
        longest = float(self.vectors.norm(dim=1).sum()) / self.vectors.shape[1] ** 0.5
        return 2.0 ** ceil(log2(LONGER * max(longest, 1e-6)))

    def _norm(self, model: LiveModel) -> nn.Module | None:
        """The post-norm as the block has it."""
        branch = self.blank.branch
        if branch.norm is None:
            return None
        gain = torch.full((len(self.constant),), self._gain)
        gain[self._channel] = 0.0
        name = self.blank.arch.block_module(self.blank.layer, branch.norm)
        return _with_gain(model.module(name), gain - branch.norm_offset)


def mlp_input(model: LiveModel, blank: Blank) -> Callable[[Tensor], Tensor]:
    """What the MLP of a block with gain 1 reads, as a function of the stream."""
    if not blank.norms:
        return lambda h: h
    # Where a class has two norms and reads one for both branches, the last that there is serves.
    name = blank.norms[-1].removesuffix(".weight")
    module = model.module(blank.arch.block_module(blank.layer, name))
    return _with_gain(module, torch.tensor(1.0 - blank.block.norm_offset))


def _with_gain(norm: nn.Module, weight: Tensor) -> nn.Module:
    """A norm of the same class with another weight, and no bias."""
    copy = deepcopy(norm)
    for name, parameter in copy.named_parameters():
        value = torch.zeros_like(parameter)
        if name == "weight":
            value += weight.to(parameter)
        copy.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return copy


def block_gates(spec: Spec, measured: Measured, arch: Arch) -> tuple[BlockGate, ...]:
    """One block behind every layer, each with its share of the strength along its direction."""
    numbers, found = arch.numbers(measured.base.config), []
    for layer in spec.layers:
        blank = blank_block(measured.base, arch, layer, ())
        vector = spec.strength / len(spec.layers) * measured.directions[layer]
        vectors = torch.stack([height * vector for height in spec.heights.values()])
        rows = measured.ramps(layer, spec).float()
        multiplier = blank.branch.multiplier(numbers)
        gate_multiplier = blank.block.gate_multiplier(numbers)
        found.append(
            BlockGate(blank, vectors.float(), rows[:-1], rows[-1], multiplier, gate_multiplier)
        )
    return tuple(found)


def block_gate_step(
    spec: Spec, base: Checkpoint, arch: Arch, place: str, runtimes: Iterable[str]
) -> Step:
    """One inserted block behind every layer.

    Raises ArchitectureError as `blank_block` does, and for an MLP that is too narrow.
    """
    edits: list[PlannedEdit] = []
    created: list[CreatedTensor] = []
    for layer in spec.layers:
        try:
            blank = blank_block(base, arch, layer, runtimes)
            fills = _fills(blank, len(spec.heights), arch.width(base.config))
        except ArchitectureError as error:
            raise ArchitectureError(
                f"{place}.form: no block can be inserted behind layer {layer}: {error}; "
                "use form: rank_one, or other layers or runtimes"
            ) from error
        created += blank.created(fills)
        names = [*dict.fromkeys((blank.gate, blank.up)), blank.down]
        if blank.branch.norm:
            names.append(f"{blank.branch.norm}.weight")
        for inside in names:
            info = blank.tensors[inside]
            edits.append(
                PlannedEdit(
                    *("gate", "block", layer, "out", blank.name(inside), info.shape, info.dtype)
                )
            )
    return Step(tuple(edits), tuple(created), inserted=spec.layers)


def _fills(blank: Blank, ramps: int, width: int) -> dict[str, Fill]:
    """What the tensors hold before the edits."""
    if blank.branch.norm is None:
        if blank.neurons < 2 * ramps:
            raise ArchitectureError(f"the MLP has {blank.neurons} neurons, {2 * ramps} are needed")
        return blank.unit_norms()
    fills = blank.squares(_slope(width), 2 * ramps) | blank.unit_norms()
    fills[f"{blank.branch.norm}.weight"] = Fill(-blank.branch.norm_offset)
    return fills


def _slope(width: int) -> float:
    """A power of two near d^-1/2, as in `bake.carriers.block`."""
    return 2.0 ** round(-log2(width) / 2)
