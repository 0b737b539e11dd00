"""Laws of the estimators, and the statistics that feed them."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bake.activations import Conversation, Moments, Tap, collect
from bake.archs import ARCHS
from bake.errors import FitError
from bake.fit.mean_difference import mean_difference
from bake.fit.protect import without
from bake.fit.readout import ReadoutClass, ridge_readout
from bake.fit.rmd import rmd, rmd_dual
from bake.fit.wrmd import confidence_weight
from bake.model import LiveModel

SEEDS = st.integers(0, 2**31)


def drawn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def moments_of(samples: Tensor, keep: str = "second", weights: Tensor | None = None) -> Moments:
    found = Moments("samples" if keep == "samples" else "second")
    found.add(samples, torch.ones(len(samples)) if weights is None else weights)
    return found


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


@given(SEEDS)
def test_a_large_ridge_gives_the_mean_difference(seed: int) -> None:
    answered = moments_of(drawn(seed, 40, 6))
    refused = drawn(seed + 1, 6)
    direction = rmd(refused, answered.mean, answered.covariance, 1e6)
    assert cosine(direction, mean_difference(refused, answered.mean)) > 1 - 1e-8


@given(SEEDS, st.sampled_from([0.01, 1.0]), st.integers(3, 20))
def test_the_dual_form_is_the_primal_one(seed: int, ridge: float, count: int) -> None:
    samples, refused = drawn(seed, count, 10), drawn(seed + 1, 10)
    weights = torch.rand(count, generator=torch.Generator().manual_seed(seed)) + 0.1
    found = moments_of(samples, "samples", weights)
    torch.testing.assert_close(
        rmd_dual(refused, found.mean, found.centred, ridge),
        rmd(refused, found.mean, found.centred.T @ found.centred, ridge),
        rtol=1e-6,
        atol=1e-6,
    )
    # The same covariance, streamed: its second moment is summed from float32 products.
    streamed = moments_of(samples, weights=weights).covariance
    torch.testing.assert_close(streamed, found.centred.T @ found.centred, rtol=1e-4, atol=1e-5)


@given(SEEDS)
def test_duplicated_or_shuffled_data_change_nothing(seed: int) -> None:
    samples = drawn(seed, 12, 5)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    once = moments_of(samples)
    again = moments_of(torch.cat([samples, samples[order]]))
    torch.testing.assert_close(once.mean, again.mean)
    torch.testing.assert_close(once.covariance, again.covariance, rtol=1e-5, atol=1e-5)


def test_a_planted_direction_is_found_in_correlated_noise() -> None:
    """Two directions differ between the classes; the noise is along one of them."""
    planted, noisy = torch.eye(20, dtype=torch.float64)[:2]
    scale = torch.ones(20, dtype=torch.float64)
    scale[1] = 12.0
    answered = drawn(1, 4000, 20) * scale
    refused = drawn(2, 4000, 20) * scale + planted + 2.5 * noisy
    found = moments_of(answered)
    direction = rmd(refused.mean(0), found.mean, found.covariance, 1e-4)
    assert cosine(direction, planted) > 0.95
    assert cosine(mean_difference(refused.mean(0), found.mean), planted) < 0.7


@settings(deadline=None)
@given(SEEDS)
def test_the_protected_direction_is_gone(seed: int) -> None:
    direction, protected = drawn(seed, 7), drawn(seed + 1, 7)
    assert abs(float(without(direction, protected) @ protected)) < 1e-9
    assert torch.equal(without(direction, protected, 0.0), direction)


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
    rows = torch.cat(inputs)
    torch.testing.assert_close(
        found["writer"].gram.float(), rows.T @ rows / len(rows), atol=1e-4, rtol=1e-4
    )


def test_activations_that_are_not_finite_are_refused() -> None:
    with pytest.raises(FitError, match="not finite"):
        Moments().add(torch.tensor([[1.0, float("nan")]]), torch.ones(1))


def test_a_class_without_weight_is_refused() -> None:
    empty = Moments()
    empty.add(torch.ones(2, 3), torch.zeros(2))
    with pytest.raises(FitError, match="no sample"):
        _ = empty.mean
