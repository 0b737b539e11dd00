"""Laws of the estimators, of protection, and of the figures that say how good an estimate is."""

from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bake.errors import FitError
from bake.fit.category import sparse
from bake.fit.cosmic import cosmic_score, least_alike
from bake.fit.estimators import ESTIMATORS
from bake.fit.lda import lda
from bake.fit.learned import LEARNED
from bake.fit.logistic import logistic
from bake.fit.mean_difference import mean_difference
from bake.fit.pca import pca_of_differences
from bake.fit.protect import busiest, in_null_space, without, without_concepts
from bake.fit.readings import BINS, HIGH, LOW, counted, read
from bake.fit.ridge import ridge_solve, solve_dual, solve_primal
from bake.fit.rmd import rmd
from bake.fit.safesteer import norm_filtered_difference, weighted_median
from bake.fit.samples import Samples
from bake.fit.scores import Observed, area_under_curve, held_out, held_out_readings, pearson
from bake.fit.spread import bootstrap_cosine
from bake.recipe import Fit
from bake.recipe.values import Estimator

SEEDS = st.integers(0, 2**31)
NAMES = sorted(ESTIMATORS)
few = settings(max_examples=20, deadline=None)


def drawn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def two(seed: int, count: int = 14, width: int = 8) -> tuple[Tensor, Tensor]:
    """A refused and an answered class, apart and with noise that is not round."""
    shape = torch.linspace(0.3, 2.0, width, dtype=torch.float64)
    return drawn(seed, count, width) * shape + drawn(seed + 1, width), drawn(
        seed + 2, count + 3, width
    ) * shape


def estimate(name: str, refused: Tensor, answered: Tensor, **fit: object) -> Tensor:
    choice = Fit.model_validate({"entries": 5, "ridge": 0.1} | fit)
    return ESTIMATORS[name](Samples.of(refused), Samples.of(answered), choice)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_recipe_names_every_estimator_and_no_other() -> None:
    assert set(get_args(Estimator)) == {*ESTIMATORS, *LEARNED}
    assert not set(ESTIMATORS) & set(LEARNED)


# --- laws of all of them


@pytest.mark.parametrize("name", [name for name in NAMES if name != "som"])
@few
@given(seed=SEEDS)
def test_a_direction_has_length_one_and_points_to_refusal(name: str, seed: int) -> None:
    refused, answered = two(seed)
    direction = estimate(name, refused, answered)
    assert direction.shape == (8,)
    assert float(direction.norm()) == pytest.approx(1)
    assert float(direction @ (refused.mean(0) - answered.mean(0))) >= 0


@pytest.mark.parametrize("name", NAMES)
@few
@given(seed=SEEDS)
def test_order_and_repetition_do_not_matter(name: str, seed: int) -> None:
    refused, answered = two(seed)
    once = estimate(name, refused, answered)
    order = torch.randperm(len(refused), generator=torch.Generator().manual_seed(seed))
    same(estimate(name, refused[order], answered.flip(0)), once)
    same(estimate(name, torch.cat([refused, refused]), torch.cat([answered] * 3)), once)


@pytest.mark.parametrize("name", NAMES)
@few
@given(seed=SEEDS, scale=st.floats(1e-2, 1e2))
def test_units_and_the_origin_do_not_matter(name: str, seed: int, scale: float) -> None:
    """A ridge that is in units of the variance travels between layers."""
    refused, answered = two(seed)
    moved = drawn(seed + 9, 8)
    same(
        estimate(name, scale * refused + moved, scale * answered + moved),
        estimate(name, refused, answered),
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name != "category"])
@few
@given(seed=SEEDS)
def test_a_turned_stream_turns_the_direction(name: str, seed: int) -> None:
    """All but the one that keeps the largest coordinates, which are no property of the data."""
    refused, answered = two(seed)
    turn = torch.linalg.qr(drawn(seed + 5, 8, 8)).Q
    same(estimate(name, refused @ turn, answered @ turn), estimate(name, refused, answered) @ turn)


@pytest.mark.parametrize("name", NAMES)
@few
@given(seed=SEEDS)
def test_a_weight_of_two_is_a_sample_twice(name: str, seed: int) -> None:
    refused, answered = two(seed)
    choice = Fit.model_validate({"entries": 5, "ridge": 0.1})
    weights = torch.ones(len(refused))
    weights[:4] = 2
    heavy = ESTIMATORS[name](Samples.of(refused, weights), Samples.of(answered), choice)
    same(heavy, estimate(name, torch.cat([refused, refused[:4]]), answered))


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_left_as_they_were(name: str) -> None:
    refused, answered = two(1)
    copies = refused.clone(), answered.clone()
    estimate(name, refused, answered)
    assert torch.equal(refused, copies[0])
    assert torch.equal(answered, copies[1])


# --- the ridge family


@pytest.mark.parametrize("name", ["rmd", "wrmd", "lda", "logistic"])
@few
@given(seed=SEEDS)
def test_a_large_ridge_gives_the_mean_difference(name: str, seed: int) -> None:
    refused, answered = two(seed)
    direction = estimate(name, refused, answered, ridge=1e7)
    assert cosine(direction, refused.mean(0) - answered.mean(0)) > 1 - 1e-6
    assert cosine(estimate(name, refused, answered, ridge=1e-3), direction) < 1 - 1e-4


@given(SEEDS, st.sampled_from([0.01, 1.0]), st.integers(2, 20))
def test_the_dual_form_is_the_primal_one(seed: int, ridge: float, count: int) -> None:
    rows, vector = drawn(seed, count, 10), drawn(seed + 1, 10)
    scale = ridge * float(rows.square().sum()) / 10
    primal, dual = solve_primal(rows, vector, scale), solve_dual(rows, vector, scale)
    torch.testing.assert_close(primal, dual, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(ridge_solve(rows, vector, ridge), primal, rtol=1e-7, atol=1e-9)


@few
@given(SEEDS, st.sampled_from([0.01, 1.0]))
def test_rmd_and_lda_are_their_equations(seed: int, ridge: float) -> None:
    refused, answered = (one.numpy() for one in two(seed))
    delta = refused.mean(0) - answered.mean(0)
    covariances = [np.cov(one.T, bias=True) for one in (refused, answered)]
    for name, shape in {"rmd": covariances[1], "lda": sum(covariances) / 2}.items():
        wanted = np.linalg.solve(shape + ridge * np.trace(shape) / 8 * np.eye(8), delta)
        found = estimate(name, *map(torch.tensor, (refused, answered)), ridge=ridge)
        same(found, torch.tensor(wanted / np.linalg.norm(wanted)))


def test_a_class_of_equal_samples_has_no_covariance_to_divide_by() -> None:
    answered = Samples.of(torch.ones(4, 3))
    refused = Samples.of(torch.tensor([[2.0, 1.0, 1.0]] * 4))
    for direction in (rmd(refused, answered, 0.1), lda(refused, answered, 0.1)):
        assert direction.tolist() == [1, 0, 0]


@pytest.mark.parametrize("name", ["rmd", "wrmd", "lda", "logistic"])
def test_a_planted_direction_is_found_in_correlated_noise(name: str) -> None:
    """Two directions differ between the classes; the noise is along one of them."""
    planted, noisy = torch.eye(20, dtype=torch.float64)[:2]
    scale = torch.ones(20, dtype=torch.float64)
    scale[1] = 12.0
    turn = torch.linalg.qr(drawn(7, 20, 20)).Q  # so that no axis is special
    answered = drawn(1, 4000, 20) * scale @ turn
    refused = (drawn(2, 4000, 20) * scale + 2 * planted + 5 * noisy) @ turn
    assert cosine(estimate(name, refused, answered, ridge=1e-4), planted @ turn) > 0.95
    assert cosine(estimate("mean-difference", refused, answered), planted @ turn) < 0.7


@few
@given(SEEDS)
def test_the_logistic_probe_is_at_its_minimum(seed: int) -> None:
    """Against another optimiser, in the stream's own coordinates, more of them than samples."""
    refused, answered = two(seed, count=6, width=24)
    ridge = 0.05
    values = torch.cat([refused, answered])
    signs = torch.cat([torch.ones(len(refused)), -torch.ones(len(answered))]).double()
    weights = torch.cat([torch.full((len(one),), 0.5 / len(one)) for one in (refused, answered)])
    weights = weights.double()
    centred = values - weights @ values
    scale = ridge * float(weights @ centred.square().sum(1)) / 24
    found = torch.zeros(25, dtype=torch.float64, requires_grad=True)
    limits = {"max_iter": 2000, "tolerance_grad": 1e-12, "tolerance_change": 0}
    search = torch.optim.LBFGS([found], line_search_fn="strong_wolfe", **limits)

    def loss() -> Tensor:
        search.zero_grad()
        margins = signs * (centred @ found[:-1] + found[-1])
        value = (
            weights @ torch.nn.functional.softplus(-margins) + scale / 2 * found[:-1].square().sum()
        )
        value.backward()
        return value

    search.step(loss)
    direction = logistic(Samples.of(refused), Samples.of(answered), ridge)
    assert cosine(direction, found.detach()[:-1]) > 1 - 1e-6


def test_the_logistic_probe_of_separated_classes_ends(seed: int = 3) -> None:
    refused, answered = drawn(seed, 5, 200) + 50, drawn(seed + 1, 5, 200) - 50
    direction = logistic(Samples.of(refused), Samples.of(answered), 1e-9)
    assert torch.isfinite(direction).all()
    assert ((refused @ direction).min() > (answered @ direction).max()).item()


# --- the others


def test_pairs_of_one_topic_cancel_what_they_share() -> None:
    """What prompts are about is far larger than the refusal, and the same in both of a pair."""
    planted = torch.eye(30, dtype=torch.float64)[0]
    about = 20 * drawn(1, 40, 30)
    refused = about + 1.5 * planted + 0.1 * drawn(2, 40, 30)
    answered = about + 0.1 * drawn(3, 40, 30)
    topics = [f"topic {row}" for row in range(40)]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = Samples.of(answered[order], topics=[topics[row] for row in order])
    paired = pca_of_differences(Samples.of(refused, topics=topics), shuffled)
    assert cosine(paired, planted) > 0.99
    others = Samples.of(answered, topics=[f"another {row}" for row in range(40)])
    unpaired = pca_of_differences(Samples.of(refused, topics=topics), others)
    assert abs(cosine(unpaired, planted)) < 0.7


@few
@given(SEEDS)
def test_unpaired_pca_is_over_every_pair(seed: int) -> None:
    refused, answered = two(seed, count=6, width=5)
    every = (refused[:, None] - answered[None]).flatten(0, 1)
    axis = torch.linalg.eigh(every.T @ every).eigenvectors[:, -1]
    found = pca_of_differences(Samples.of(refused), Samples.of(answered))
    assert abs(cosine(found, axis)) > 1 - 1e-9


def test_the_norm_filter_averages_the_longer_half() -> None:
    """By hand: of the pairs' lengths 1, 2, 9 and 10 the last two are above the median."""
    refused = Samples.of(torch.tensor([[1.0, 0], [0, 9.0]]))
    answered = Samples.of(torch.tensor([[0.0, 0], [0, -1.0]]))
    lengths = torch.cdist(refused.values, answered.values).flatten()
    assert sorted(round(float(one), 2) for one in lengths) == [1.0, 1.41, 9.0, 10.0]
    direction = norm_filtered_difference(refused, answered)
    assert direction.tolist() == [0, 1]
    assert cosine(mean_difference(refused, answered), direction) < 1 - 1e-3


def test_equally_long_differences_are_all_kept() -> None:
    refused = Samples.of(torch.tensor([[1.0, 0], [0, 1.0]]))
    direction = norm_filtered_difference(refused, Samples.of(torch.zeros(1, 2)))
    torch.testing.assert_close(direction, torch.tensor([0.5, 0.5]).double().sqrt())


def test_a_weighted_median() -> None:
    values = torch.tensor([5.0, 1.0, 3.0])
    assert float(weighted_median(values, torch.ones(3))) == 3
    assert float(weighted_median(values, torch.tensor([5.0, 1.0, 1.0]))) == 5
    assert float(weighted_median(values[:2], torch.ones(2))) == 1


def test_sparse_keeps_the_largest_entries_and_drops_what_is_nothing() -> None:
    vector = torch.tensor([3.0, -4.0, 1.0, 1e-5])
    assert sparse(vector, 2).tolist() == [3, -4, 0, 0]
    assert sparse(vector, 9).tolist() == [3, -4, 1, 0]
    direction = estimate("category", *two(4), entries=3)
    assert int(direction.count_nonzero()) == 3


# --- samples


def test_samples_that_are_not_finite_or_not_there() -> None:
    with pytest.raises(FitError, match=r"not finite; the model may need float32"):
        Samples.of(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(FitError, match="no sample of this class"):
        Samples.of(torch.ones(2, 3), torch.zeros(2))
    with pytest.raises(FitError, match="no sample of this class"):
        Samples.of(torch.ones(0, 3))
    kept = Samples.of(torch.eye(3), torch.tensor([1.0, 0, 3]), ["a", "b", "c"])
    assert (kept.weights.tolist(), kept.topics) == ([0.25, 0.75], ("a", "c"))


# --- spread


def test_the_spread_tells_a_firm_estimate_from_noise() -> None:
    planted = drawn(1, 40)
    firm = Samples.of(drawn(2, 30, 40) + 5 * planted), Samples.of(drawn(3, 30, 40))
    noise = Samples.of(drawn(4, 30, 40)), Samples.of(drawn(5, 30, 40))
    assert bootstrap_cosine(mean_difference, *firm, 20, 0) > 0.97
    assert bootstrap_cosine(mean_difference, *noise, 20, 0) < 0.8
    assert bootstrap_cosine(mean_difference, *noise, 20, 0) == bootstrap_cosine(
        mean_difference, *noise, 20, 0
    )
    assert bootstrap_cosine(mean_difference, *noise, 20, 0) != bootstrap_cosine(
        mean_difference, *noise, 20, 1
    )


def test_samples_of_one_topic_are_no_independent_evidence() -> None:
    """Fifty near copies of each of four samples look firm one by one, and are not."""
    refused = drawn(1, 4, 30).repeat_interleave(50, 0) + 0.01 * drawn(2, 200, 30)
    answered = Samples.of(torch.zeros(4, 30))
    topics = [str(row // 50) for row in range(200)]
    alone = bootstrap_cosine(mean_difference, Samples.of(refused), answered, 20, 0)
    together = bootstrap_cosine(
        mean_difference, Samples.of(refused, topics=topics), answered, 20, 0
    )
    assert alone > 0.98
    assert together < 0.93


def test_what_was_written_in_pairs_is_drawn_in_pairs() -> None:
    """What a pair is about cancels in every resample, so it does not make the estimate loose."""
    about = 20 * drawn(1, 30, 40)
    topics = [str(row) for row in range(30)]
    refused = Samples.of(about + 2 * torch.eye(40)[0] + 0.1 * drawn(2, 30, 40), topics=topics)
    answered = about + 0.1 * drawn(3, 30, 40)
    paired = Samples.of(answered, topics=topics)
    apart = Samples.of(answered, topics=[f"other {topic}" for topic in topics])
    assert bootstrap_cosine(mean_difference, refused, paired, 20, 0) > 0.99
    assert bootstrap_cosine(mean_difference, refused, apart, 20, 0) < 0.5


# --- scores


def test_the_area_under_the_curve() -> None:
    assert area_under_curve(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 0.0])) == 1
    assert area_under_curve(torch.tensor([1.0]), torch.tensor([1.0])) == 0.5
    assert area_under_curve(torch.tensor([1.0, 3.0]), torch.tensor([2.0])) == 0.5


@given(SEEDS)
def test_pearson_is_numpys(seed: int) -> None:
    one, other = drawn(seed, 9), drawn(seed + 1, 9)
    assert pearson(one, other) == pytest.approx(np.corrcoef(one, other)[0, 1])
    assert pearson(one, torch.ones(9).double()) is None


def observed(values: Tensor, sign: float, topics: list[str] | None = None) -> Observed:
    count = len(values)
    names = tuple(topics or [f"{sign}{row}" for row in range(count)])
    return Observed(values.float(), torch.ones(count), torch.full((count,), sign), names)


def figures(refused: Observed, answered: Observed) -> dict[str, float]:
    """The held-out figures of mean differences."""
    return held_out(held_out_readings(mean_difference, refused, answered), refused, answered)


def test_held_out_figures_are_not_fooled_by_labels_that_mean_nothing() -> None:
    """With more dimensions than samples any labels are told apart where they were fitted."""
    noise = observed(drawn(1, 40, 300), 1.0), observed(drawn(2, 40, 300), -1.0)
    direction = mean_difference(noise[0].samples, noise[1].samples)
    inside = [one.samples.values @ direction for one in noise]
    assert area_under_curve(*inside) == 1
    found = figures(*noise)
    assert 0.25 < found["auc"] < 0.75
    assert abs(found["r"]) < 0.4
    # What a report draws is what the figures are of.
    unseen = held_out_readings(mean_difference, *noise)
    assert unseen is not None
    assert abs(float(unseen[0].mean() - unseen[1].mean())) < 0.3
    planted = 6 * torch.eye(300)[0].double()
    apart = observed(drawn(3, 40, 300) + planted, 1.0), observed(drawn(4, 40, 300), -1.0)
    found = figures(*apart)
    assert found["auc"] > 0.98
    assert found["r"] > 0.8


def test_the_samples_of_a_class_are_made_once() -> None:
    one = observed(drawn(1, 4, 3), 1.0)
    assert one.samples is one.samples


def test_what_is_held_out_is_held_out_by_topic() -> None:
    """Copies of a prompt under one topic must not lend each other their place."""
    values = drawn(5, 10, 400).repeat_interleave(6, 0)
    topics = [str(row // 6) for row in range(60)]
    others = observed(drawn(6, 10, 400).repeat_interleave(6, 0), -1.0, [f"o{t}" for t in topics])
    leaky = figures(observed(values, 1.0), others)
    honest = figures(observed(values, 1.0, topics), others)
    assert leaky["auc"] > honest["auc"] + 0.15


def test_prompts_between_the_classes_count_in_r_alone() -> None:
    planted = torch.eye(20)[0].double()
    refused, answered = drawn(1, 30, 20) + 8 * planted, drawn(2, 30, 20)
    neutral = drawn(3, 30, 20) + 4 * planted
    weights = torch.cat([torch.ones(30), torch.zeros(30)])
    confidences = torch.cat([torch.ones(30), torch.zeros(30)])
    mixed = Observed(
        torch.cat([refused, neutral]).float(), weights, confidences,
        tuple(str(row) for row in range(60)),
    )  # fmt: skip
    found = figures(mixed, observed(answered, -1.0))
    assert found["auc"] > 0.98
    assert found["r"] > 0.9  # the neutral ones lie half way, as their confidence does


def test_too_few_topics_have_no_held_out_figures() -> None:
    one = observed(drawn(1, 6, 5), 1.0, ["a"] * 6)
    assert figures(one, observed(drawn(2, 6, 5), -1.0, ["b"] * 6)) == {}


def test_a_histogram_counts_in_gaps_and_loses_no_prompt() -> None:
    gap, answered = torch.tensor([0.0, 4.0]).double(), torch.tensor([3.0, 1.0]).double()
    values = torch.tensor([[9.0, 1.0], [-9.0, 5.0], [0.0, 3.0], [0.0, 999.0], [0.0, -999.0]])
    readings = read(values, answered, gap)
    assert readings[:3].tolist() == [0, 1, 0.5]
    counts = counted(readings)
    assert len(counts) == BINS
    assert {place: count for place, count in enumerate(counts) if count} == {
        0: 1, 10: 1, 15: 1, 20: 1, 29: 1,
    }  # fmt: skip
    assert sum(counted(torch.linspace(LOW, HIGH, 301))) == 301


# --- COSMIC


def test_the_least_alike_layers() -> None:
    refused = torch.tensor([[1.0, 0], [1, 1], [0, 1], [-1, 0]])
    answered = torch.tensor([[1.0, 0], [1, 0], [1, 0], [1, 0]])
    assert least_alike(refused, answered, 0.5) == [2, 3]
    assert least_alike(refused, answered, 0.01) == [3]


def test_the_cosmic_score_is_two_where_each_becomes_the_other() -> None:
    refused, answered = drawn(1, 3, 9), drawn(2, 3, 9)
    assert cosmic_score(answered, refused, refused, answered) == pytest.approx(2)
    nothing = cosmic_score(refused, answered, refused, answered)
    assert nothing == pytest.approx(2 * cosine(refused.mean(0), answered.mean(0)))


# --- protection

Vectors = Callable[[int], Tensor]


@given(SEEDS, st.floats(0, 1))
def test_a_share_of_the_protected_direction_is_gone(seed: int, strength: float) -> None:
    direction, protected = drawn(seed, 7), drawn(seed + 1, 7)
    left = without(direction, protected, strength)
    wanted = (1 - strength) * float(direction @ protected)
    assert float(left @ protected) == pytest.approx(wanted, abs=1e-9)
    same(without(direction, 5 * protected, strength), left)
    assert torch.equal(without(direction, protected, 0.0), direction)
    assert torch.equal(without(direction, torch.zeros(7).double()), direction)


@given(SEEDS, st.integers(1, 5))
def test_the_ridge_of_concepts_goes_from_all_to_nothing(seed: int, count: int) -> None:
    direction, concepts = drawn(seed, 9), drawn(seed + 1, 9, count)
    assert float((concepts.T @ without_concepts(direction, concepts, 1e-12)).abs().max()) < 1e-6
    same(without_concepts(direction, concepts, 1e12), direction)
    same(without_concepts(direction, 7 * concepts, 0.1), without_concepts(direction, concepts, 0.1))
    # A larger ridge leaves more.
    left = [float(without_concepts(direction, concepts, ridge).norm()) for ridge in (0.01, 0.1, 1)]
    assert left == sorted(left)


@given(SEEDS, st.floats(0.01, 10))
def test_one_concept_is_the_partial_removal(seed: int, ridge: float) -> None:
    direction, concept = drawn(seed, 6), drawn(seed + 1, 6)
    partial = without(direction, concept, 1 / (1 + ridge))
    same(without_concepts(direction, concept[:, None], ridge), partial)


@given(SEEDS, st.integers(1, 30), st.floats(0.1, 0.9))
def test_the_null_space_is_a_projection_away_from_the_largest(
    seed: int, count: int, share: float
) -> None:
    direction, activations = drawn(seed, 12), drawn(seed + 1, count, 12)
    busy = busiest(activations, share)
    left = in_null_space(direction, busy)
    same(in_null_space(left, busy), left)
    axes = torch.linalg.svd(activations).Vh[: min(count, 12 - round(12 * share))]
    assert float((axes @ left).abs().max() if len(axes) else 0) < 1e-9
    if count <= 12 - round(12 * share):
        assert float((activations @ left).abs().max()) < 1e-8
    same(in_null_space(direction, busiest(3 * activations, share)), left)


def test_the_null_space_leaves_what_is_in_it() -> None:
    activations = torch.diag(torch.tensor([5.0, 4.0, 0.1, 0.2])).double()
    direction = torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    assert in_null_space(direction, busiest(activations, 0.5)).tolist() == pytest.approx(
        [0, 0, 3, 4]
    )
