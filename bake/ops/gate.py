"""`gate`, rank-one: a writer adds v · cᵀa, with a its own input and c a probe.

On the target's decision tokens cᵀa is near 1, on protected and general ones near
0, so the condition is part of the weights: W' = W + v cᵀ.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from bake.arch import Arch, Written
from bake.checkpoint import Checkpoint, TensorInfo
from bake.edits import Edit, LowRank, PlannedEdit, Step
from bake.errors import ArchitectureError
from bake.hooks import Intervention, on_output
from bake.model import LiveModel
from bake.ops.operator import Measured
from bake.recipe import Gate as Spec

__all__ = ["Gate", "GateOperator"]


@dataclass(frozen=True, eq=False)
class Gate:
    """y ← y + v (cᵀa) at one writer: `vector` v [d_out], strength included, `probe` c [d_in].

    The edit of the weight is exact: the hook and W + v cᵀ are the same map. `axis` is
    the weight's written one.
    """

    module: str
    vector: Tensor
    probe: Tensor
    axis: Literal[-2, -1] = -2

    def attach(self, model: LiveModel) -> Iterable[RemovableHandle]:
        """Hook the writer, whose input the probe reads."""

        def change(output: Tensor, a: Tensor) -> Tensor:
            opening = a @ self.probe.to(a.dtype)
            return output + opening.unsqueeze(-1) * self.vector.to(output.dtype)

        yield on_output(model.module(self.module), change)

    def edits(self) -> Sequence[Edit]:
        """One rank-one write."""
        written, read = self.vector, self.probe
        if self.axis == -1:
            written, read = read, written
        return (LowRank(f"{self.module}.weight", written[:, None], read[None, :]),)


class GateOperator:
    """`op: gate`: one rank-one gate at every chosen writer."""

    def plan(
        self, spec: Spec, base: Checkpoint, arch: Arch, place: str, runtimes: Iterable[str]
    ) -> Step:
        """The weight of every writer at the chosen sites of the chosen layers.

        Raises ArchitectureError for writers that a gate cannot use.
        """
        arch.check_layers(spec.layers, base.config, f"{place}.layers")
        written = arch.written(base.tensors)
        edits = []
        for layer in spec.layers:
            for one in written[layer]:
                if one.branch.site not in spec.sites:
                    continue
                info = base.find(one.weight)
                _check(one, info, arch, place)
                site = one.branch.site
                edits.append(
                    PlannedEdit("gate", "rank-one", layer, site, info.name, info.shape, info.dtype)
                )
        return Step(tuple(edits))

    def layers(self, spec: Spec) -> tuple[int, ...]:
        """Every gated layer writes along its own direction."""
        return spec.layers

    def probed(self, step: Step) -> tuple[str, ...]:
        """Every gated writer."""
        return tuple(edit.tensor.removesuffix(".weight") for edit in step.edits)

    def build(
        self, spec: Spec, step: Step, measured: Measured, arch: Arch
    ) -> tuple[Intervention, ...]:
        """The strength is spread evenly over the writers."""
        share = spec.strength / len(step.edits)
        gates = []
        for writers in arch.written(edit.tensor for edit in step.edits).values():
            for one in writers:
                multiplier = one.branch.multiplier(arch.numbers(measured.base.config))
                vector = (share / multiplier * measured.directions[one.layer]).float()
                probe = measured.probe(one.module, spec.ridge).float()
                gates.append(Gate(one.module, vector, probe, one.writer.axis))
        return tuple(gates)


def _check(one: Written, info: TensorInfo, arch: Arch, place: str) -> None:
    """Refuse a writer whose output is not the stream's, or that not every token passes."""
    if one.branch.norm:
        raise ArchitectureError(
            f"{place}.sites: {one.weight}: model_type '{arch.model_type}' rescales what it writes "
            f"({one.branch.norm}); a gate there has no exact form yet, use op: ablate"
        )
    if "expert" in one.writer.module or len(info.shape) > 2:
        raise ArchitectureError(
            f"{place}.sites: {one.weight}: a token passes few of the experts, so a gate cannot "
            "read every token there; use sites: [attention]"
        )
