"""`gate`, rank-one: a writer adds v · cᵀa, with a its own input and c a probe.

On the target's decision tokens cᵀa is near 1, on general ones near 0, on protected ones near
0 or where they shall be steered to, so the condition is part of the weights: W' = W + v cᵀ.

Where a post-norm of gain g follows y = W a, the write is (v / g) cᵀ and c reads rms(y) in
place of 1. The stream then receives (g ⊙ ŷ + v γ) / s, with ŷ = y / rms(y), γ near 1 on the
target and near 0 elsewhere, and s = rms(ŷ + γ v / g) from the norm: exactly what it was where
the gate is closed, and v on a rescaled sum where it is open. The gate is its own reference,
a write in front of the norm, so hook and weights are the same map here too.

`form: block` is in `bake.ops.block_gate`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from bake.arch import Arch, Written
from bake.carriers.gain import in_front_of
from bake.checkpoint import Checkpoint, TensorInfo
from bake.edits import Edit, LowRank, PlannedEdit, Step
from bake.errors import ArchitectureError
from bake.hooks import Intervention, on_output
from bake.model import LiveModel
from bake.ops.block_gate import block_gate_step, block_gates
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
            opening = a @ self.probe.to(a)
            return output + opening.unsqueeze(-1) * self.vector.to(output)

        yield on_output(model.module(self.module), change)

    def edits(self) -> Sequence[Edit]:
        """One rank-one write."""
        written, read = self.vector, self.probe
        if self.axis == -1:
            written, read = read, written
        return (LowRank(f"{self.module}.weight", written[:, None], read[None, :]),)


class GateOperator:
    """`op: gate`: a rank-one gate at every chosen writer, or a block behind every chosen layer."""

    def plan(
        self, spec: Spec, base: Checkpoint, arch: Arch, place: str, runtimes: Iterable[str]
    ) -> Step:
        """The weight of every writer at the chosen sites of the chosen layers, or inserted blocks.

        Raises ArchitectureError for writers that a gate cannot use, and where no block can be.
        """
        arch.check_layers(spec.layers, base.config, f"{place}.layers")
        if spec.form == "block":
            step = block_gate_step(spec, base, arch, place, runtimes)
        else:
            step = self._writers(spec, base, arch, place)
        notes = []
        if own := spec.positions.model_dump(exclude_none=True):
            said = ", ".join(f"{key} {value}" for key, value in own.items())
            notes.append(f"{place}: decides at positions of its own: {said}")
        if spec.probes is not None:
            notes.append(f"{place}: its probes are those of {spec.probes}")
        return replace(step, notes=(*step.notes, *notes))

    def _writers(self, spec: Spec, base: Checkpoint, arch: Arch, place: str) -> Step:
        """The rank-one edits."""
        written = arch.written(base.tensors)
        edits, norms = [], []
        for layer in spec.layers:
            for one in written[layer]:
                if one.branch.site not in spec.sites:
                    continue
                info = base.find(one.weight)
                _check(one, info, place)
                site = one.branch.site
                norm = arch.post_norm(layer, one.branch)
                norms += [norm.module] if norm else []
                edits.append(
                    PlannedEdit("gate", "rank-one", layer, site, info.name, info.shape, info.dtype)
                )
        note = f"{place}: what the gate adds is rescaled with the rest by {', '.join(norms)}"
        return Step(tuple(edits), notes=(note,) if norms else ())

    def layers(self, spec: Spec) -> tuple[int, ...]:
        """Every gated layer writes along its own direction."""
        return spec.layers

    def probed(self, step: Step) -> tuple[str, ...]:
        """Every gated writer; a block's probes are those of `Measured.ramps`."""
        return tuple(
            edit.tensor.removesuffix(".weight") for edit in step.edits if edit.carrier != "block"
        )

    def build(
        self, spec: Spec, step: Step, measured: Measured, arch: Arch
    ) -> tuple[Intervention, ...]:
        """The strength is spread evenly over the writers, or over the blocks."""
        if spec.form == "block":
            return block_gates(spec, measured, arch)
        share = spec.strength / len(step.edits)
        gates = []
        for writers in arch.written(edit.tensor for edit in step.edits).values():
            for one in writers:
                multiplier = one.branch.multiplier(arch.numbers(measured.base.config))
                vector = (share / multiplier * measured.directions[one.layer]).float()
                norm = arch.post_norm(one.layer, one.branch)
                if norm:
                    vector = in_front_of(vector, measured.base, norm)
                probe = measured.probe(one.module, spec).float()
                gates.append(Gate(one.module, vector, probe, one.writer.axis))
        return tuple(gates)


def _check(one: Written, info: TensorInfo, place: str) -> None:
    """Refuse a writer that not every token passes."""
    if "expert" in one.writer.module or len(info.shape) > 2:
        raise ArchitectureError(
            f"{place}.sites: {one.weight}: a token passes few of the experts, so a gate cannot "
            "read every token there; use sites: [attention]"
        )
