"""`bake fit`: from a recipe to a file of directions with its table, on tiny models and the demo."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bake.activations import Conversation
from bake.archs import ARCHS
from bake.checkpoint import Checkpoint
from bake.demo import Demo
from bake.directions import Directions, load_directions, save_directions
from bake.directions.value import Origin
from bake.errors import DirectionsError, FitError
from bake.fit.cosmic import CosmicScores, cosmic_score, least_alike
from bake.fit.estimators import ESTIMATORS
from bake.fit.first_token import FirstToken
from bake.fit.protect import busiest, in_null_space, without, without_concepts
from bake.fit.shifted import shifted
from bake.fitting import fit_to_file
from bake.judge import ANSWERED, REFUSED, UNREAD, Exchange, Verdict
from bake.model import LiveModel
from bake.prompts import load_splits
from bake.recipe import LoadedRecipe, load_recipe
from tests.conftest import Run
from tests.tiny import write_place, write_tiny

RECIPE = """\
model: model
prompts:
  target: target.txt
  protected: protected.txt
  lookalike: null
  general: general.txt
edits:
  - {op: add, layer: 1, strength: -0.5}
  - {op: add, layer: 2, strength: -0.5}
evaluate: {runtimes: [transformers]}
runtimes: [transformers]
fit: {bootstrap: 5, ridge: 0.1}
"""
ROLES = ("target", "protected", "general", "shield")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"), RECIPE, ROLES)


# The figures that take passes of their own.
OF_PASSES = {"cosmic", "bypass", "induce", "kl"}


class ByTopic:
    """A judge of a model that refuses its target and protected prompts, whatever it says."""

    name = "by-topic"
    unread: tuple[str, ...] = ()

    def __init__(self, _: object = None) -> None:
        self.refused = {
            line for role in ROLES[:2] for line in Path(f"{role}.txt").read_text().splitlines()
        }

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        return [
            Verdict(UNREAD if one.prompt in self.unread
                    else REFUSED if one.prompt in self.refused else ANSWERED)
            for one in exchanges
        ]  # fmt: skip


@pytest.fixture(autouse=True)
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("BAKE_CACHE", str(place / "cache"))
    for user in ("pipeline", "fitting"):
        monkeypatch.setattr(f"bake.{user}.find_judge", ByTopic)


def loaded(*overrides: str) -> LoadedRecipe:
    return load_recipe("recipe.yaml", overrides=overrides)


def states(role: str, layer: int, model: str = "model") -> torch.Tensor:
    """Last prompt tokens behind a block, by plain forward passes over the fitting split."""
    live = LiveModel.load(Path(model), ARCHS["llama"])
    prompts = load_splits(f"{role}.txt").fit
    rows = [behind_blocks(live, live.render(prompt.text))[layer] for prompt in prompts]
    return torch.stack(rows).double()


def behind_blocks(model: LiveModel, ids: Sequence[int], **change: object) -> torch.Tensor:
    """States [layers, d] of the last token behind every block, in the order that hooks act."""
    seen: list[torch.Tensor] = []

    def keep(_: object, __: object, out: object) -> None:
        state = out[0] if isinstance(out, tuple) else out
        assert isinstance(state, torch.Tensor)
        seen.append(state[0, -1])

    layers = len(model.decoder.layers)
    with shifted(model, layers, **change), torch.inference_mode():  # type: ignore[arg-type]
        handles = [model.block(layer).register_forward_hook(keep) for layer in range(layers)]
        model.model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS.keys() - {"som"}))
def test_every_estimator_gives_a_file_with_its_figures(tmp_path: Path, estimator: str) -> None:
    path = tmp_path / "d.safetensors"
    try:
        written = fit_to_file(loaded(f"fit.estimator={estimator}"), path)
    except FitError as error:
        # A random model may well lie beyond COSMIC's limit of divergence; it says so.
        assert estimator == "cosmic"
        assert "KL above 0.1" in str(error)
        return
    found = load_directions(path)
    assert found.origin.estimator == estimator
    assert found.layers == (1, 2)
    for layer in found.layers:
        assert torch.equal(found.vectors[layer], written.vectors[layer])
        assert found.figures[layer] == written.figures[layer]
        assert {"spread", "auc", "r"} | OF_PASSES == set(found.figures[layer])
        delta = states("target", layer).mean(0) - states("general", layer).mean(0)
        vector = found.vectors[layer].double()
        # As long as the gap along it, and towards refusal.
        assert float(vector @ delta / vector.norm()) == pytest.approx(
            float(vector.norm()), rel=1e-4
        )


def test_protection_is_what_the_mathematics_says(tmp_path: Path) -> None:
    target, general, protected, shield = (
        states(role, 1) for role in ("target", "general", "protected", "shield")
    )
    delta = target.mean(0) - general.mean(0)
    harm = protected.mean(0) - general.mean(0)
    concepts = torch.stack([harm, shield.mean(0) - general.mean(0)], 1)
    wanted = {
        ("protect=remove",): without(delta, harm),
        ("protect=remove", "protect_strength=0.5"): without(delta, harm, 0.5),
        ("protect=residual", "concepts=[shield.txt]"): without_concepts(delta, concepts, 0.01),
        ("protect=residual", "protect_ridge=2"): without_concepts(delta, harm[:, None], 2),
        ("protect=null-space", "protect_share=0.6"): in_null_space(
            delta, busiest(torch.cat([protected, general]), 0.6)
        ),
    }
    for number, (choices, direction) in enumerate(wanted.items()):
        path = tmp_path / f"{number}.safetensors"
        fit_to_file(loaded(*(f"fit.{choice}" for choice in choices)), path)
        found = load_directions(path).vectors[1].double()
        assert float(found @ direction / found.norm() / direction.norm()) > 1 - 1e-6, choices
        assert float(delta @ direction / delta.norm() / direction.norm()) < 1 - 1e-4, choices


def test_nothing_left_of_a_direction_is_named(tmp_path: Path) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_text(Path("target.txt").read_text())
    overrides = (f"prompts.protected={copy}", "fit.protect=remove")
    with pytest.raises(FitError, match=r"layer 1: .* nothing is left .* remove; protect less"):
        fit_to_file(loaded(*overrides), tmp_path / "d.safetensors")
    assert list(tmp_path.iterdir()) == [copy]


def test_verdicts_that_could_not_be_read_are_of_no_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [one.text for one in load_splits("target.txt").fit]
    monkeypatch.setattr(ByTopic, "unread", tuple(prompts[:1]))
    path = tmp_path / "d.safetensors"
    fit_to_file(loaded(), path)
    delta = states("target", 1)[1:].mean(0) - states("general", 1).mean(0)
    torch.testing.assert_close(
        load_directions(path).vectors[1].double(), delta, rtol=1e-4, atol=1e-5
    )
    monkeypatch.setattr(ByTopic, "unread", tuple(prompts[:3]))
    with pytest.raises(
        FitError, match=r"prompts\.target: only 7 of 10 .* \(3 were neither\), at least 8"
    ):
        fit_to_file(loaded(), tmp_path / "other.safetensors")


# --- COSMIC on a live model


def test_the_stream_without_a_direction_has_none_of_it_behind_any_block() -> None:
    model = LiveModel.load(Path("model"), ARCHS["llama"])
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1))
    unit = direction / direction.norm()
    plain = behind_blocks(model, [1, 40, 50, 2])
    without = behind_blocks(model, [1, 40, 50, 2], remove=direction)
    assert float((plain @ unit).abs().min()) > 1e-3
    assert float((without @ unit).abs().max()) < 1e-4
    added = behind_blocks(model, [1, 40, 50, 2], add={1: direction})
    assert torch.equal(plain[0], added[0])
    torch.testing.assert_close(added[1], plain[1] + direction)
    assert not torch.allclose(plain[2], added[2])
    assert torch.equal(plain, behind_blocks(model, [1, 40, 50, 2]))


def two_classes() -> tuple[LiveModel, dict[str, list[list[int]]], list[list[Conversation]]]:
    """The model, the prompts of two roles, and their conversations with the same short answer."""
    model = LiveModel.load(Path("model"), ARCHS["llama"])
    chats = {
        role: [model.render(prompt.text) for prompt in load_splits(f"{role}.txt").fit]
        for role in ("target", "general")
    }
    conversations = [
        [Conversation((*ids, 7, 8), len(ids) - 1, (), 1.0) for ids in chats[role]] for role in chats
    ]
    return model, chats, conversations


def test_cosmic_scores_are_those_of_the_shifted_model() -> None:
    model, chats, conversations = two_classes()
    # One that is not of its class plays no part.
    conversations[0].append(Conversation((1, 2, 3), 2, (), 0.0))
    scores = CosmicScores(model, *conversations, 3)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(2))

    def means(role: str, **change: object) -> torch.Tensor:
        return torch.stack([behind_blocks(model, ids, **change) for ids in chats[role]]).mean(0)

    refused, answered = means("target"), means("general")
    layers = least_alike(refused, answered)
    assert scores.layers == layers
    wanted = cosmic_score(
        means("target", remove=vector)[layers],
        means("general", add={1: vector})[layers],
        refused[layers],
        answered[layers],
    )
    assert scores.score(1, vector) == pytest.approx(wanted, abs=1e-4)


def test_first_token_scores_are_those_of_the_shifted_model() -> None:
    model, chats, conversations = two_classes()
    conversations[1].append(Conversation((1, 2, 3), 2, (), 0.0))
    scores = FirstToken(model, *conversations, 3, [5, 40])
    vector, basis = (
        torch.randn(shape, generator=torch.Generator().manual_seed(2)) for shape in ((32,), (2, 32))
    )

    def shares(role: str, **change: object) -> torch.Tensor:
        """P of every token, first in the answers."""
        rows = []
        for ids in chats[role]:
            with shifted(model, 3, **change), torch.inference_mode():  # type: ignore[arg-type]
                rows.append(model.model(torch.tensor([ids])).logits[0, -1].double().softmax(-1))
        return torch.stack(rows)

    def log_odds(found: torch.Tensor) -> float:
        opens = found[:, [5, 40]].sum(1)
        return float((opens / (1 - opens)).log().mean())

    for several, span in ((None, vector), (basis, basis)):
        found = scores.figures(1, vector, several)
        clean, without = shares("general"), shares("general", remove=span)
        assert found == pytest.approx(
            {
                "bypass": log_odds(shares("target", remove=span)),
                "induce": log_odds(shares("general", add={1: vector})),
                "kl": float((clean * (clean / without).log()).sum(1).mean()),
            },
            rel=1e-3,
        )
    assert set(FirstToken(model, *conversations, 3, []).figures(1, vector)) == {"kl"}


def test_cosmic_takes_the_best_layer_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the limit of divergence lets any layer pass, and where it lets none."""
    write_tiny("llama", tmp_path / "deep", num_hidden_layers=5)
    deep = ("fit.estimator=cosmic", f"model={tmp_path / 'deep'}")
    # The last fifth of the layers is out of the question.
    points = {0: 0.5, 1: 0.3, 2: 0.4, 3: 0.9, 4: 1.9}
    monkeypatch.setattr(CosmicScores, "score", lambda self, layer, *_: points[layer])
    monkeypatch.setattr(FirstToken, "divergence", lambda self, vector: 0.01)
    path = tmp_path / "d.safetensors"
    fit_to_file(loaded(*deep), path)
    model = str(tmp_path / "deep")
    wanted = states("target", 3, model).mean(0) - states("general", 3, model).mean(0)
    for vector in load_directions(path).vectors.values():
        cosine = float(vector.double() @ wanted / vector.norm() / wanted.norm())
        assert abs(cosine) > 1 - 1e-6
    monkeypatch.setattr(FirstToken, "divergence", lambda self, vector: 0.2)
    with pytest.raises(FitError, match=r"cosmic: .*general prompts are answered otherwise"):
        fit_to_file(loaded(*deep), tmp_path / "none.safetensors")


# --- figures in files


def test_figures_survive_the_file_and_the_choice_of_layers(tmp_path: Path) -> None:
    figures = {3: {"spread": 0.91234567, "r": -1.0}, 4: {"auc": 1.0}, 9: {"auc": 0.5}}
    made = Directions({3: torch.ones(4), 4: torch.ones(4)}, Origin(source="s"), figures)
    path = tmp_path / "d.safetensors"
    save_directions(made, path)
    found = load_directions(path)
    assert found.figures == {3: {"spread": 0.912346, "r": -1.0}, 4: {"auc": 1.0}}
    assert found.table().splitlines()[-3:] == [
        "layer      norm       spread     auc        r",
        "3          2          0.912                 -1.000",
        "4          2                     1.000",
    ]
    assert found.at([4]).figures == {4: {"auc": 1.0}}
    before = path.read_bytes()
    save_directions(found, path, overwrite=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "figures",
    ["", "[]", "3", "null", '{"x": {}}', '{"3": 4}', '{"3": {"auc": "high"}}',
     '{"3": {"auc": NaN}}', '{"3": {"auc": 1e999}}', "[" * 5000],
)  # fmt: skip
def test_figures_that_are_none_are_refused(tmp_path: Path, figures: str) -> None:
    path = tmp_path / "d.safetensors"
    save_directions(Directions({3: torch.ones(4)}, figures={3: {"auc": 1.0}}), path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"]["figures"] = figures
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(DirectionsError, match=r"__metadata__\.figures is .*save the directions"):
        load_directions(path)


# --- the command line


def test_the_command_writes_a_file_and_prints_its_table(bake: Run, tmp_path: Path) -> None:
    path = str(tmp_path / "d.safetensors")
    arguments = ["fit", "--recipe", "recipe.yaml", "--output", path]
    code, out, err = bake(*arguments, "--layers", "0-1", "--set", "fit.estimator=rmd")
    assert code == 0, err
    assert out.endswith(f"\n\nwritten: {path}\n")
    code, shown, _ = bake("directions", path)
    assert code == 0
    assert shown == out.removesuffix(f"\nwritten: {path}\n")
    assert load_directions(Path(path)).layers == (0, 1)
    code, out, err = bake(*arguments)
    assert (code, len(err.splitlines()), "--overwrite" in err) == (1, 1, True)
    assert bake(*arguments, "--overwrite", "--layers", "1")[0] == 0
    code, _, err = bake(*arguments, "--overwrite", "--layers", "3")
    assert (code, err) == (
        1,
        "bake: --layers: layer 3 is out of range; the model has layers 0 to 2\n",
    )
    assert bake(*arguments, "--layers", "9-1")[0] == 2
    assert bake("fit", "--recipe", "recipe.yaml")[0] == 2
    assert bake("fit", "--recipe", "recipe.yaml", "--output", "d.npy")[0] == 2


def test_the_file_bakes_what_the_recipe_does(bake: Run, tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    fit_to_file(loaded(), path)
    more = ["evaluate.limit=2", "evaluate.answer_tokens=2", "verify.prompts=2"]
    more += ["guard={protected_drop: 100, lookalike_rise: 100, general_rise: 100}"]
    options = ["--recipe", "recipe.yaml", *(word for one in more for word in ("--set", one))]
    code, _, err = bake(*options, "--output", str(tmp_path / "direct"))
    assert code == 0, err
    code, _, err = bake(
        *options, "--set", f"directions={path}", "--output", str(tmp_path / "given")
    )
    assert code == 0, err
    direct, given = (tmp_path / name / "model.safetensors" for name in ("direct", "given"))
    assert direct.read_bytes() == given.read_bytes()
    manifest = json.loads((tmp_path / "direct" / "bake.json").read_text())
    # COSMIC's score would take passes of its own, which a bake does not make.
    assert set(manifest["fit"]["figures"]) == {"1", "2"}
    assert set(manifest["fit"]["figures"]["1"]) == {"spread", "auc", "r"}
    assert Checkpoint.open(tmp_path / "direct").tensors


@pytest.mark.slow
def test_the_demos_directions_are_firm(
    bake: Run, demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the real model: held-out topics are told apart, and the figures say where best."""
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    options = ["fit.prompts_per_class=24", "fit.bootstrap=10"]
    arguments = ["fit", "--recipe", "political-open", "--layers", "20"]
    arguments += [word for one in options for word in ("--set", one)]
    code, out, err = bake(*arguments, "--output", "d.safetensors")
    assert code == 0, err
    found = load_directions(Path("d.safetensors")).figures[20]
    assert found["auc"] > 0.95
    assert found["r"] > 0.7
    assert found["spread"] > 0.9
    assert found["cosmic"] > 0
    assert "spread     auc        r          cosmic" in out
