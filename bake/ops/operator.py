"""What every operator can do: plan from headers, name what it needs, build from measurements."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from bake.arch import Arch
from bake.checkpoint import Checkpoint
from bake.edits import Step
from bake.hooks import Intervention
from bake.recipe import Gate

__all__ = ["Measured", "Operator"]

Spec = TypeVar("Spec", contravariant=True)


@dataclass(frozen=True)
class Measured:
    """What the fit has for the operators.

    `directions` by layer are [d], pointing to refusal, as long as the gap between
    the classes, or [k, d] for operators that take several; `probe(module, spec)` reads the
    gate [d_in] off a writer's input as the gate's section of the recipe has it; `base` is the
    checkpoint; `means` by layer are [d], the answered class's mean state where the direction
    was measured; `ramps(layer, spec)` are a block gate's probes behind a layer and, last, its
    constant's readout [m + 1, d].
    """

    directions: Mapping[int, Tensor]
    probe: Callable[[str, Gate], Tensor]
    base: Checkpoint
    means: Mapping[int, Tensor]
    ramps: Callable[[int, Gate], Tensor]


class Operator(Protocol[Spec]):
    """One `op` of a recipe; `Spec` is its section of the recipe's schema."""

    def plan(
        self, spec: Spec, base: Checkpoint, arch: Arch, place: str, runtimes: Iterable[str]
    ) -> Step:
        """Every edit from headers alone.

        `place` is the entry's path in the recipe, `runtimes` what the result is for.
        """
        ...

    def layers(self, spec: Spec) -> tuple[int, ...]:
        """The layers whose direction it needs."""
        ...

    def probed(self, step: Step) -> tuple[str, ...]:
        """The modules on whose inputs it needs a probe."""
        ...

    def build(
        self, spec: Spec, step: Step, measured: Measured, arch: Arch
    ) -> tuple[Intervention, ...]:
        """The interventions, whose edits are exactly those of the plan."""
        ...
