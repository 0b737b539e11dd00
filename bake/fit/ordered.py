"""Gates fitted in the order in which tokens pass them, each with all before it in force.

A probe that is fitted by itself is off by an error, and the errors of neighbouring writers are
alike, so that spreading a vector over many writers does not average them away. Fitted in order,
the k-th probe reads k y - Σ_{j<k} γ_j, with y what a token's class shall be read as and γ_j what
the j-th probe did read there: it also mends what those before it left. This is the block
Gauss-Seidel of one ridge regression of Σ_j γ_j / n on all writers' inputs at once, without its
cross moments, and each input is the one that the steered model will have.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from bake.activations import Conversation, Moments, Tap, samples
from bake.fit.onward import Onward
from bake.fit.protect import still, unread
from bake.fit.readout import ridge_solutions
from bake.hooks import Intervention, steered
from bake.model import LiveModel
from bake.ops.gate import Gate

__all__ = ["Ordered", "fit_in_order"]


@dataclass(frozen=True, eq=False)
class Ordered:
    """A module's probe c [d_in], and what it reads on average in every class."""

    probe: Tensor
    openings: Mapping[str, float]


def fit_in_order(
    model: LiveModel,
    gates: Sequence[tuple[int, Gate]],
    taps: Mapping[str, Tap],
    classes: Mapping[str, Sequence[Conversation]],
    wanted: Mapping[str, float],
    ridge: float,
    in_force: Sequence[Intervention] = (),
    progress: Callable[[int], None] = lambda _: None,
    begun: Mapping[str, Onward] = MappingProxyType({}),
    null_space: float | None = None,
) -> dict[str, Ordered]:
    """The probes by module of `gates`, with their layers, in the order in which tokens pass.

    `taps` read the modules' inputs, `wanted` is what each class shall be read as (0 if it is
    missing), and λ is that of `ridge_readout`. `in_force` steers from the beginning. A pass of a
    writer begins at the block of the one before it, the first one where the classes in `begun`
    are already. `null_space` is the share of the dimensions that probes read (`unread`).
    """
    walks = {
        role: _Walk(model, found, wanted.get(role, 0.0), begun.get(role) or Onward(model))
        for role, found in classes.items()
    }
    found: dict[str, Ordered] = {}
    fitted: list[Gate] = []
    for number, (layer, gate) in enumerate(gates):
        with steered(model, [*in_force, *fitted]):
            sums = {
                role: walk.measured(layer, taps, fitted[-1:], gate, number, progress)
                for role, walk in walks.items()
            }
        gram = torch.stack([inputs.gram for inputs, _ in sums.values()]).sum(0)
        total = torch.stack([cross for _, cross in sums.values()]).sum(0)
        unseen = None
        if null_space is not None:
            grams = {role: inputs.gram for role, (inputs, _) in sums.items()}
            unseen = unread(still(grams), null_space)
        probe = ridge_solutions(gram, total[None], ridge, unseen)[0]
        openings = {role: float(probe @ inputs.mean) for role, (inputs, _) in sums.items()}
        found[gate.module] = Ordered(probe, openings)
        fitted.append(replace(gate, probe=probe.float()))
    return found


class _Walk:
    """A class's conversations on their way, with what has been read at each of their tokens."""

    def __init__(
        self,
        model: LiveModel,
        conversations: Sequence[Conversation],
        value: float,
        onward: Onward,
    ) -> None:
        self._model, self._conversations, self._value = model, conversations, value
        self._onward = onward
        self._read: dict[tuple[int, ...], Tensor] = {}

    def measured(
        self,
        layer: int,
        taps: Mapping[str, Tap],
        before: Sequence[Gate],
        gate: Gate,
        number: int,
        progress: Callable[[int], None],
    ) -> tuple[Moments, Tensor]:
        """The moments of a gate's input a, and E (k y - Σ γ_j) a [d_in] for this k-th one.

        `before` is the gate before it, if there is one, whose readings are taken in.
        """
        read = {one.module: taps[one.module] for one in (*before, gate)}
        moments = Moments("second", device=self._model.device)
        cross = torch.zeros((), dtype=torch.float64)
        for batch, found in samples(
            *(self._model, self._conversations, read), progress=progress, run=self._onward.to(layer)
        ):
            inputs = found[gate.module].float()
            so_far = self._read.get(batch.rows, torch.zeros(len(inputs)))
            for one in before:
                so_far = so_far + found[one.module].float() @ one.probe
            self._read[batch.rows] = so_far
            left = (number + 1) * self._value - so_far
            shown = [self._conversations[row] for row in batch.rows]
            weights = torch.tensor([one.doubt for one in shown for _ in one.decision]).double()
            moments.add(inputs, weights)
            cross = cross + (weights * left) @ inputs.double()
        return moments, cross / moments.weight
