"""The probe of a block gate, and between which of its readings the gate opens.

The reading of a token is r = wᵀx / cᵀx, with w the ridge readout of the class (1 on it, 0 on all
others) and c that of the constant 1. A ramp from θ to θ + δ is z = pᵀx with p = (w - θ c) / δ, so
that its edges lie at readings θ and θ + δ, however far cᵀx is from 1.

A probe separates the topics that it was fitted on better than any others. So the edges come from
readings of topics that were left out, by folds: a first pass gathers every fold's moments, a
second one how the readings of each fold by the probe of the others are spread, as a histogram.
Nothing of a token stays.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from bake.activations import Conversation, Tap, collect
from bake.carriers.blank import Blank, blank_block
from bake.checkpoint import Checkpoint
from bake.errors import FitError
from bake.fit.constant import Constant
from bake.fit.labels import Labelled
from bake.fit.readout import ridge_solutions
from bake.model import LiveModel
from bake.ops.block_gate import mlp_input
from bake.recipe import Gate

__all__ = [
    "Reading",
    "Shown",
    "edges",
    "gate_readings",
    "ramps_of",
    "readings",
    "shown_classes",
]

FOLDS: Final = 4
# Readings between these, in so many bins, and those beyond: 0 is closed and 1 is the target.
LOW, HIGH, BINS = -1.0, 2.0, 600
NARROWEST: Final = 0.05  # of a ramp, so that rounding moves no token across all of it


@dataclass(frozen=True)
class Shown:
    """A conversation, and what it is about: one topic is in one fold."""

    conversation: Conversation
    topic: str


@dataclass(frozen=True, eq=False)
class Reading:
    """What probes read behind a layer: `probes` w [m, d], `constant` c [d].

    `held_out` by role is the share of tokens [m, bins] whose reading is in each bin, of topics
    left out; `error` is how far cᵀx is from 1.
    """

    probes: Tensor
    constant: Tensor
    held_out: Mapping[str, Tensor]
    error: Constant


@dataclass(frozen=True, eq=False)
class _Sums:
    """Of one fold: the sum of all classes' Gram matrices, and of each the mean, by its share."""

    gram: Tensor
    means: Mapping[str, Tensor]


def readings(
    model: LiveModel,
    blanks: Sequence[Blank],
    classes: Mapping[str, Sequence[Shown]],
    wanted: Sequence[str],
    ridge: float,
    blind: Mapping[int, Tensor] = MappingProxyType({}),
    progress: Callable[[int], None] = lambda _: None,
    given: Mapping[int, Tensor] = MappingProxyType({}),
) -> dict[int, Reading]:
    """By layer what the probes of some roles read, of the decision tokens of every class.

    There is one probe for each role in `wanted`. Behind a layer they do not see the directions
    `blind` [k, d], which steering in front of it writes. Those `given` [m, d] by layer are not
    fitted, but brought to read 1 on their role and 0 on the mean of all others. `progress` receives
    the number of conversations done, each of which is done twice. Raises FitError for a class of
    few topics, and for a given probe that reads its role below the others.
    """
    folds = {role: _folds(role, found) for role, found in classes.items()}
    inputs = {blank.layer: _unit_input(model, blank) for blank in blanks}
    sums = _passed(model, folds, inputs, progress)

    def fitted(layer: int, without: int | None = None) -> Tensor:
        used = [one for number, one in enumerate(sums[layer]) if number != without]
        gram = torch.stack([one.gram for one in used]).sum(0)
        means = {role: torch.stack([one.means[role] for one in used]).sum(0) for role in classes}
        rows = torch.stack(
            [*(means[role] for role in wanted), torch.stack([*means.values()]).sum(0)]
        )
        unseen: Tensor | None = None
        if layer in blind:
            unseen = torch.linalg.qr(blind[layer].double().T)[0].T
        found = ridge_solutions(gram, rows, ridge, unseen)
        if layer in given:
            vectors = given[layer].double()
            if unseen is not None:
                vectors = vectors - vectors @ unseen.T @ unseen
            found[:-1] = _scaled(vectors, wanted, means, found[-1], layer)
        return found

    spread = _spread(model, folds, inputs, fitted, progress)
    result = {}
    for layer in inputs:
        rows, shares = fitted(layer).float(), {}
        errors = []
        for role, found in spread.items():
            shares[role] = found[layer][:-1].reshape(len(wanted), BINS + 2)
            errors.append(float(found[layer][-1]))
        gram = torch.stack([one.gram for one in sums[layer]]).sum(0)
        mean = torch.stack([row for one in sums[layer] for row in one.means.values()]).sum(0)
        constant, count = rows[-1].double(), len(classes)
        square = (constant @ gram @ constant - 2 * constant @ mean) / count + 1
        error = Constant(float(square.clamp_min(0).sqrt()), (sum(errors) / count) ** 0.5)
        result[layer] = Reading(rows[:-1], rows[-1], shares, error)
    return result


def _scaled(
    vectors: Tensor,
    wanted: Sequence[str],
    means: Mapping[str, Tensor],
    constant: Tensor,
    layer: int,
) -> Tensor:
    """Probes [m, d] that read what vectors do, in units of the gap between a role and all others.

    Raises FitError for one that reads its role below the others.
    """
    found = []
    for vector, role in zip(vectors, wanted, strict=True):
        readings = {name: float(vector @ mean) for name, mean in means.items()}
        own = readings.pop(role)
        closed = sum(readings.values()) / len(readings)
        if own <= closed:
            raise FitError(
                f"probe.{layer}: reads {own:.3g} on prompts.{role} and {closed:.3g} on the others, "
                "so a gate that it opens is open there; turn its sign, or give another probe"
            )
        found.append((vector - closed * constant) / (own - closed))
    return torch.stack(found)


def _passed(
    model: LiveModel,
    folds: Mapping[str, Sequence[Sequence[Conversation]]],
    inputs: Mapping[int, Callable[[Tensor], Tensor]],
    progress: Callable[[int], None],
) -> dict[int, list[_Sums]]:
    """The first pass: the sums of every fold, in which all classes have the same weight."""
    taps: dict[Any, Tap] = {
        layer: Tap(model.block(layer), "output", "decision", "second", through=read)
        for layer, read in inputs.items()
    }
    found: dict[int, list[_Sums]] = {layer: [] for layer in inputs}
    for number in range(FOLDS):
        grams: dict[int, Tensor] = {}
        means: dict[int, dict[str, Tensor]] = {layer: {} for layer in inputs}
        for role, parts in folds.items():
            total = sum(len(one.decision) for part in parts for one in part)
            for layer, one in collect(model, parts[number], taps, progress=progress).items():
                share = one.weight / total
                grams[layer] = share * one.gram + grams.get(layer, 0)
                means[layer][role] = share * one.mean
        for layer, gram in grams.items():
            found[layer].append(_Sums(gram, means[layer]))
    return found


def _spread(
    model: LiveModel,
    folds: Mapping[str, Sequence[Sequence[Conversation]]],
    inputs: Mapping[int, Callable[[Tensor], Tensor]],
    fitted: Callable[[int, int], Tensor],
    progress: Callable[[int], None],
) -> dict[str, dict[int, Tensor]]:
    """The second pass: by role and layer the means of what `_binned` makes of each token."""
    found: dict[str, dict[int, Tensor]] = {role: {} for role in folds}
    for number in range(FOLDS):
        taps: dict[Any, Tap] = {
            layer: Tap(
                *(model.block(layer), "output", "decision"),
                through=_binned(read, fitted(layer, number)),
            )
            for layer, read in inputs.items()
        }
        for role, parts in folds.items():
            total = sum(len(one.decision) for part in parts for one in part)
            for layer, one in collect(model, parts[number], taps, progress=progress).items():
                share = one.weight / total
                found[role][layer] = share * one.mean + found[role].get(layer, 0)
    return found


def edges(
    held_out: Mapping[str, Tensor], role: str, closed: float, opened: float
) -> tuple[float, float]:
    """Where a ramp begins and ends, of the shares [bins] by role.

    It begins where `closed` percent of every other class's tokens lie below, and ends where
    `opened` percent of the role's lie above, or a little behind its beginning.
    """
    begin = max(_quantile(one, closed / 100) for name, one in held_out.items() if name != role)
    end = _quantile(held_out[role], 1 - opened / 100) - _STEP
    return begin, max(end, begin + NARROWEST)


def gate_readings(
    model: LiveModel,
    base: Checkpoint,
    spec: Gate,
    directions: Mapping[int, Tensor],
    classes: Mapping[str, Sequence[Shown]],
    progress: Callable[[int], None] = lambda _: None,
    given: Mapping[int, Tensor] = MappingProxyType({}),
) -> dict[int, Reading]:
    """The readings behind every layer of a block gate, blind to what those in front of it add."""
    blanks = [blank_block(base, model.arch, layer, ()) for layer in spec.layers]
    blind = {
        layer: torch.stack([directions[one] for one in spec.layers[:place]])
        for place, layer in enumerate(spec.layers)
        if place
    }
    return readings(
        *(model, blanks, classes, tuple(spec.heights), spec.ridge, blind, progress, given)
    )


def ramps_of(spec: Gate, reading: Reading) -> tuple[Tensor, dict[str, float]]:
    """The rows of a block gate, its ramps' probes p and the constant c [m + 1, d].

    And by role what the gate opens on average, of topics left out. The complement of a ramp of p
    is that of c - p: q - clip(z, 0, q) = clip(q - z, 0, q).
    """
    rows, opened = [], dict.fromkeys(reading.held_out, 0.0)
    for number, (role, height) in enumerate(spec.heights.items()):
        shares = {name: one[number] for name, one in reading.held_out.items()}
        begin, end = edges(shares, role, spec.closed, spec.opened)
        rows.append((reading.probes[number] - begin * reading.constant) / (end - begin))
        share = ((_MIDDLES - begin) / (end - begin)).clamp(0, 1)
        for name, one in shares.items():
            opened[name] += height * float(one @ share)
    if spec.elsewhere:
        rows = [reading.constant - one for one in rows]
        opened = {name: 1 - one for name, one in opened.items()}
    return torch.stack([*rows, reading.constant]), opened


def shown_classes(
    conversations: Mapping[str, Sequence[Conversation]], labels: Mapping[str, Sequence[Labelled]]
) -> dict[str, list[Shown]]:
    """Every role's conversations with what they are about; every text is about something else."""
    found = {}
    for role, each in conversations.items():
        topics = [one.prompt.topic for one in labels.get(role, ())] or [*map(str, range(len(each)))]
        found[role] = [Shown(*pair) for pair in zip(each, topics, strict=True)]
    return found


# Everything beyond the bins is at their ends.
_STEP = (HIGH - LOW) / BINS
_MIDDLES = LOW + _STEP * (torch.arange(BINS + 2, dtype=torch.float64) - 0.5)


def _quantile(shares: Tensor, below: float) -> float:
    """The reading below which so large a share of the tokens lies: the upper end of its bin."""
    passed = shares.cumsum(0) >= below - 1e-9
    return LOW + _STEP * int(passed.double().argmax())


def _folds(role: str, shown: Sequence[Shown]) -> list[list[Conversation]]:
    """The conversations in FOLDS parts, topics whole, as they come."""
    numbers: dict[str, int] = {}
    for one in shown:
        numbers.setdefault(one.topic, len(numbers) % FOLDS)
    if len(numbers) < FOLDS:
        raise FitError(
            f"prompts.{role}: {len(numbers)} topics, and a block gate's edges come from topics "
            f"that are left out: at least {FOLDS} are needed; give more, or use form: rank_one"
        )
    found: list[list[Conversation]] = [[] for _ in range(FOLDS)]
    for one in shown:
        found[numbers[one.topic]].append(one.conversation)
    return found


def _unit_input(model: LiveModel, blank: Blank) -> Callable[[Tensor], Tensor]:
    """What the block's MLP reads at length √d: where no norm is, nothing else in it has a unit."""
    read = mlp_input(model, blank)

    def unit(h: Tensor) -> Tensor:
        x = read(h).float()
        return x / x.square().mean(-1, keepdim=True).sqrt()

    return unit


def _binned(read: Callable[[Tensor], Tensor], rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Of each token an indicator of every reading's bin, and (cᵀx - 1)²: [n, m · bins + 1].

    The mean of such indicators is a histogram.
    """
    probes, constant = rows[:-1].float(), rows[-1].float()

    def indicators(h: Tensor) -> Tensor:
        x = read(h)
        size = x @ constant
        error = (size - 1).square()[:, None]
        # A constant that is not positive would open the gate.
        found = torch.where(size[:, None] > 0, x @ probes.T / size[:, None], HIGH)
        bins = ((found - LOW) / _STEP).floor().clamp(-1, BINS).long() + 1
        return torch.cat([one_hot(bins, BINS + 2).flatten(1), error], 1)

    return indicators
