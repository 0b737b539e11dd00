"""Gates fitted in order: each with those before it in force, on what they left."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bake.activations import Conversation, Tap
from bake.archs import ARCHS
from bake.checkpoint import Checkpoint
from bake.fit.kept import built_again
from bake.fit.ordered import fit_in_order
from bake.hooks import steered
from bake.model import LiveModel
from bake.ops.gate import Gate
from bake.plan import make_plan
from tests.test_fit import drawn
from tests.through_disk import lost_through_disk, recipe_of
from tests.word_fit import word_fit

RIDGE = 0.05
WANTED = {"target": 1.0, "protected": -0.5}
# As chats begin, alike; and text that does not.
CLASSES = {
    "target": [(1, 5, 9, 40, 7), (1, 5, 30, 11), (1, 5, 61, 12, 13, 14)],
    "protected": [(1, 5, 80, 81, 82), (1, 5, 83, 84, 85)],
    "text": [(20, 21, 22, 23), (60, 61, 62)],
}


def conversations(role: str) -> list[Conversation]:
    found = []
    for ids in CLASSES[role]:
        first = 0 if role == "text" else 2
        found.append(Conversation(ids, len(ids) - 1, tuple(range(first, len(ids)))))
    return found


def gates(model: LiveModel, layers: Sequence[int]) -> list[tuple[int, Gate]]:
    found = []
    for layer in layers:
        for place, inside in enumerate(("self_attn.o_proj", "mlp.down_proj")):
            vector = 3 * drawn(10 * layer + place, 32).float()
            found.append((layer, Gate(f"model.layers.{layer}.{inside}", vector, torch.zeros(0))))
    return found


def inputs(model: LiveModel, module: str, in_force: Sequence[Gate]) -> dict[str, Tensor]:
    """The module's input at the tokens that count, each conversation by itself."""
    found: dict[str, Tensor] = {}
    for role in CLASSES:
        seen: list[Tensor] = []
        rows = []
        with steered(model, in_force):
            handle = model.module(module).register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0][0])
            )
            for one in conversations(role):
                with torch.inference_mode():
                    model.model(torch.tensor([one.ids]))
                rows.append(seen.pop()[list(one.decision)])
            handle.remove()
        found[role] = torch.cat(rows).double()
    return found


def by_hand(model: LiveModel, planned: Sequence[tuple[int, Gate]]) -> dict[str, Tensor]:
    """The same probes of whole passes, from all samples at once."""
    fitted: list[Gate] = []
    read = {role: torch.zeros(()).double() for role in CLASSES}
    for number, (_, gate) in enumerate(planned, 1):
        a = inputs(model, gate.module, fitted)
        gram = sum(a[role].T @ a[role] / len(a[role]) for role in CLASSES)
        left = {role: number * WANTED.get(role, 0.0) - read[role] for role in CLASSES}
        total = sum((left[role].expand(len(a[role])) @ a[role]) / len(a[role]) for role in CLASSES)
        assert isinstance(gram, Tensor)
        size = RIDGE * gram.diagonal().mean()
        probe = torch.linalg.solve(gram + size * torch.eye(len(gram)).double(), total)
        read = {role: read[role] + a[role] @ probe for role in CLASSES}
        fitted.append(Gate(gate.module, gate.vector, probe.float()))
    return {one.module: one.probe for one in fitted}


@pytest.mark.parametrize("layers", [[0, 1], [0, 2], [2]])
def test_each_probe_is_the_regression_on_what_those_before_it_left(
    tiny_llama: Path, layers: list[int]
) -> None:
    """Blocks that are passed once against whole passes of each conversation by itself."""
    model = LiveModel.load(tiny_llama, ARCHS["llama"])
    planned = gates(model, layers)
    taps = {
        gate.module: Tap(model.module(gate.module), "input", "decision", "second")
        for _, gate in planned
    }
    classes = {role: conversations(role) for role in CLASSES}
    found = fit_in_order(model, planned, taps, classes, WANTED, RIDGE)
    wanted = by_hand(model, planned)
    assert list(found) == list(wanted)
    for module, probe in wanted.items():
        torch.testing.assert_close(found[module].probe.float(), probe, atol=2e-3, rtol=2e-3)


def test_what_is_in_force_from_the_beginning_is_seen(tiny_llama: Path) -> None:
    model = LiveModel.load(tiny_llama, ARCHS["llama"])
    planned = gates(model, [2])[:1]
    taps = {
        gate.module: Tap(model.module(gate.module), "input", "decision", "second")
        for _, gate in planned
    }
    classes = {role: conversations(role) for role in CLASSES}
    first = Gate("model.layers.0.mlp.down_proj", 5 * drawn(1, 32).float(), drawn(2, 32).float())
    plain, under = (
        fit_in_order(model, planned, taps, classes, WANTED, RIDGE, in_force)
        for in_force in ((), (first,))
    )
    module = planned[0][1].module
    a = inputs(model, module, [first])
    gram = sum(a[role].T @ a[role] / len(a[role]) for role in CLASSES)
    assert isinstance(gram, Tensor)
    total = sum(WANTED.get(role, 0.0) * a[role].mean(0) for role in CLASSES)
    size = RIDGE * gram.diagonal().mean()
    probe = torch.linalg.solve(gram + size * torch.eye(len(gram)).double(), total)
    torch.testing.assert_close(under[module].probe, probe, atol=2e-3, rtol=2e-3)
    assert (plain[module].probe - probe).norm() > 0.05 * probe.norm()


def _summed(found: Mapping[str, Mapping[str, float]], role: str) -> float:
    return sum(one[role] for one in found.values()) / len(found)


def test_a_recipe_with_ordered_gates_reads_its_values_better(tiny_llama: Path) -> None:
    spec = {"op": "gate", "layers": "1-2", "strength": -1.0, "ridge": 1e-2, "protected": 1.0}
    _, apart = word_fit(tiny_llama, recipe_of(spec))
    _, fitted = word_fit(tiny_llama, recipe_of(spec | {"ordered": True}))
    for role, value in {"target": 1.0, "protected": -1.0}.items():
        error, before = (abs(_summed(one.openings, role) - value) for one in (fitted, apart))
        assert error < 0.9 * before
    assert set(fitted.kept) == set(apart.kept)
    # The first writer has none before it.
    first = "edits.0.probe.model.layers.1.self_attn.o_proj"
    torch.testing.assert_close(fitted.kept[first], apart.kept[first], atol=1e-4, rtol=1e-4)


def test_two_gates_on_one_writer_add_up(tiny_llama: Path, tmp_path: Path) -> None:
    """One of them ordered behind the other; hooks and weights are one map."""
    first = {"op": "gate", "layers": [1], "strength": -2.0, "sites": ["mlp"]}
    second = {"op": "gate", "layers": [1, 2], "strength": 3.0, "protected": 2.0, "ordered": True}
    recipe = recipe_of(first, second)
    _, fitted = word_fit(tiny_llama, recipe)
    built = list(fitted.interventions)
    lost, after = lost_through_disk(tiny_llama, recipe, tmp_path / "out", built)
    assert lost < 1e-4
    module = "model.layers.1.mlp.down_proj"
    before = LiveModel.load(tiny_llama, ARCHS["llama"])
    written = after.module(module).weight - before.module(module).weight
    both = [one for one in built if isinstance(one, Gate) and one.module == module]
    wanted = sum(torch.outer(one.vector, one.probe) for one in both)
    assert len(both) == 2
    torch.testing.assert_close(written, wanted, atol=1e-5, rtol=1e-4)
    kept = [fitted.kept[f"edits.{number}.probe.{module}"] for number in (0, 1)]
    assert (kept[0] - kept[1]).norm() > 0.1 * kept[0].norm()
    # Each is shown: the second one's heights are others.
    opened = [fitted.openings[f"edits.{number}.{module}"] for number in (0, 1)]
    assert abs(opened[0]["protected"]) < 0.5 < opened[1]["protected"]
    assert len(fitted.openings) == 5


def test_two_equal_edits_have_probes_of_their_own(tiny_llama: Path) -> None:
    """The second one is fitted with the first in force; a folder has both."""
    gate = {"op": "gate", "layers": [1, 2], "strength": -4.0, "sites": ["mlp"], "ordered": True}
    recipe = recipe_of(gate, gate)
    _, fitted = word_fit(tiny_llama, recipe)
    modules = [f"model.layers.{layer}.mlp.down_proj" for layer in (1, 2)]
    kept = [fitted.kept[f"edits.{number}.probe.{one}"] for number in (0, 1) for one in modules]
    assert (kept[1] - kept[3]).norm() > 0.01 * kept[1].norm()
    base, arch = Checkpoint.open(tiny_llama), ARCHS["llama"]
    plan = make_plan(recipe, base, arch)
    again = built_again(recipe, plan, base, arch, fitted.directions, fitted.kept)
    for gates in (fitted.interventions, again):
        for one, probe in zip(gates, kept, strict=True):
            assert isinstance(one, Gate)
            torch.testing.assert_close(one.probe, probe, rtol=0, atol=0)
