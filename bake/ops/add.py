"""`add`: h ← h + α v at one site of the residual stream, at every position."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from bake.arch import Arch
from bake.carriers.bias import bias_carrier
from bake.checkpoint import Checkpoint
from bake.edits import AddVector, Edit, PlannedEdit, Step
from bake.hooks import Intervention, on_output
from bake.model import LiveModel
from bake.ops.operator import Measured
from bake.recipe import Add as Spec

__all__ = ["Add", "AddOperator"]


@dataclass(frozen=True, eq=False)
class Add:
    """Add `vector` [d], strength included, at h_out or h_mid of `layer`.

    `bias` names the writer's bias that carries it, over the `multiplier` of its branch,
    whose module is `branch`. A direction measured at the input of block l is added to the
    output of block l - 1 (Arditi et al. 2024, arXiv:2406.11717, whose code sets
    down_proj.bias of the previous block).
    """

    layer: int
    site: Literal["out", "mid"]
    vector: Tensor
    bias: str
    branch: str
    multiplier: float = 1.0

    def attach(self, model: LiveModel) -> Iterable[RemovableHandle]:
        """Hook the block's output, or for `mid` the attention's."""
        if self.site == "out":
            module, vector = model.block(self.layer), self.vector
        else:
            module, vector = model.model.get_submodule(self.branch), self._written
        yield on_output(module, lambda output, _: output + vector.to(output.dtype))

    def edits(self) -> Sequence[Edit]:
        """One bias."""
        return (AddVector(self.bias, self._written),)

    @property
    def _written(self) -> Tensor:
        return self.vector / self.multiplier


class AddOperator:
    """`op: add`, through the bias carrier."""

    def plan(
        self, spec: Spec, base: Checkpoint, arch: Arch, place: str, runtimes: Iterable[str]
    ) -> Step:
        """One bias: `out` follows the MLP, so that is its writer; `mid` follows the attention."""
        arch.check_layers((spec.layer,), base.config, f"{place}.layer")
        carrier = bias_carrier(base, arch, spec.layer, spec.site, runtimes)
        edit = PlannedEdit(
            "add", "bias", spec.layer, spec.site, carrier.tensor, carrier.shape, carrier.dtype
        )
        return Step((edit,), carrier.created, carrier.config)

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
        bias = step.edits[0].tensor
        branch = arch.branch_of(bias)
        return (
            Add(
                spec.layer,
                spec.site,
                vector,
                bias,
                arch.block_module(spec.layer, branch.module),
                branch.multiplier(measured.base.config),
            ),
        )
