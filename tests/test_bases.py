"""Several directions of a layer: their span, their estimators, their way into the weights."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bake.archs import ARCHS
from bake.directions import Directions, load_directions, save_directions
from bake.directions.value import Origin
from bake.errors import DirectionsError, FitError, RecipeError
from bake.fit.cone import cone_basis, mixtures
from bake.fit.learned import LEARNED, ConeLoss, Lesson, MixLoss, Said, refusal_openings
from bake.fit.low_rank_mix import learned_mix, mixing_basis, whitened
from bake.fit.mean_difference import mean_difference
from bake.fit.samples import Samples
from bake.fit.shifted import shifted
from bake.fit.som import hexagonal, self_organised, som_directions
from bake.fit.span import alikeness, frame, independent, within
from bake.fit.spread import bootstrap_cosine
from bake.fit.tail import Tail
from bake.fitting import fit_to_file
from bake.judge import ANSWERED, REFUSED, Exchange, Verdict
from bake.model import LiveModel, batches
from bake.ops.ablate import orthonormal
from bake.pipeline import bake
from bake.prepare import prepare
from bake.recipe import Fit, LoadedRecipe, load_recipe
from bake.record import DIRECTIONS
from tests.conftest import Run
from tests.test_fit_command import OF_PASSES, states
from tests.tiny import write_place, write_tiny

SEEDS = st.integers(0, 2**31)
few = settings(max_examples=20, deadline=None)


def drawn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# --- spans


@given(SEEDS, st.integers(1, 5))
def test_a_frame_has_the_span_and_the_sides_of_its_directions(seed: int, count: int) -> None:
    rows = drawn(seed, count, 7)
    found = frame(rows)
    torch.testing.assert_close(found @ found.T, torch.eye(count).double())
    torch.testing.assert_close(rows @ found.T @ found, rows)
    assert float(found[0] @ rows[0]) > 0
    assert float(found[-1] @ rows[-1]) > 0


@given(SEEDS, st.integers(1, 5))
def test_the_part_within_a_span_is_a_projection(seed: int, count: int) -> None:
    rows, vector = drawn(seed, count, 7), drawn(seed + 1, 7)
    part = within(rows, vector)
    torch.testing.assert_close(within(rows, part), part)
    assert float((rows @ (vector - part)).abs().max()) < 1e-9
    torch.testing.assert_close(within(3 * rows.flip(0), vector), part)


def test_what_lies_in_the_span_of_others_is_not_independent() -> None:
    rows = drawn(1, 3, 7)
    more = torch.stack([rows[0], 2 * rows[0], rows[1], rows[0] - rows[1], rows[2]])
    assert torch.equal(independent(more), rows)
    assert len(independent(more[:0])) == 0


@given(SEEDS, st.integers(1, 4))
def test_spans_are_alike_whatever_their_basis(seed: int, count: int) -> None:
    rows = drawn(seed, count, 9)
    assert alikeness(rows, drawn(seed + 1, count, count) @ rows) == pytest.approx(1)
    assert alikeness(rows[0], -rows[0]) == pytest.approx(-1)
    turned = torch.eye(9).double()
    assert alikeness(turned[:3], turned[3:6]) == 0
    assert alikeness(turned[:2], turned[1:3]) == pytest.approx(0.5)
    assert alikeness(turned[:4], turned[:2]) == pytest.approx(0.5)


# --- SOM


def test_a_grid_of_hexagons() -> None:
    places = hexagonal(5)
    near = (torch.cdist(places, places) - 1).abs() < 1e-9
    assert near.sum(1).max() == 6
    assert int(near[12].sum()) == 6  # one in the middle
    apart = torch.cdist(places, places) + 9 * torch.eye(25)
    assert float(apart.min()) == pytest.approx(1)


@few
@given(SEEDS)
def test_a_map_is_at_its_fixed_point(seed: int) -> None:
    """Every neuron is the mean of the samples, weighted with how near their winners are."""
    values = drawn(seed, 30, 5)
    samples = Samples.of(values, drawn(seed + 1, 30).abs() + 0.1)
    neurons, wins = self_organised(samples, 3)
    winners = torch.cdist(values, neurons).argmin(1)
    near = torch.exp(-torch.cdist(hexagonal(3), hexagonal(3)).square() / (2 * 0.33**2))
    shares = near[:, winners] * samples.weights
    wanted = (shares @ values) / shares.sum(1, keepdim=True)
    torch.testing.assert_close(neurons, wanted, rtol=1e-8, atol=1e-8)
    assert float(wins.sum()) == pytest.approx(1)
    assert float(wins[winners[0]]) >= float(samples.weights[0])


def three_ways(seed: int) -> tuple[Tensor, Samples, Samples]:
    """A class that refuses along one of three directions each time, and one that answers."""
    planted = torch.linalg.qr(drawn(seed, 40, 3)).Q.T
    refused = torch.cat([drawn(seed + n, 100, 40) + 9 * planted[n] for n in range(3)])
    return planted, Samples.of(refused), Samples.of(drawn(seed + 9, 300, 40))


@pytest.mark.parametrize("seed", [1, 20, 300])
def test_planted_ways_to_refuse_are_found_by_the_map(seed: int) -> None:
    planted, refused, answered = three_ways(seed)
    found = som_directions(refused, answered, 3, 4)
    assert found.shape == (3, 40)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3).double())
    assert alikeness(planted, found) > 0.9
    # Each neuron is one way to refuse, and the mean difference is of none.
    assert (found @ planted.T).max(1).values.min() > 0.9
    assert (found @ planted.T).argmax(1).unique().numel() == 3
    assert (mean_difference(refused, answered) @ planted.T).max() < 0.75


def test_a_map_of_one_neuron_is_the_mean_difference() -> None:
    _, refused, answered = three_ways(4)
    (found,) = som_directions(refused, answered, 3, 1)
    torch.testing.assert_close(found, mean_difference(refused, answered))


def test_a_map_larger_than_its_samples_gives_what_there_is() -> None:
    """Far neurons win nothing, and two samples have two directions."""
    samples = Samples.of(torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
    answered = Samples.of(torch.zeros(1, 3))
    neurons, _ = self_organised(samples, 32)
    assert torch.isfinite(neurons).all()
    assert som_directions(samples, answered, 5, 32).shape[0] <= 2
    same = Samples.of(torch.ones(3, 3))
    assert not som_directions(same, same, 2, 4).any()


def test_the_spread_of_several_directions_is_that_of_their_span() -> None:
    _, refused, answered = three_ways(2)
    noise = Samples.of(drawn(1, 60, 40)), Samples.of(drawn(2, 60, 40))

    def som(one: Samples, other: Samples) -> Tensor:
        return som_directions(one, other, 3, 4)

    assert bootstrap_cosine(som, refused, answered, 5, 0) > 0.9
    assert bootstrap_cosine(som, *noise, 5, 0) < 0.8


# --- cones by gradient


@given(SEEDS, st.integers(1, 4), st.integers(1, 12))
def test_mixtures_are_unit_vectors_of_the_cone(seed: int, size: int, count: int) -> None:
    basis = frame(drawn(seed, size, 9))
    found = mixtures(basis, count, torch.Generator().manual_seed(seed))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(count).double())
    shares = found @ basis.T
    torch.testing.assert_close(shares @ basis, found)
    assert float(shares.min()) > -1e-9
    torch.testing.assert_close(found[0], basis[0])
    if size > 1 and count > 3:
        torch.testing.assert_close(found[2], basis[1])
        assert (shares[1] > 1e-9).all()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_planted_cone_is_found(seed: int) -> None:
    """Only one orthonormal basis has all of its positive mixtures where this loss is least."""
    planted = frame(drawn(seed, 2, 12))

    def loss(directions: Tensor, _: int) -> Tensor:
        along = directions @ planted.T
        return (1 - along.square().sum(1) + 3 * along.clamp(max=0).square().sum(1)).mean()

    start = planted + 0.4 * drawn(seed + 7, 2, 12)
    assert alikeness(planted, start) < 0.9
    found = cone_basis(loss, start, 300, 16, seed)
    torch.testing.assert_close(found @ found.T, torch.eye(2).double())
    assert (found @ planted.T).max(1).values.min() > 0.98
    assert (found @ planted.T).argmax(1).unique().numel() == 2
    assert torch.equal(found, cone_basis(loss, start, 300, 16, seed))


# --- the low-rank mix


@few
@given(SEEDS, st.integers(3, 14), st.sampled_from([1e-4, 0.1]))
def test_whitening_is_the_inverse_root_of_the_covariance(
    seed: int, count: int, ridge: float
) -> None:
    """With fewer samples than dimensions and with more, against the d x d form."""
    rows, vectors = drawn(seed, count, 8), drawn(seed + 1, 3, 8)
    covariance = rows.T @ rows
    scale = ridge * float(covariance.trace()) / 8
    values, axes = torch.linalg.eigh(covariance)
    root = axes @ torch.diag((values.clamp_min(0) + scale) ** -0.5) @ axes.T
    found = whitened(vectors, rows, ridge)
    torch.testing.assert_close(found, vectors @ root, rtol=1e-6, atol=1e-6)
    basis = mixing_basis(vectors, rows, ridge)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3).double())
    assert alikeness(basis.T, found) == pytest.approx(1)
    assert torch.equal(whitened(vectors, torch.zeros(4, 8).double(), ridge), vectors)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_planted_mix_is_learned(seed: int) -> None:
    kinds = drawn(seed, 5, 40)
    basis = mixing_basis(kinds, drawn(seed + 1, 200, 40), 0.01)
    target = basis @ drawn(seed + 2, 5)
    target = 7 * target / target.norm()

    def loss(vector: Tensor, _: int) -> Tensor:
        return (vector - target).square().sum() / 49

    found = learned_mix(loss, basis, 7.0, 300, seed)
    assert float(found @ target / found.norm() / target.norm()) > 0.99
    assert float((found - target).norm() / target.norm()) < 0.15
    assert torch.equal(found, learned_mix(loss, basis, 7.0, 300, seed))
    # Units of the stream do not matter.
    larger = learned_mix(lambda v, n: loss(v / 100, n), basis, 700.0, 300, seed)
    torch.testing.assert_close(larger, 100 * found)


def test_tokens_that_open_refusals() -> None:
    refused = [Said((1,), (5, 9)), Said((1,), (5,)), Said((1,), (6,)), Said((1,), ())]
    answered = [Said((1,), (6, 5)), Said((1,), (7,))]
    assert refusal_openings(refused, answered) == [5]
    assert refusal_openings(answered, answered) == []


# --- losses on a live model

STARTS = [(1, 40, 50, 2), (1, 41, 2), (1, 42, 50, 51, 52, 2), (1, 43, 44, 2)]
ANSWERS = [(7, 8, 9), (10,), (11, 12), (13, 14, 15)]


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt2", "falcon_h1"])
def live(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LiveModel:
    folder: Path = tmp_path_factory.mktemp(request.param)
    write_tiny(request.param, folder)
    return LiveModel.load(folder, ARCHS[request.param])


def lesson(model: LiveModel, **fit: object) -> Lesson:
    said = [Said(start, answer) for start, answer in zip(STARTS, ANSWERS, strict=True)]
    states = (drawn(1, 6, 32) + 1, drawn(2, 6, 32))
    samples = (Samples.of(states[0]), Samples.of(states[1]))
    kinds = torch.stack([states[0].mean(0), drawn(3, 32)])
    choice = Fit.model_validate({"answers": {"tokens": 3}} | fit)
    return Lesson(model, 3, said[:2], said[2:], {1: samples}, {1: kinds}, choice, 0)


def next_tokens(model: LiveModel, ids: Sequence[int]) -> Tensor:
    """Log-probabilities [length, vocabulary] by a plain forward pass."""
    with torch.no_grad():
        logits: Tensor = model.model(torch.tensor([ids])).logits[0].float()
    return torch.log_softmax(logits, -1)


def test_a_tail_is_the_whole_model_behind_a_block(live: LiveModel) -> None:
    batch = next(batches(STARTS, 2, 4))
    tail = Tail(live, 1, batch)
    vector = drawn(5, 32).float().requires_grad_()
    moved = tail.shifted(vector)
    for row, place in enumerate(batch.rows):
        torch.testing.assert_close(
            tail.clean[row], next_tokens(live, STARTS[place])[-1], rtol=1e-3, atol=1e-3
        )
        with shifted(live, 3, add={1: vector.detach()}):
            wanted = next_tokens(live, STARTS[place])[-1]
        torch.testing.assert_close(moved[row].detach(), wanted, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(moved, tail.clean)
    (gradient,) = torch.autograd.grad(moved[:, 40].sum(), vector)
    assert float(gradient.norm()) > 0
    # The model is as it was: the earlier blocks compute again.
    assert torch.equal(Tail(live, 1, batch).clean, tail.clean)


def test_earlier_blocks_of_a_tail_do_not_run(live: LiveModel) -> None:
    tail = Tail(live, 1, next(batches(STARTS, 2, 4)))
    inner = [next(live.block(layer).children()) for layer in range(3)]
    ran: list[int] = []
    handles = [
        one.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, one in enumerate(inner)
    ]
    tail.shifted(torch.zeros(32))
    for handle in handles:
        handle.remove()
    assert set(ran) == {2}


def test_the_cones_loss_is_the_mean_over_prompts_each_with_its_direction(live: LiveModel) -> None:
    """Against one forward pass for each prompt, without padding."""
    gap = drawn(8, 32).float()
    taught = lesson(live)
    loss = ConeLoss(taught, 1, gap)
    directions = frame(drawn(9, 2, 32)).float()
    found = float(loss(directions, 0))
    total = 0.0
    with shifted(live, 3, remove=gap):
        complied = {one.start: live.answer([one.start], 3)[0] for one in taught.refused}
    with shifted(live, 3, add={1: gap}):
        declined = {one.start: live.answer([one.start], 3)[0] for one in taught.answered}
    for row, one in enumerate(loss._complied):
        assert complied[one.start] == list(one.answer)
        with shifted(live, 3, remove=directions[row]):
            logs = next_tokens(live, one.start + one.answer)
        total += mean_nll(logs, one) / 2
    for row, one in enumerate(loss._declined):
        assert declined[one.start] == list(one.answer)
        with shifted(live, 3, add={1: gap.norm() * directions[row]}):
            logs = next_tokens(live, one.start + one.answer)
        total += 0.2 * mean_nll(logs, one) / 2
    for row, one in enumerate(loss._own):
        clean = next_tokens(live, one.start + one.answer)
        with shifted(live, 3, remove=directions[row]):
            logs = next_tokens(live, one.start + one.answer)
        places = slice(len(one.start) - 1, -1)
        total += float((clean.exp() * (clean - logs)).sum(1)[places].mean()) / 2
    assert found == pytest.approx(total, rel=1e-3)


def mean_nll(logs: Tensor, said: Said) -> float:
    first = len(said.start) - 1
    places = enumerate(said.answer, start=first)
    return -sum(float(logs[place, token]) for place, token in places) / len(said.answer)


def test_the_mixs_loss_is_what_it_says(live: LiveModel) -> None:
    taught = lesson(live)
    vector = drawn(4, 32).float()
    found = float(MixLoss(taught, 1, [7, 10, 30])(vector, 0))
    total = 0.0
    for sign in (1, -1):
        for role in ("refused", "answered"):
            for one in getattr(taught, role):
                clean = next_tokens(live, one.start)[-1]
                with shifted(live, 3, add={1: sign * vector}):
                    logs = next_tokens(live, one.start)[-1]
                share = float(logs.exp()[[7, 10, 30]].sum())
                wanted = torch.tensor(share if sign > 0 else 1 - share)
                kept = float((clean.exp() * (clean - logs)).sum())
                total += kept / 2 if role == "answered" else -float(wanted.log()) / 2
    assert found == pytest.approx(total, rel=1e-3, abs=1e-4)


def test_learning_lowers_the_losses(live: LiveModel) -> None:
    """And the weights of the model have no part in it."""
    taught = lesson(live)
    gap = drawn(8, 32).float()
    cone = ConeLoss(taught, 1, gap)
    start = torch.stack([gap, drawn(3, 32).float()])
    found = cone_basis(cone, start, 25, 4, 0)
    with torch.no_grad():
        assert float(cone(found, 0)) < float(cone(frame(start), 0))
    mix = MixLoss(taught, 1, [7, 10, 30])
    basis = mixing_basis(drawn(1, 3, 32), drawn(2, 9, 32), 0.1).float()
    learned = learned_mix(mix, basis, float(gap.norm()), 25, 0)
    with torch.no_grad():
        assert float(mix(learned, 0)) < float(mix(torch.zeros(32), 0))
    assert all(one.grad is None for one in live.model.parameters())


# --- from a recipe to weights

RECIPE = """\
model: model
prompts:
  target: target.txt
  protected: protected.txt
  lookalike: null
  general: general.txt
edits:
  - {op: ablate, layers: 0-2, embeddings: true}
evaluate: {runtimes: [transformers], limit: 2, answer_tokens: 2}
verify: {prompts: 2}
guard: {protected_drop: 100, lookalike_rise: 100, general_rise: 100}
runtimes: [transformers]
fit: {bootstrap: 3, basis: 3, steps: 3, answers: {tokens: 3}}
"""
ROLES = ("target", "protected", "general", "kind")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"), RECIPE, ROLES)


class ByTopic:
    """A judge of a model that refuses its target and protected prompts, whatever it says."""

    name = "by-topic"

    def __init__(self, _: object = None) -> None:
        self.refused = {
            line for role in ROLES[:2] for line in Path(f"{role}.txt").read_text().splitlines()
        }

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        return [Verdict(REFUSED if one.prompt in self.refused else ANSWERED) for one in exchanges]


@pytest.fixture
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    for user in ("pipeline", "fitting"):
        monkeypatch.setattr(f"bake.{user}.find_judge", ByTopic)


def loaded(*overrides: str, output: Path | None = None) -> LoadedRecipe:
    return load_recipe("recipe.yaml", overrides=overrides, output=str(output) if output else None)


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize(
    ("estimator", "figures"),
    [("som", {"spread", "auc", "r"} | OF_PASSES), ("cone", {"spread"} | OF_PASSES)],
)
def test_several_directions_from_the_fit_to_the_weights(
    tmp_path: Path, estimator: str, figures: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of any of them is left in the stream, hooked or baked, from a file or the fit."""
    path = tmp_path / "d.safetensors"
    fit_to_file(loaded(f"fit.estimator={estimator}"), path)
    assert ("cone, layer 1 ...\n" in capsys.readouterr().err) == (estimator == "cone")
    found = load_directions(path)
    assert found.layers == found.several == (1,)
    rows = found.basis(1)
    assert rows.shape == (3, 32)
    assert set(found.figures[1]) == figures
    # All as long as the gap within their span, which is longer than that along any of them.
    assert rows.norm(dim=1).tolist() == pytest.approx([float(rows[0].norm())] * 3)
    if estimator == "cone":
        torch.testing.assert_close(frame(rows), rows / rows.norm(dim=1, keepdim=True))
    folder = bake(loaded(f"fit.estimator={estimator}", output=tmp_path / "fitted"))
    assert torch.equal(load_directions(folder / DIRECTIONS).basis(1), rows)
    again = bake(loaded(f"directions={path}", output=tmp_path / "given"))
    weights = "model.safetensors"
    assert (folder / weights).read_bytes() == (again / weights).read_bytes()
    live = LiveModel.load(folder, ARCHS["llama"])
    states = live.model(torch.tensor([[1, 40, 50, 2]]), output_hidden_states=True).hidden_states
    units = orthonormal(rows)
    for state in states[:-1]:  # the last one is behind the final norm
        assert float((state @ units).abs().max()) < 1e-4 * float(state.norm())
    manifest = json.loads((folder / "bake.json").read_text())
    assert manifest["fit"]["gaps"]["1"] == pytest.approx(float(rows[0].norm()), rel=1e-6)


@pytest.mark.usefixtures("inside")
def test_protection_acts_on_each_of_several(tmp_path: Path) -> None:
    options = ("fit.estimator=som", "fit.protect=remove", "fit.bootstrap=0")
    rows = fit_to_file(loaded(*options), tmp_path / "d.safetensors").basis(1).double()
    harm = states("protected", 1).mean(0) - states("general", 1).mean(0)
    plain = fit_to_file(loaded("fit.estimator=som"), tmp_path / "p.safetensors").basis(1).double()
    scale = float(harm.norm() * rows[0].norm())
    assert float((rows @ harm).abs().max()) < 1e-5 * scale
    assert float((plain @ harm).abs().max()) > 1e-2 * scale


@pytest.mark.usefixtures("inside")
def test_the_learned_mix_is_one_direction(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    options = ("fit.estimator=low-rank-mix", "edits=[{op: add, layer: 1, strength: -1}]")
    options += ("fit.steps=20", "fit.bootstrap=null")
    alone = fit_to_file(loaded(*options), path)
    assert alone.several == ()
    assert set(alone.figures[1]) == OF_PASSES  # to learn it anew takes the recipe's word
    more = fit_to_file(loaded(*options, "fit.categories=[kind.txt]"), tmp_path / "more.safetensors")
    cosine = float(torch.cosine_similarity(more.vectors[1], alone.vectors[1], dim=0))
    assert cosine < 0.999


@pytest.mark.usefixtures("inside")
def test_the_spread_of_what_is_learned_is_of_the_same_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who learns the mean difference has its spread; prompts and states are drawn alike."""
    taught: list[Lesson] = []

    def learn(lesson: Lesson, layer: int, _: object) -> Tensor:
        taught.append(lesson)
        return mean_difference(*lesson.samples[layer])

    monkeypatch.setitem(LEARNED, "low-rank-mix", learn)
    options = ("edits=[{op: add, layer: 1, strength: -1}]", "fit.bootstrap=4")
    plain = fit_to_file(loaded(*options), tmp_path / "p.safetensors")
    found = fit_to_file(loaded(*options, "fit.estimator=low-rank-mix"), tmp_path / "d.safetensors")
    assert found.figures[1]["spread"] == pytest.approx(plain.figures[1]["spread"], abs=1e-6)
    whole, *drawn = taught
    assert len(drawn) == 4
    for lesson in drawn:
        weights = Counter(one.topic for one in lesson.refused)
        refused = lesson.samples[1][0]
        shares = dict(zip(refused.topics, (len(weights) * refused.weights).tolist(), strict=True))
        assert shares.keys() == weights.keys() < {one.topic for one in whole.refused}
        scale = len(weights) / len(lesson.refused)
        assert shares == pytest.approx({topic: scale * n for topic, n in weights.items()})
        assert torch.equal(lesson.kinds[1][0], refused.mean)
        assert torch.equal(lesson.kinds[1][1:], whole.kinds[1][1:])


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("variant", ["projected", "norm-preserving", "affine"])
def test_the_variants_of_ablate_take_several(tmp_path: Path, variant: str) -> None:
    edits = f"edits=[{{op: ablate, layers: 0-2, variant: {variant}, strength: 1}}]"
    more = ("fit.estimator=som", "verify.ridge_lost_share=1", edits)
    assert bake(loaded(*more, output=tmp_path / "out")).is_dir()


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("edit", ["{op: add, layer: 1, strength: 1}",
                                  "{op: gate, layers: 1-2, strength: 1}"])  # fmt: skip
def test_operators_of_one_direction_refuse_several(tmp_path: Path, edit: str) -> None:
    op = edit[5:].split(",")[0]
    with pytest.raises(RecipeError) as caught:
        loaded("fit.estimator=som", f"edits=[{edit}]")
    line = f"edits.0.op: {op} takes one direction a layer, fit.estimator: som gives 3; use op"
    assert line in str(caught.value)
    assert loaded("fit.estimator=som", "fit.basis=1", f"edits=[{edit}]").recipe.fit.basis == 1
    path = tmp_path / "d.safetensors"
    rows = drawn(1, 3, 32)
    save_directions(Directions({1: rows, 2: drawn(2, 32)}), path)
    words = (
        rf"d\.safetensors: layer 1 has 3 directions and edits\.0 \(op: {op}\) takes one; .*first"
    )
    with pytest.raises(DirectionsError, match=words):
        prepare(loaded(f"directions={path}", f"edits=[{edit}]").recipe)
    first = tmp_path / "first.safetensors"
    save_directions(load_directions(path).first(), first)
    assert prepare(loaded(f"directions={first}", f"edits=[{edit}]").recipe).directions


@pytest.mark.usefixtures("inside")
def test_a_basis_that_no_file_could_hold_is_refused_before_the_fit(tmp_path: Path) -> None:
    with pytest.raises(DirectionsError, match=r"d\.gguf: a control vector has one .* fit\.basis=1"):
        fit_to_file(loaded("fit.estimator=cone"), tmp_path / "d.gguf")
    with pytest.raises(RecipeError, match=r"fit\.categories: .* low-rank-mix mixes them"):
        loaded("fit.categories=[kind.txt]")


# --- the hooked model


def test_an_ablation_of_dependent_directions_is_refused() -> None:
    rows = drawn(1, 2, 8)
    assert orthonormal(rows).shape == (8, 2)
    with pytest.raises(FitError, match="of the 3 directions to ablate one lies in the span"):
        orthonormal(torch.cat([rows, rows.sum(0)[None]]))


# --- files and their table


@pytest.mark.parametrize("count", [2, 5])
def test_bases_are_read_back_to_the_bit(tmp_path: Path, count: int) -> None:
    given = Directions(
        {3: drawn(1, count, 6), 4: drawn(2, 6)},
        Origin("m", "som", "out", "s"),
        {3: {"spread": 0.5}},
    )
    path = tmp_path / "d.safetensors"
    save_directions(given, path)
    found = load_directions(path)
    for layer in (3, 4):
        assert torch.equal(found.vectors[layer], given.vectors[layer])
    assert (found.several, found.width, found.figures) == ((3,), 6, given.figures)
    first = found.first()
    assert torch.equal(first.vectors[3], given.vectors[3][0])
    assert torch.equal(first.vectors[4], given.vectors[4])
    assert (first.several, first.figures, first.origin) == ((), {}, found.origin)
    before = path.read_bytes()
    save_directions(found, path, overwrite=True)
    assert path.read_bytes() == before


def test_a_basis_of_one_is_the_vector() -> None:
    assert Directions({3: torch.ones(1, 4)}).vectors[3].shape == (4,)


def test_the_table_of_several_and_the_way_to_one(bake: Run, tmp_path: Path) -> None:
    rows = torch.tensor([[3.0, 4, 0], [0, 5, 0]])
    path, first, vector = (str(tmp_path / name) for name in ("d.safetensors", "f.gguf", "v.gguf"))
    figures = {3: {"spread": 0.5}, 4: {"spread": 0.25}}
    save_directions(Directions({3: rows, 4: torch.ones(3)}, figures=figures), Path(path))
    code, out, _ = bake("directions", path)
    assert (code, out.splitlines()[-4:]) == (
        0,
        [
            "layer      norm       cosine     spread",
            "3          5                     0.500",
            "3          5          0.800",
            "4          1.73205               0.250",
        ],
    )
    code, _, err = bake("directions", path, "--output", vector)
    assert (code, len(err.splitlines())) == (1, 1)
    assert "direction.3 has 2 vectors, and a control vector has one a layer" in err
    code, out, err = bake("directions", path, "--first", "--output", first)
    assert code == 0, err
    assert load_directions(Path(first)).vectors[3].tolist() == [3, 4, 0]
    assert "cosine" not in out
