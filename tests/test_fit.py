"""The statistics that feed the estimators, and the gate's probe."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bake.activations import Conversation, Moments, Tap, collect
from bake.archs import ARCHS
from bake.errors import FitError
from bake.fit.readout import ReadoutClass, ridge_readout
from bake.fit.wrmd import confidence_weight
from bake.model import LiveModel
from tests.through_disk import recipe_of
from tests.word_fit import word_fit

SEEDS = st.integers(0, 2**31)


def drawn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def moments_of(samples: Tensor) -> Moments:
    found = Moments("second")
    found.add(samples, torch.ones(len(samples)))
    return found


@given(SEEDS)
def test_duplicated_or_shuffled_data_change_nothing(seed: int) -> None:
    samples = drawn(seed, 12, 5)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    once = moments_of(samples)
    again = moments_of(torch.cat([samples, samples[order]]))
    torch.testing.assert_close(once.mean, again.mean)
    torch.testing.assert_close(once.covariance, again.covariance, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("confidence", "refused", "weight"),
    [(0.8, True, 0.8), (0.8, False, 0.01), (-1.0, False, 1.0), (-0.3, True, 0.01)],
)
def test_confidence_weights(confidence: float, refused: bool, weight: float) -> None:
    assert confidence_weight(confidence, refused) == weight


def test_a_readout_reads_its_values_where_the_classes_are_apart() -> None:
    target = drawn(1, 200, 30) * 0.1 + drawn(2, 30)
    other = drawn(3, 200, 30) * 0.1 + drawn(4, 30)
    found = [moments_of(target), moments_of(other)]
    classes = [ReadoutClass(found[0].mean, found[0].gram, 1.0)]
    classes.append(ReadoutClass(found[1].mean, found[1].gram, 0.0))
    probe = ridge_readout(classes, 1e-3)
    assert float((target @ probe).mean()) == pytest.approx(1, abs=0.02)
    assert float((other @ probe).mean()) == pytest.approx(0, abs=0.02)
    # Held-out samples of the same classes are read alike.
    assert float(((drawn(5, 50, 30) * 0.1 + drawn(2, 30)) @ probe).min()) > 0.7


def test_collected_states_are_those_of_the_model(tiny_llama: Path) -> None:
    """Padding, batching and the choice of positions against one plain forward pass each."""
    model = LiveModel.load(tiny_llama, ARCHS["llama"])
    chats = [(1, 5, 9, 40, 7), (1, 6, 9), (1, 7, 9, 41, 42, 43, 8)]
    decisions = [(2, 3, 4), (1, 2), (5, 6)]
    conversations = [
        Conversation(ids, len(ids) - 2, decision, weight)
        for ids, decision, weight in zip(chats, decisions, (1.0, 0.5, 0.0), strict=True)
    ]
    writer = model.block(1).get_submodule("mlp.down_proj")
    taps = {
        "block": Tap(model.block(1), "output", "last"),
        "samples": Tap(model.block(1), "output", "last", rows=(0, 2)),
        "writer": Tap(writer, "input", "decision", "second"),
    }
    found = collect(model, conversations, taps, batch_size=2)
    last, inputs = [], []
    for ids, decision in zip(chats, decisions, strict=True):
        seen: list[Tensor] = []
        handle = writer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.inference_mode():
            output = model.model(torch.tensor([ids]), output_hidden_states=True)
        handle.remove()
        last.append(output.hidden_states[2][0, len(ids) - 2])
        inputs.append(seen[0][0, list(decision)])
    wanted = (last[0] + 0.5 * last[1]) / 1.5
    torch.testing.assert_close(found["block"].mean.float(), wanted, atol=1e-5, rtol=1e-4)
    # In the order given, though the batches go by length.
    kept = torch.stack([last[0], last[2]])
    torch.testing.assert_close(found["samples"].values, kept, atol=1e-5, rtol=1e-4)
    rows = torch.cat(inputs)
    torch.testing.assert_close(
        found["writer"].gram.float(), rows.T @ rows / len(rows), atol=1e-4, rtol=1e-4
    )


def test_what_lies_behind_the_last_tap_is_not_run(tiny_llama: Path) -> None:
    model = LiveModel.load(tiny_llama, ARCHS["llama"])
    ran: list[int] = []
    handles = [
        model.block(layer).register_forward_pre_hook(lambda *_, layer=layer: ran.append(layer))
        for layer in range(3)
    ]
    # They begin differently, so nothing is read for both.
    conversations = [Conversation((first, 5, 9, 40), 3, (2, 3)) for first in (1, 3)]
    down = model.block(0).get_submodule("mlp.down_proj")
    taps = {"in": Tap(down, "input", "decision"), "out": Tap(model.block(1), "output", "last")}
    found = collect(model, conversations, taps, batch_size=1)
    for handle in handles:
        handle.remove()
    assert ran == [0, 1, 0, 1]
    assert found["in"].weight == 4
    assert found["out"].weight == 2
    # The model is whole afterwards.
    with torch.inference_mode():
        assert model.model(torch.tensor([[1, 5]])).logits.isfinite().all()


@given(SEEDS)
def test_a_gram_matrix_of_strips_is_the_whole_one(seed: int) -> None:
    """Wider than one strip, with weights, and of more samples than are taken at a time."""
    samples, weights = drawn(seed, 7, 600), drawn(seed + 1, 7).abs()
    found = Moments("covariance")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("bake.activations.SAMPLES", 2)
        found.add(samples[:3], weights[:3])
        found.add(samples[3:], weights[3:])
    wanted = (samples.T * weights) @ samples / weights.sum()
    torch.testing.assert_close(found.gram, wanted)
    centred = samples - weights @ samples / weights.sum()
    torch.testing.assert_close(found.covariance, (centred.T * weights) @ centred / weights.sum())


def test_activations_that_are_not_finite_are_refused() -> None:
    with pytest.raises(FitError, match="not finite"):
        Moments().add(torch.tensor([[1.0, float("nan")]]), torch.ones(1))


def test_a_class_without_weight_is_refused() -> None:
    empty = Moments()
    empty.add(torch.ones(2, 3), torch.zeros(2))
    with pytest.raises(FitError, match="no sample"):
        _ = empty.mean


@pytest.mark.parametrize("strength", [-1.0, 1.0])
def test_a_gate_steers_protected_prompts_towards_refusal(tiny_llama: Path, strength: float) -> None:
    """Whichever way the target goes, and only as far as the recipe has it."""
    spec = {"op": "gate", "layers": [1], "strength": strength, "ridge": 1e-6}
    found = [
        word_fit(tiny_llama, recipe_of(spec | {"protected": protected}))[1].openings
        for protected in (0.0, 1.0, 2.0)
    ]
    assert len(found[0]) == 2
    for module in found[0]:
        once, twice = (
            strength * (one[module]["protected"] - found[0][module]["protected"])
            for one in found[1:]
        )
        assert once > 0.2
        assert abs(twice / once - 2) < 1e-3
