"""`ablate`: no writer of the chosen layers writes along the basis any more."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from bake.arch import Arch, Axis, Branch, Written
from bake.carriers import Site, carry
from bake.carriers.gain import read_gain
from bake.checkpoint import Checkpoint, TensorInfo
from bake.edits import Edit, PlannedEdit, Step
from bake.errors import ArchitectureError, FitError
from bake.fit.protect import without
from bake.fit.span import rows_of
from bake.hooks import Intervention
from bake.model import LiveModel
from bake.ops.add import behind_norm_note, carried_add
from bake.ops.cut import Cut, EmbeddingCutKeepingNorms, WriterCutKeepingNorms
from bake.ops.operator import Measured
from bake.recipe import Ablate as Spec

__all__ = ["Ablate", "AblateOperator", "behind_norm", "cuts", "orthonormal", "projected"]

# Below this share of itself a direction is rounding.
NOTHING_LEFT = 1e-3
DEPENDENT = 1e-6


def orthonormal(directions: Tensor) -> Tensor:
    """An orthonormal basis [d, k] of the span of `directions` [k, d], by QR.

    Removing non-orthogonal directions one after another leaves part of their
    span; one basis removes all of it. Raises FitError where one direction lies in the span of
    those before it: what QR would put in its place has nothing to do with them.
    """
    columns = directions.T.to(torch.float64)
    basis: Tensor
    basis, heights = torch.linalg.qr(columns)
    if (heights.diagonal().abs() < DEPENDENT * columns.norm(dim=0)).any():
        raise FitError(
            f"of the {len(directions)} directions to ablate one lies in the span of the others; "
            "give a smaller fit.basis, other layers or variant: plain"
        )
    return basis.to(torch.float32)


def behind_norm(basis: Tensor, gain: Tensor) -> Tensor:
    """The basis [d, k] to take out in front of a norm of gain g, so that none comes out behind it.

    The norm writes g ⊙ y / rms(y), whose component along r is (g ⊙ r)ᵀy / rms(y).
    """
    return orthonormal((gain[:, None] * basis).T)


def projected(direction: Tensor, mean: Tensor) -> Tensor:
    """r - (r·μ) μ / |μ|² [d]: the direction made orthogonal to the answered class's mean.

    The ablation then leaves what that class is on average. Raises FitError when nothing
    of the direction is left. Source: grimjim 2025, "Projected Abliteration".
    """
    left = without(direction, mean)
    if not left.norm() > NOTHING_LEFT * direction.norm():
        raise FitError(
            "variant: projected leaves nothing of the direction, which is that of the contrast "
            "class's own mean; choose other layers, or leave projected out"
        )
    return left


@dataclass(frozen=True, eq=False)
class Ablate:
    """The outputs of the `cuts`' modules without their component along a basis.

    With strength 1, all layers and the embeddings, the stream has no component along R
    anywhere (Arditi et al. 2024, arXiv:2406.11717, section 2.4).
    """

    cuts: tuple[Cut, ...]

    def attach(self, model: LiveModel) -> Iterable[RemovableHandle]:
        """Hook the output of every module."""
        for cut in self.cuts:
            yield cut.attach(model)

    def edits(self) -> Sequence[Edit]:
        """One edit a tensor."""
        return [edit for cut in self.cuts for edit in cut.edits()]


def cuts(
    basis: Tensor,
    names: Iterable[str],
    measured: Measured,
    arch: Arch,
    strengths: Mapping[int, float],
    embeddings: float | None = None,
    keep_norms: bool = False,
) -> tuple[Cut, ...]:
    """The cuts that take `basis` [d, k] out of what the tensors `names` write to the stream.

    `strengths` are by layer, `embeddings` is theirs if they are cut too. With `keep_norms`
    every writer's matrix keeps its norms by input column.
    """
    branches: dict[tuple[int, Branch], list[Written]] = {}
    for layer, written in arch.written(names).items():
        for one in written:
            branches.setdefault((layer, one.branch), []).append(one)
    found: list[Cut] = []
    for (layer, branch), writers in branches.items():
        norm = arch.post_norm(layer, branch)
        own = behind_norm(basis, read_gain(measured.base, norm)) if norm else basis
        if keep_norms:
            found += [
                WriterCutKeepingNorms(one.module, own, _tensors([one]), strengths[layer])
                for one in writers
            ]
        else:
            module = arch.block_module(layer, branch.module)
            found.append(Cut(module, own, _tensors(writers), strengths[layer]))
    if embeddings is not None:
        kind = EmbeddingCutKeepingNorms if keep_norms else Cut
        found += [
            kind(name, basis, ((f"{name}.weight", -1),), embeddings) for name in arch.embeddings
        ]
    return tuple(found)


class AblateOperator:
    """`op: ablate`: the span of one direction or several, out of every writer of the layers.

    `norm-preserving` with `projected` is MPOA (grimjim 2025). `affine` is the map
    h ← h - λ R Rᵀ h + λ R Rᵀ μ of ACE (Marshall et al. 2024, arXiv:2411.09003) with μ the
    contrast class's mean where the direction was measured: the writers are cut as they are
    without it, and λ R Rᵀ μ is added to the stream once, before anything reads what the first
    cut writer wrote. That is after the attention of the first layer, or after all of it where
    blocks are parallel, or on the embedding where that is cut too. With strength 1 the stream
    from there on is R Rᵀ μ along R, plus what writers that are not cut write along R: with all
    layers and the embeddings, nothing.
    """

    def plan(
        self, spec: Spec, base: Checkpoint, arch: Arch, place: str, runtimes: Iterable[str]
    ) -> Step:
        """The writers' weights, the biases that they have, and on demand the embeddings.

        Raises ArchitectureError for the embedding of a tied model, which is its
        unembedding too, and for experts that are to keep their norms.
        """
        arch.check_layers(spec.layers, base.config, f"{place}.layers")
        if spec.kernel:
            arch.check_layers((spec.kernel.peak,), base.config, f"{place}.kernel.peak")
        written = arch.written(base.tensors)
        keep_norms = "norm-preserving" in spec.variant
        edits, notes = [], []
        for layer in spec.strengths:
            for one in written[layer]:
                names = (one.weight, one.bias) if one.bias else (one.weight,)
                if keep_norms:
                    _check_writer(one, base.find(one.weight), place)
                edits += [_planned(base, layer, one.branch.site, name) for name in names]
        if spec.embeddings:
            if arch.tied(base.tensors):
                raise ArchitectureError(
                    f"{place}.embeddings: the embedding is also the unembedding of this model "
                    "(tied), so editing it changes the output too; set embeddings: false"
                )
            edits += [
                _planned(base, None, "embedding", f"{name}.weight") for name in arch.embeddings
            ]
        if spec.variant != ("plain",):
            notes.append(f"{place}: {' and '.join(spec.variant)} ablation")
        if spec.kernel:
            by_layer = ", ".join(f"{layer}: {one:.3g}" for layer, one in spec.strengths.items())
            notes.append(f"{place}: strength by layer {by_layer}")
        step = Step(tuple(edits), notes=tuple(notes), reads_base=keep_norms)
        if "affine" not in spec.variant:
            return step
        return _with_constant(step, spec, base, arch, place, runtimes)

    def layers(self, spec: Spec) -> tuple[int, ...]:
        """One layer's directions serve all: those of the middle of the edited layers."""
        edited = tuple(spec.strengths)
        return (edited[len(edited) // 2],)

    def probed(self, step: Step) -> tuple[str, ...]:
        """None."""
        return ()

    def build(
        self, spec: Spec, step: Step, measured: Measured, arch: Arch
    ) -> tuple[Intervention, ...]:
        """One intervention over all writers, and for `affine` the constant's."""
        (layer,) = self.layers(spec)
        directions = rows_of(measured.directions[layer])
        if "projected" in spec.variant:
            mean = measured.means[layer]
            directions = torch.stack([projected(one, mean) for one in directions])
        basis = orthonormal(directions)
        names = [edit.tensor for edit in step.edits if edit.operator == "ablate"]
        embeddings = spec.strength if spec.embeddings else None
        keep_norms = "norm-preserving" in spec.variant
        found = cuts(basis, names, measured, arch, spec.strengths, embeddings, keep_norms)
        ablation = Ablate(found)
        if "affine" not in spec.variant:
            return (ablation,)
        kept = spec.strength * (basis @ (basis.T @ measured.means[layer].float()))
        at, site = _constant_site(spec, arch, measured.base)
        carried, _ = carry(measured.base, arch, at, site, step.edits[-1].carrier, ())
        return (ablation, carried_add(measured.base, at, site, kept, carried))


def _with_constant(
    step: Step, spec: Spec, base: Checkpoint, arch: Arch, place: str, runtimes: Iterable[str]
) -> Step:
    """The step with the carrier of the constant that `affine` adds, as its last edit."""
    layer, site = _constant_site(spec, arch, base)
    found, why = carry(base, arch, layer, site, "auto", runtimes)
    edit = PlannedEdit(*("add", found.carrier, layer, site, found.tensor, found.shape, found.dtype))
    note = (
        f"{place}: the constant goes to site {site} of layer {layer}, "
        f"{found.carrier} carrier ({why}){behind_norm_note(found)}"
    )
    return replace(
        step,
        edits=(*step.edits, edit),
        created=found.created,
        config=found.config,
        notes=(*step.notes, note),
        inserted=found.inserted,
    )


def _constant_site(spec: Spec, arch: Arch, base: Checkpoint) -> tuple[int, Site]:
    """Where the constant of `affine` joins the stream: where the first cut writer does."""
    if spec.embeddings:
        return 0, "in"
    return spec.layers[0], "out" if arch.is_parallel(base.config) else "mid"


def _check_writer(one: Written, info: TensorInfo, place: str) -> None:
    """Refuse experts: fused in memory, there is no module whose input a hook could read."""
    if "{expert}" in one.writer.module or len(info.shape) > 2:
        raise ArchitectureError(
            f"{place}.variant: {one.weight}: the experts are one tensor in memory, where no hook "
            "sees what this matrix reads; leave norm-preserving out"
        )


def _planned(base: Checkpoint, layer: int | None, site: str, name: str) -> PlannedEdit:
    info = base.find(name)
    return PlannedEdit("ablate", "-", layer, site, info.name, info.shape, info.dtype)


def _tensors(writers: Iterable[Written]) -> tuple[tuple[str, Axis], ...]:
    found: list[tuple[str, Axis]] = []
    for one in writers:
        found.append((one.weight, one.writer.axis))
        if one.bias:
            found.append((one.bias, -1))
    return tuple(found)
