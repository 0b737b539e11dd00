"""Laws of the edits."""

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bake.edits import AddVector, Edit, LowRank, RemoveKeepingNorms, RemoveSubspace, apply_all
from bake.ops.ablate import orthonormal

SEEDS = st.integers(0, 2**31)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(SEEDS, st.integers(1, 3), st.sampled_from([-2, -1]))
def test_a_projection_is_idempotent_and_leaves_nothing(
    seed: int, rank: int, axis: Literal[-2, -1]
) -> None:
    # Square, so that an axis guessed from the shape would be right by chance only.
    weight = drawn(seed, 8, 8)
    edit = RemoveSubspace("w", orthonormal(drawn(seed + 1, rank, 8)), axis=axis)
    once = edit.apply(weight)
    left = edit.basis.T @ once if axis == -2 else once @ edit.basis
    assert float(left.abs().max()) < 1e-5
    torch.testing.assert_close(edit.apply(once), once, atol=1e-5, rtol=0)
    assert edit.residual(weight, once) < 1e-5


@given(SEEDS, st.integers(1, 3), st.sampled_from([-2, -1]))
def test_columns_keep_their_norms_without_the_subspace(
    seed: int, rank: int, axis: Literal[-2, -1]
) -> None:
    weight = drawn(seed, 8, 8)
    edit = RemoveKeepingNorms("w", orthonormal(drawn(seed + 1, rank, 8)), axis=axis)
    once = edit.apply(weight)
    torch.testing.assert_close(once.norm(dim=axis), weight.norm(dim=axis))
    left = edit.basis.T @ once if axis == -2 else once @ edit.basis
    assert float(left.abs().max()) < 1e-4
    torch.testing.assert_close(edit.apply(once), once, atol=1e-4, rtol=0)
    assert edit.residual(weight, once) < 1e-4
    # What is left points where plain leaves it.
    plain = RemoveSubspace("w", edit.basis, axis=axis).apply(weight)
    assert float(torch.cosine_similarity(once, plain, dim=axis).min()) > 1 - 1e-4


@given(SEEDS, st.floats(-2, 2), st.integers(1, 4))
def test_columns_keep_their_norms_at_every_strength(
    seed: int, strength: float, experts: int
) -> None:
    weight = drawn(seed, experts, 6, 4)
    edit = RemoveKeepingNorms("w", orthonormal(drawn(seed + 1, 2, 6)), strength)
    after = edit.apply(weight)
    torch.testing.assert_close(after.norm(dim=-2), weight.norm(dim=-2))
    assert edit.residual(weight, after) < 1e-4
    one = RemoveKeepingNorms("w", edit.basis, strength).apply(weight[-1])
    torch.testing.assert_close(after[-1], one)
    # Its columns are those of the transposed layout's rows.
    turned = RemoveKeepingNorms("w", edit.basis, strength, -1)
    torch.testing.assert_close(turned.apply(weight.mT), after.mT)


@given(SEEDS)
def test_norms_that_were_not_kept_are_seen(seed: int) -> None:
    weight, basis = drawn(seed, 8, 5), orthonormal(drawn(seed + 1, 1, 8))
    edit = RemoveKeepingNorms("w", basis)
    assert edit.residual(weight, edit.apply(weight)) < 1e-4
    plain = RemoveSubspace("w", basis).apply(weight)
    assert RemoveSubspace("w", basis).residual(weight, plain) < 1e-5
    shrunk = 1 - float((plain.norm(dim=0) / weight.norm(dim=0)).min())
    assert edit.residual(weight, plain) > 0.1 * shrunk


def test_a_column_inside_the_subspace_is_not_blown_up() -> None:
    """Its norm cannot be kept: what is left of it has no direction but rounding's."""
    basis = orthonormal(drawn(1, 1, 8))
    weight = torch.cat([3 * basis, torch.zeros(8, 1), drawn(2, 8, 1)], 1)
    edit = RemoveKeepingNorms("w", basis)
    after = edit.apply(weight)
    assert float(after[:, :2].abs().max()) < 1e-5
    assert float(after[:, 2].norm()) == pytest.approx(float(weight[:, 2].norm()))
    assert edit.residual(weight, after) < 1e-5


@given(SEEDS)
def test_non_orthogonal_directions_are_removed_together(seed: int) -> None:
    first = drawn(seed, 8)
    second = first + 0.3 * drawn(seed + 1, 8)
    edit = RemoveSubspace("w", orthonormal(torch.stack([first, second])))
    after = edit.apply(drawn(seed + 2, 8, 5))
    assert float((first @ after).abs().max()) < 1e-3
    assert float((second @ after).abs().max()) < 1e-3


@given(SEEDS)
def test_strength_zero_is_the_identity_and_half_leaves_half(seed: int) -> None:
    weight, basis = drawn(seed, 6, 4), orthonormal(drawn(seed + 1, 1, 6))
    assert torch.equal(RemoveSubspace("w", basis, 0.0).apply(weight), weight)
    assert torch.equal(RemoveKeepingNorms("w", basis, 0.0).apply(weight), weight)
    half = RemoveSubspace("w", basis, 0.5).apply(weight)
    torch.testing.assert_close(basis.T @ half, 0.5 * (basis.T @ weight))


@given(SEEDS)
def test_additive_edits_commute_and_compose(seed: int) -> None:
    weight = drawn(seed, 5, 7)
    one = LowRank("w", drawn(seed + 1, 5, 1), drawn(seed + 2, 1, 7))
    two = LowRank("w", drawn(seed + 3, 5, 2), drawn(seed + 4, 2, 7))
    torch.testing.assert_close(apply_all([one, two], weight), apply_all([two, one], weight))
    both = LowRank("w", torch.cat([one.left, two.left], 1), torch.cat([one.right, two.right]))
    torch.testing.assert_close(apply_all([one, two], weight), both.apply(weight))


@pytest.mark.parametrize(
    "edit",
    [
        AddVector("w", torch.tensor([1.0, -2.0])),
        LowRank("w", torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5, 1.0]])),
        RemoveSubspace("w", torch.tensor([[1.0], [0.0]])),
        RemoveKeepingNorms("w", torch.tensor([[0.6], [0.8]])),
    ],
    ids=lambda edit: type(edit).__name__,
)
def test_a_residual_sees_an_edit_that_was_not_made(
    edit: Edit,
) -> None:
    weight = torch.tensor([3.0, 4.0]) if isinstance(edit, AddVector) else torch.eye(2)
    unchanged = weight.clone()
    assert edit.residual(weight, edit.apply(weight)) < 1e-6
    assert edit.residual(weight, weight) == pytest.approx(1.0)
    assert torch.equal(weight, unchanged)
