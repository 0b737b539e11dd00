"""`add`: h ← h + α v at one site of the residual stream, at every position."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from bake.arch import Arch
from bake.carriers import Carried, Site, carry
from bake.carriers.gain import in_front_of
from bake.checkpoint import Checkpoint
from bake.edits import AddVector, Edit, LowRank, PlannedEdit, Step
from bake.hooks import Intervention, on_output
from bake.model import LiveModel
from bake.ops.operator import Measured
from bake.recipe import Add as Spec

__all__ = ["Add", "AddOperator", "behind_norm_note", "carried_add"]


@dataclass(frozen=True, eq=False)
class Add:
    """Add `vector` [d], strength included, at h_in, h_mid or h_out of `layer`.

    `carried` is where the weights hold it; `readout` [d_in] reads the constant 1 for a
    ridge carrier. In front of a post-norm the weights hold `in_front` [d] in place of the
    vector, and the readout reads the root mean square of what the norm divides by it.

    A direction measured at the input of block l is added to the output of block l - 1
    (Arditi et al. 2024, arXiv:2406.11717, whose code sets down_proj.bias of the previous
    block).
    """

    layer: int
    site: Site
    vector: Tensor
    carried: Carried
    readout: Tensor | None = None
    in_front: Tensor | None = None

    def attach(self, model: LiveModel) -> Iterable[RemovableHandle]:
        """Hook the block's input or output, or for `mid` the attention's, behind its norm."""
        if self.site == "in":
            yield model.block(self.layer).register_forward_pre_hook(self._shift_input)
        elif self.site == "out":
            yield on_output(model.block(self.layer), lambda h, _: h + self.vector.to(h))
        else:
            branch = model.module(self.carried.branch)
            yield on_output(branch, lambda y, _: y + self._written.to(y))

    def edits(self) -> Sequence[Edit]:
        """One edit of the tensor that carries the vector."""
        left = self._written
        if self.carried.neurons:
            right = torch.ones(self.carried.neurons)
        elif self.carried.carrier == "ridge":
            assert self.readout is not None
            left = self._written if self.in_front is None else self.in_front
            right = self.readout
        else:
            return (AddVector(self.carried.tensor, left),)
        if self.carried.axis == -1:
            left, right = right, left
        return (LowRank(self.carried.tensor, left[:, None], right[None, :]),)

    @property
    def _written(self) -> Tensor:
        return self.vector / self.carried.multiplier

    def _shift_input(self, _: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0] + self.vector.to(inputs[0]), *inputs[1:])


class AddOperator:
    """`op: add`, through the carrier that the recipe names or the plan chooses."""

    def plan(
        self, spec: Spec, base: Checkpoint, arch: Arch, place: str, runtimes: Iterable[str]
    ) -> Step:
        """One tensor."""
        arch.check_layers((spec.layer,), base.config, f"{place}.layer")
        found, why = carry(base, arch, spec.layer, spec.site, spec.carrier, runtimes)
        edit = PlannedEdit(
            *("add", found.carrier, spec.layer, spec.site, found.tensor, found.shape, found.dtype)
        )
        note = f"{place}: {found.carrier} carrier ({why}){behind_norm_note(found)}"
        return Step((edit,), found.created, found.config, (note,), inserted=found.inserted)

    def layers(self, spec: Spec) -> tuple[int, ...]:
        """The layer itself."""
        return (spec.layer,)

    def probed(self, step: Step) -> tuple[str, ...]:
        """None."""
        return ()

    def build(
        self, spec: Spec, step: Step, measured: Measured, arch: Arch
    ) -> tuple[Intervention, ...]:
        """The layer's direction, `strength` gaps long."""
        vector = (spec.strength * measured.directions[spec.layer]).float()
        carrier = step.edits[0].carrier
        found, _ = carry(measured.base, arch, spec.layer, spec.site, carrier, ())
        return (carried_add(measured.base, spec.layer, spec.site, vector, found),)


def carried_add(base: Checkpoint, layer: int, site: Site, vector: Tensor, carried: Carried) -> Add:
    """The addition of `vector` through a carrier, with what stands in front of a post-norm.

    Raises what `in_front_of` does.
    """
    if carried.norm is None:
        return Add(layer, site, vector, carried)
    written = in_front_of(vector / carried.multiplier, base, carried.norm)
    return Add(layer, site, vector, carried, in_front=written)


def behind_norm_note(carried: Carried) -> str:
    """What the plan says of a vector in front of a post-norm; nothing where there is none."""
    if carried.norm is None:
        return ""
    return (
        f"; {carried.norm.module} rescales the sum, so the vector is added nearly: "
        "verify.ridge_lost_share decides"
    )
