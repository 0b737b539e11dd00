"""`ablate`: no writer of the chosen layers writes along the basis any more."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from bake.archs import Arch, Site
from bake.checkpoint import Checkpoint, TensorInfo
from bake.edits import Edit, PlannedEdit, RemoveSubspace, Step
from bake.errors import ArchitectureError
from bake.hooks import Intervention, on_output
from bake.model import LiveModel
from bake.ops.operator import Measured
from bake.recipe import Ablate as Spec

__all__ = ["Ablate", "AblateOperator", "orthonormal"]


def orthonormal(directions: Tensor) -> Tensor:
    """An orthonormal basis [d, k] of the span of `directions` [k, d], by QR.

    Removing non-orthogonal directions one after another leaves part of their
    span; one basis removes all of it.
    """
    basis: Tensor = torch.linalg.qr(directions.T.to(torch.float64)).Q
    return basis.to(torch.float32)


@dataclass(frozen=True, eq=False)
class Ablate:
    """y ← y - λ R Rᵀ y for the output y of every writer in `modules`; R = `basis` [d, k].

    `modules` are (module name, has a bias) pairs; `embedding` is the module name of
    the token embedding when that is ablated too. With λ = 1, all layers and the
    embedding, the stream has no component along R anywhere (Arditi et al. 2024,
    arXiv:2406.11717, section 2.4).
    """

    basis: Tensor
    modules: tuple[tuple[str, bool], ...]
    strength: float = 1.0
    embedding: str | None = None

    def attach(self, model: LiveModel) -> Iterable[RemovableHandle]:
        """Hook the output of every named module."""
        for name in self._written():
            yield on_output(
                model.model.get_submodule(name), lambda output, _: self._without(output)
            )

    def edits(self) -> Sequence[Edit]:
        """One edit a weight, one a bias; the embedding's written side is its second axis."""
        basis, strength = self.basis, self.strength
        edits = [RemoveSubspace(f"{name}.weight", basis, strength) for name, _ in self.modules]
        edits += [
            RemoveSubspace(f"{name}.bias", basis, strength)
            for name, biased in self.modules
            if biased
        ]
        if self.embedding:
            edits.append(RemoveSubspace(f"{self.embedding}.weight", basis, strength, axis=1))
        return edits

    def _written(self) -> list[str]:
        names = [name for name, _ in self.modules]
        return [*names, self.embedding] if self.embedding else names

    def _without(self, output: Tensor) -> Tensor:
        basis = self.basis.to(output.dtype)
        return output - self.strength * ((output @ basis) @ basis.T)


class AblateOperator:
    """`op: ablate`: one direction, out of every writer of the chosen layers."""

    def plan(
        self, spec: Spec, base: Checkpoint, arch: Arch, place: str, runtimes: Iterable[str]
    ) -> Step:
        """The writers' weights, the biases that they have, and on demand the embedding.

        Raises ArchitectureError for the embedding of a tied model, which is its
        unembedding too.
        """
        arch.check_layers(spec.layers, base.config, f"{place}.layers")
        sites: tuple[Site, ...] = ("attention", "mlp")
        edits = []
        for layer in spec.layers:
            for site in sites:
                module = arch.module_name(layer, arch.writer(site))
                edits.append(_planned(layer, site, base.find(f"{module}.weight")))
                if f"{module}.bias" in base.tensors:
                    edits.append(_planned(layer, site, base.find(f"{module}.bias")))
        if spec.embeddings:
            if "lm_head.weight" not in base.tensors:
                raise ArchitectureError(
                    f"{place}.embeddings: the embedding is also the unembedding of this model "
                    "(tied), so editing it changes the output too; set embeddings: false"
                )
            edits.append(_planned(None, "embedding", base.find(f"{arch.embedding}.weight")))
        return Step(tuple(edits))

    def layers(self, spec: Spec) -> tuple[int, ...]:
        """One direction serves all: that of the middle of the chosen layers."""
        return (spec.layers[len(spec.layers) // 2],)

    def probed(self, step: Step) -> tuple[str, ...]:
        """None."""
        return ()

    def build(
        self, spec: Spec, step: Step, measured: Measured, arch: Arch
    ) -> tuple[Intervention, ...]:
        """One intervention over all writers."""
        basis = orthonormal(measured.directions[self.layers(spec)[0]][None])
        tensors = {edit.tensor for edit in step.edits}
        modules = tuple(
            (name.removesuffix(".weight"), name.replace(".weight", ".bias") in tensors)
            for name in (edit.tensor for edit in step.edits if edit.site != "embedding")
            if name.endswith(".weight")
        )
        embedding = arch.embedding if spec.embeddings else None
        return (Ablate(basis, modules, spec.strength, embedding),)


def _planned(layer: int | None, site: str, info: TensorInfo) -> PlannedEdit:
    return PlannedEdit("ablate", "-", layer, site, info.name, info.shape, info.dtype)
