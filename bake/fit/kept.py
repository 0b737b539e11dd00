"""What a fit found beside its directions, as a file: enough to build the interventions again.

The tensors are F32: `edits.{number}.probe.{module}` [d_in] of a gate, `edits.{number}.readout`
[d_in] of a ridge carrier's constant, `edits.{number}.ramp.{layer}` [m + 1, d] of a block gate,
`mean.{layer}` [d] of the answered class, for ablations that
read it. `number` counts the recipe's edits from 0. Where directions were given and biases or
inserted blocks carry them, there is nothing beside them and no file.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from bake.arch import Arch
from bake.checkpoint import Checkpoint
from bake.directions import Directions
from bake.errors import ManifestError
from bake.hooks import Intervention
from bake.ops import OPERATORS, Measured
from bake.ops.add import Add
from bake.plan import Plan
from bake.recipe import Gate, Recipe

__all__ = [
    "built_again",
    "mean_key",
    "opening_key",
    "probe_key",
    "ramp_key",
    "read_kept",
    "readout_key",
    "write_kept",
]


def probe_key(number: int, module: str) -> str:
    """The name of a gate's probe."""
    return f"edits.{number}.probe.{module}"


def opening_key(number: int, module: str) -> str:
    """The name of what a gate reads or opens at a module; several may read the same one."""
    return f"edits.{number}.{module}"


def readout_key(number: int) -> str:
    """The name of the constant's readout of a ridge carrier."""
    return f"edits.{number}.readout"


def ramp_key(number: int, layer: int) -> str:
    """The name of a block gate's probes behind a layer, and last its constant's readout."""
    return f"edits.{number}.ramp.{layer}"


def mean_key(layer: int) -> str:
    """The name of the answered class's mean behind a block."""
    return f"mean.{layer}"


def write_kept(kept: Mapping[str, Tensor], path: Path) -> None:
    """Write what was kept; the same tensors give the same bytes."""
    # `save_file` makes a file for its owner alone.
    path.write_bytes(save({name: tensor.contiguous() for name, tensor in kept.items()}))


def read_kept(path: Path) -> dict[str, Tensor]:
    """Read what was kept; nothing where there is no file. Raises ManifestError."""
    if not path.exists():
        return {}
    try:
        found: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ManifestError(f"{path}: cannot be read: {error}; download it again") from error
    return found


def built_again(
    recipe: Recipe,
    plan: Plan,
    base: Checkpoint,
    arch: Arch,
    directions: Directions,
    kept: Mapping[str, Tensor],
) -> tuple[Intervention, ...]:
    """The interventions of a fit, from its directions and from what it kept.

    Raises ManifestError where the plan needs what is not there.
    """

    def probe(number: int, module: str, spec: Gate) -> Tensor:
        return kept[probe_key(number, module)]

    def ramps(number: int, layer: int, spec: Gate) -> Tensor:
        return kept[ramp_key(number, layer)]

    means = {
        int(name.removeprefix("mean.")): tensor
        for name, tensor in kept.items()
        if name.startswith("mean.")
    }
    found: list[Intervention] = []
    try:
        for number, (spec, step) in enumerate(zip(recipe.edits, plan.steps, strict=True)):
            own = partial(probe, number), base, means, partial(ramps, number)
            measured = Measured(directions.vectors, *own)
            for one in OPERATORS[spec.op].build(spec, step, measured, arch):
                if isinstance(one, Add) and one.carried.carrier == "ridge":
                    one = replace(one, readout=kept[readout_key(number)])
                found.append(one)
    except KeyError as error:
        raise ManifestError(
            f"steering: there is no {error.args[0]}, which the recipe's edits need; bake the "
            "recipe again"
        ) from error
    return tuple(found)
