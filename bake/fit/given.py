"""Probes of gates from a file, in place of fitted ones.

It is a safetensors file with tensors of a float type: for each gated writer `probe.{module}`
[d_in]; for a block gate, behind every layer, either `ramp.{layer}` [m + 1, d], its probes and last
the readout of the constant, as bake fits them, or `probe.{layer}` [d] or [m, d], what each of the m
ramps reads off the input of the block's MLP. Between which readings it opens, the recipe's prompts
then say. `edits.{number}.` in front of a name makes it that edit's alone, as in the
`steering/fit.safetensors` of a bake. All other tensors are left alone.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bake.checkpoint import EDITABLE, TensorInfo, read_shard, read_tensor
from bake.edits import Step
from bake.errors import CheckpointError, ProbesError
from bake.fit.kept import probe_key, ramp_key
from bake.plan import Plan
from bake.recipe import Gate, OwnDecision, Recipe

__all__ = ["GivenProbes", "given_probes"]


@dataclass(frozen=True, eq=False)
class GivenProbes:
    """What a file has for one gate.

    `kept` are probes by the names of `bake.fit.kept`, with which nothing is left to be fitted;
    `conditions` [m, d] by layer what a block gate's ramps read.
    """

    kept: Mapping[str, Tensor] = field(default_factory=dict)
    conditions: Mapping[int, Tensor] = field(default_factory=dict)


def given_probes(recipe: Recipe, plan: Plan) -> dict[int, GivenProbes]:
    """The probes by the number of the edit, of every gate that names a file.

    Raises ProbesError, in one line, for a file that cannot be read, and for a tensor that is
    missing, of another shape, not finite or zero.
    """
    return {
        number: _of_file(Path(spec.probes), number, spec, step, plan.width)
        for number, (spec, step) in enumerate(zip(recipe.edits, plan.steps, strict=True))
        if isinstance(spec, Gate) and spec.probes is not None
    }


def _of_file(path: Path, number: int, spec: Gate, step: Step, width: int) -> GivenProbes:
    file = _File(path, number, _tensors(path))
    if spec.form == "rank_one":
        writers = _writers(number, step, width)
        return GivenProbes({key: file.read(name, [shape]) for name, key, shape in writers})
    count = len(spec.heights)
    if file.has(f"ramp.{spec.layers[0]}"):
        if spec.positions != OwnDecision():
            raise ProbesError(
                f"edits.{number}.positions: {path} has the ramps of this gate, so none is fitted; "
                "leave one out"
            )
        shape = (count + 1, width)
        return GivenProbes(
            {ramp_key(number, one): file.read(f"ramp.{one}", [shape]) for one in spec.layers}
        )
    shapes = [(count, width), *([(width,)] if count == 1 else [])]
    found = {one: file.read(f"probe.{one}", shapes) for one in spec.layers}
    return GivenProbes(conditions={one: rows.reshape(count, width) for one, rows in found.items()})


def _writers(number: int, step: Step, width: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Of every gated writer the name of its probe in a file, its key, and its shape."""
    for edit in step.edits:
        module = edit.tensor.removesuffix(".weight")
        inputs = edit.shape[0] * edit.shape[1] // width
        yield f"probe.{module}", probe_key(number, module), (inputs,)


@dataclass(frozen=True)
class _File:
    """The tensors of a file for an edit of some number."""

    path: Path
    number: int
    tensors: Mapping[str, TensorInfo]

    def has(self, name: str) -> bool:
        """Whether it has a tensor of that name."""
        return self._find(name) is not None

    def read(self, name: str, shapes: list[tuple[int, ...]]) -> Tensor:
        """A tensor of one of some shapes, as float32; raises ProbesError."""
        info = self._find(name)
        place = f"{self.path}: {name}"
        if info is None:
            raise ProbesError(
                f"{place}: there is no such tensor, which edits.{self.number} needs; add it, or "
                f"leave edits.{self.number}.probes out"
            )
        if info.shape not in shapes:
            wanted = " or ".join(str(list(one)) for one in shapes)
            raise ProbesError(
                f"{place}: has the shape {list(info.shape)}, and edits.{self.number} needs "
                f"{wanted}; give probes of this model and gate"
            )
        if info.dtype not in EDITABLE:
            raise ProbesError(f"{place}: is of type {info.dtype}; save it as float32")
        try:
            found = read_tensor(info).float()
        except CheckpointError as error:
            raise ProbesError(str(error)) from error
        if not torch.isfinite(found).all():
            raise ProbesError(f"{place}: holds numbers that are not finite; save it again")
        if not found.reshape(-1, found.shape[-1]).any(-1).all():
            raise ProbesError(f"{place}: a probe of zeros reads nothing; give another")
        return found

    def _find(self, name: str) -> TensorInfo | None:
        return self.tensors.get(f"edits.{self.number}.{name}", self.tensors.get(name))


def _tensors(path: Path) -> dict[str, TensorInfo]:
    """The headers of a file's tensors by name."""
    if not path.is_file():
        raise ProbesError(f"{path}: there is no such file; give a safetensors file of probes")
    try:
        return {info.name: info for info in read_shard(path).tensors}
    except CheckpointError as error:
        reason = " ".join(str(error).removeprefix(f"{path}: ").split())
        raise ProbesError(f"{path}: {reason[:240]}; give a safetensors file of probes") from error
