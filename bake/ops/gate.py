"""`gate`, rank-one: a writer adds v · cᵀa, with a its own input and c a probe.

On the target's decision tokens cᵀa is near 1, on protected and general ones near
0, so the condition is part of the weights: W' = W + v cᵀ.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from bake.archs import Arch
from bake.checkpoint import Checkpoint
from bake.edits import Edit, LowRank, PlannedEdit, Step
from bake.hooks import Intervention, on_output
from bake.model import LiveModel
from bake.ops.operator import Measured
from bake.recipe import Gate as Spec

__all__ = ["Gate", "GateOperator"]


@dataclass(frozen=True, eq=False)
class Gate:
    """y ← y + v (cᵀa) at one writer: `vector` v [d_out], strength included, `probe` c [d_in].

    The edit of the weight is exact: the hook and W + v cᵀ are the same map.
    """

    module: str
    vector: Tensor
    probe: Tensor

    def attach(self, model: LiveModel) -> Iterable[RemovableHandle]:
        """Hook the writer, whose input the probe reads."""

        def change(output: Tensor, a: Tensor) -> Tensor:
            opening = a @ self.probe.to(a.dtype)
            return output + opening.unsqueeze(-1) * self.vector.to(output.dtype)

        yield on_output(model.model.get_submodule(self.module), change)

    def edits(self) -> Sequence[Edit]:
        """One rank-one write."""
        return (LowRank(f"{self.module}.weight", self.vector[:, None], self.probe[None, :]),)


class GateOperator:
    """`op: gate`: one rank-one gate at every chosen writer."""

    def plan(
        self, spec: Spec, base: Checkpoint, arch: Arch, place: str, runtimes: Iterable[str]
    ) -> Step:
        """The weight of every writer at the chosen sites of the chosen layers."""
        arch.check_layers(spec.layers, base.config, f"{place}.layers")
        edits = []
        for layer in spec.layers:
            for site in spec.sites:
                info = base.find(f"{arch.module_name(layer, arch.writer(site))}.weight")
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
        for edit, module in zip(step.edits, self.probed(step), strict=True):
            assert edit.layer is not None
            vector = (share * measured.directions[edit.layer]).float()
            gates.append(Gate(module, vector, measured.probe(module, spec.ridge).float()))
        return tuple(gates)
