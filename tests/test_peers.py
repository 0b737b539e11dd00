"""The other methods that `benchmarks/gates.py` compares with, and how it compares them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bake.archs import find_arch
from bake.checkpoint import Checkpoint
from bake.hooks import steered
from bake.model import LiveModel, batches
from bake.ops.gate import Gate
from bake.prompts import Prompt
from benchmarks.gates import Asked, Openness, Way, crossing
from benchmarks.peers import (
    RIDGE,
    AlphaSteer,
    WholePrompts,
    alphasteer_probe,
    best_condition,
    f_score,
    mean_states,
    similarity,
)
from benchmarks.weights import moved
from tests.tiny import write_tiny

PROMPTS = ["w5 w9", "w5 w9 w30 w31 w32", "w5 w11", "w40", "w41 w42 w43 w44"]


def drawn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LiveModel:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny("llama", folder)
    base = Checkpoint.open(folder)
    return LiveModel.load(folder, find_arch(base.config, "config.json", base.tensors))


def states(model: LiveModel, ids: Sequence[int]) -> list[Tensor]:
    """Behind every block the states [tokens, d] of one prompt, as hooks leave them."""
    found: list[Tensor] = []
    blocks = [model.block(layer) for layer in range(3)]
    handles = [
        block.register_forward_hook(lambda _, __, output: found.append(output[0]))
        for block in blocks
    ]
    model.run(next(batches([ids], 2, 1)))
    for handle in handles:
        handle.remove()
    return found


# AlphaSteer


def test_alphasteer_reads_nothing_where_closed_states_are_large() -> None:
    closed = drawn(1, 4, 12)
    probe = alphasteer_probe(drawn(2, 9, 12), closed, 0.5)
    torch.testing.assert_close(closed @ probe, torch.zeros(4).double(), atol=1e-9, rtol=0)


def test_alphasteer_is_the_least_of_its_loss_in_the_null_space() -> None:
    target, closed = 9 * drawn(2, 9, 12), drawn(1, 30, 12)
    probe = alphasteer_probe(target, closed, 0.5)
    axes = torch.linalg.svd(closed).Vh[:6]
    inside = torch.eye(12).double() - axes.T @ axes

    def loss(one: Tensor) -> Tensor:
        kept = inside @ one
        found: Tensor = (target @ kept - 1).square().sum() + RIDGE * kept.square().sum()
        return found

    torch.testing.assert_close(inside @ probe, probe)
    for seed in range(20):
        assert loss(probe) < loss(probe + 1e-3 * inside @ drawn(seed, 12))


def test_alphasteer_adds_by_the_last_token_to_all_and_to_no_answer(model: LiveModel) -> None:
    vector, probe = drawn(3, 32).float(), drawn(4, 32).float()
    rendered = [model.render(one) for one in PROMPTS]
    plain = [states(model, ids)[1] for ids in rendered]
    one_token = states(model, [7])[1]
    whole = WholePrompts.of(model)
    bare = whole.answer(rendered, 3)
    with steered(model, [AlphaSteer(1, vector, probe)]):
        for ids, before in zip(rendered, plain, strict=True):
            after = before + (before[-1] @ probe) * vector
            torch.testing.assert_close(states(model, ids)[1], after)
        # A pass of one token is of an answer.
        torch.testing.assert_close(states(model, [7])[1], one_token)
        padded = whole.answer(rendered, 3)
        assert padded == [whole.answer([ids], 3)[0] for ids in rendered]
    assert padded != bare


# CAST


def test_mean_states_of_padded_prompts_are_those_of_each_alone(model: LiveModel) -> None:
    rendered = [model.render(one) for one in PROMPTS]
    found = mean_states(model, rendered, 2)
    for ids, one in zip(rendered, found, strict=True):
        alone = torch.stack([state.mean(0) for state in states(model, ids)[:2]])
        torch.testing.assert_close(one, alone.double(), atol=1e-5, rtol=1e-5)


def test_the_condition_is_the_block_and_side_that_tell_prompts_apart() -> None:
    axis = torch.nn.functional.normalize(drawn(1, 16), dim=0)
    wanted, others = drawn(2, 30, 3, 16), drawn(3, 40, 3, 16)
    # On one side of what is common, since cos(h, tanh(c cᵀh)) is even in h.
    wanted[:, 1] += 40 * axis
    found = best_condition((wanted, others), (wanted, others), 1.0)
    assert found.layer == 1
    assert found.score > 0.95
    assert f_score(found.holds(torch.cat([wanted, others])), _first(30, 40)) == found.score


def _first(some: int, rest: int) -> Tensor:
    return torch.arange(some + rest) < some


def test_similarity_is_that_of_the_paper() -> None:
    state, axis = drawn(5, 16), torch.nn.functional.normalize(drawn(6, 16), dim=0)
    projected = torch.tanh(torch.outer(axis, axis) @ state / (axis @ axis))
    expected = state @ projected / (state.norm() * projected.norm())
    torch.testing.assert_close(similarity(state[None], axis)[0], expected)


@pytest.mark.parametrize(("beta", "expected"), [(1.0, 4 / 7), (2.0, 10 / 19)])
def test_f_score_counts_what_it_should(beta: float, expected: float) -> None:
    """Two of four are found, and one of the others: precision 2/3, recall 1/2."""
    fires = torch.tensor([1, 1, 0, 0, 1, 0, 0]).bool()
    assert f_score(fires, _first(4, 3), beta) == pytest.approx(expected)


# Another checkpoint


def test_what_a_checkpoint_gained_does_what_it_does(tmp_path: Path) -> None:
    for name in ("base", "other"):
        write_tiny("llama", tmp_path / name)
    weights = load_file(file := tmp_path / "other" / "model.safetensors")
    for name in ("model.layers.1.self_attn.o_proj.weight", "model.layers.2.mlp.down_proj.weight"):
        weights[name] += drawn(1, *weights[name].shape).float() / 9
    save_file(weights, file, {"format": "pt"})
    base, other = (Checkpoint.open(tmp_path / name) for name in ("base", "other"))
    arch = find_arch(base.config, "config.json", base.tensors)
    changes = moved(base, other, arch)
    assert [one.layer for one in changes] == [1, 2]
    edited, model = (LiveModel.load(one.folder, arch) for one in (other, base))
    (batch,) = batches([model.render(PROMPTS[1])], 2, 1)
    with steered(model, changes), torch.inference_mode():
        torch.testing.assert_close(model.logits(batch), edited.logits(batch))
    with steered(model, [replace(one, share=0.0) for one in changes]), torch.inference_mode():
        found = model.logits(batch)
    torch.testing.assert_close(found, LiveModel.load(base.folder, arch).logits(batch))
    weights["model.norm.weight"] += 1
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.norm\.weight differs"):
        moved(base, Checkpoint.open(tmp_path / "other"), arch)


# Equal openness


def test_the_strength_asked_for_is_found_and_measured_once() -> None:
    asked: list[float] = []

    def measure(strength: float) -> float:
        asked.append(strength)
        return float(100 / (1 + torch.tensor(1.1 * strength - 2).exp()))

    found = Openness(measure, {0.0: 88.0})
    found.scan(3)
    for wanted in (20.0, 10.0, 5.0, 3.0):
        assert found.reaches(wanted)
        # A line between logits is exact here but for the one at 0.
        assert measure(found.strength(wanted, 4)) == pytest.approx(wanted, rel=0.05)
    assert len(asked) - 4 == len(set(found.tried) - {0.0})


def test_what_never_opens_so_far_is_taken_where_it_opens_farthest() -> None:
    found = Openness(lambda strength: 30 + 10 * abs(strength - 1.4), {0.0: 90.0})
    found.scan(3)
    assert not found.reaches(20)
    assert found.strength(20, 4) == min(found.tried, key=lambda one: abs(one - 1.4))


def test_half_a_step_further_is_tried_where_no_strength_opens_so_far() -> None:
    found = Openness(lambda strength: 4 + 30 * abs(strength - 3.2), {0.0: 99.0})
    found.scan(3)
    assert min(abs(one / 3.2 - 1) for one in found.tried) < 0.02


def test_a_share_that_comes_back_later_is_not_taken() -> None:
    shares = {0.0: 90.0, 1.0: 20.0, 2.0: 2.0, 3.0: 5.0}
    found = Openness(lambda strength: 20 - 18 * (strength - 1), dict(shares))
    assert found.strength(5, 4) < 2


def test_the_first_crossing_counts() -> None:
    tried = [(0.0, 90.0), (1.0, 20.0), (2.0, 60.0), (3.0, 10.0)]
    assert 0.5 < (crossing(tried, 30) or 0) < 1
    assert crossing(tried, 20) == pytest.approx(1)
    assert 2 < (crossing(tried, 15) or 0) < 3
    assert crossing(tried, 5) is None


def test_prompts_that_fire_are_steered_and_no_others(model: LiveModel) -> None:
    """As each prompt alone is, with the common beginning and the blocks in front read once."""
    gate = Gate("model.layers.2.mlp.down_proj", 5 * drawn(7, 32).float(), drawn(8, 32).float())
    prompts = {
        "target": [Prompt(one, one, "en") for one in PROMPTS[:3]],
        "general": [Prompt(one, one, "en") for one in PROMPTS[3:]],
    }
    fires = [True, False, True, True, False]
    asked = Asked(model, prompts, [11, 13], [0, 1])
    assert asked.bare()["KL"] == 0
    way = Way(
        *("", 2, lambda strength: [replace(gate, vector=strength * gate.vector)]), lambda _: fires
    )
    found = asked.under(way, 1.0)
    shares = []
    for text, fired in zip(PROMPTS, fires, strict=True):
        (batch,) = batches([model.render(text)], 2, 1)
        with steered(model, [gate] if fired else []), torch.inference_mode():
            chances = model.last_logits(batch, 1)[0, -1].softmax(-1)
        shares.append(100 * float(chances[[11, 13]].sum()))
    assert found["target"] == pytest.approx(sum(shares[:3]) / 3, rel=1e-3)
    assert found["general"] == pytest.approx(sum(shares[3:]) / 2, rel=1e-3)
    assert found["KL"] > 0
