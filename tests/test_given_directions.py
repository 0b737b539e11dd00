"""A bake from given directions, on tiny models: the same bytes, and no class that must behave."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bake.archs import ARCHS
from bake.checkpoint import Checkpoint
from bake.directions import Directions, load_directions, save_directions
from bake.directions.value import Origin
from bake.errors import DirectionsError, FitError
from bake.judge import ANSWERED, REFUSED, Exchange, Verdict
from bake.manifest import file_hash
from bake.model import LiveModel
from bake.pipeline import bake
from bake.prepare import prepare
from bake.prompts import load_splits
from bake.recipe import LoadedRecipe, load_recipe
from bake.record import DIRECTIONS
from tests.tiny import write_place

RECIPE = """\
model: model
prompts:
  target: target.txt
  protected: protected.txt
  lookalike: null
  general: general.txt
  text: passages.txt
edits:
  - {op: add, layer: 1, strength: -1.5}
verify: {prompts: 4}
evaluate: {runtimes: [transformers], answer_tokens: 3, limit: 3}
guard: {protected_drop: 100, lookalike_rise: 100, general_rise: 100}
runtimes: [transformers]
"""
ROLES = ("target", "protected", "general", "passages")


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, prompts and a recipe, as current folder of all tests here."""
    return write_place(tmp_path_factory.mktemp("place"), RECIPE, ROLES)


@pytest.fixture(autouse=True)
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def recipe(output: Path, *overrides: str) -> LoadedRecipe:
    return load_recipe("recipe.yaml", overrides=overrides, output=str(output))


class ByTopic:
    """A judge of a model that refuses its target and protected prompts, whatever it says."""

    name = "by-topic"

    def __init__(self, _: object) -> None:
        self.refused = {
            line for role in ROLES[:2] for line in Path(f"{role}.txt").read_text().splitlines()
        }

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        return [Verdict(REFUSED if one.prompt in self.refused else ANSWERED) for one in exchanges]


def edited(folder: Path) -> dict[str, bytes]:
    """The bytes of the weights, and the config beside them."""
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "config.json")}


@pytest.mark.parametrize(
    ("edits", "estimator", "shown"),
    [
        pytest.param("[{op: add, layer: 1, strength: -1.5}]", "mean-difference", False, id="add"),
        pytest.param("[{op: ablate, layers: 0-2}]", "rmd", False, id="ablate"),
        pytest.param("[{op: gate, layers: [1, 2], strength: 2}]", "wrmd", True, id="gate"),
        pytest.param(
            "[{op: add, layer: 2, site: mid, strength: 1, carrier: ridge, constant_error: 9}]",
            "mean-difference",
            True,
            id="ridge",
        ),
    ],
)
def test_the_directions_of_a_bake_give_its_bytes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edits: str, estimator: str, shown: bool
) -> None:
    overrides = (f"edits={edits}", f"fit.estimator={estimator}", "verify.ridge_lost_share=1")
    with monkeypatch.context() as patched:
        patched.setattr("bake.pipeline.find_judge", ByTopic)
        first = bake(recipe(tmp_path / "first", *overrides))
    written = first / DIRECTIONS
    base = Path("model", "model.safetensors").read_bytes()
    assert (first / "model.safetensors").read_bytes() != base
    # The second time with the real judge, to whom nothing here is a refusal.
    given = f"directions={written}"
    with pytest.raises(FitError, match=r"prompts.target: only 0 of 10"):
        bake(recipe(tmp_path / "none", *overrides))
    second = bake(recipe(tmp_path / "second", *overrides, given))
    assert edited(first) == edited(second)
    assert written.read_bytes() == (second / DIRECTIONS).read_bytes()
    manifest = json.loads((second / "bake.json").read_text())
    # Prompts are shown where a probe or a constant is fitted, and nowhere else.
    assert bool(manifest["fit"]["classes"]) is shown
    assert manifest["directions"]["sha256"] == file_hash(written)
    assert manifest["directions"]["estimator"] == estimator
    # Half the direction is another bake: what is in the file counts.
    halved = load_directions(written)
    vectors = {layer: 0.5 * vector for layer, vector in halved.vectors.items()}
    save_directions(Directions(vectors), tmp_path / "halved.safetensors")
    third = bake(
        recipe(tmp_path / "third", *overrides, f"directions={tmp_path}/halved.safetensors")
    )
    same = edited(third)["model.safetensors"] == edited(first)["model.safetensors"]
    assert same is ("ablate" in edits)  # which takes the direction's line, not its length


def test_an_estimated_direction_is_the_gap_behind_its_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file's vector against plain forward passes over the prompts of the fit."""
    monkeypatch.setattr("bake.pipeline.find_judge", ByTopic)
    folder = bake(recipe(tmp_path / "out"))
    found = load_directions(folder / DIRECTIONS)
    model = LiveModel.load(Path("model"), ARCHS["llama"])
    means = {}
    for role in ("target", "general"):
        states = []
        for prompt in load_splits(f"{role}.txt").fit:
            ids = torch.tensor([model.render(prompt.text)])
            with torch.inference_mode():
                # Row 0 is the embedding, so row 2 is behind block 1.
                states.append(model.model(ids, output_hidden_states=True).hidden_states[2][0, -1])
        means[role] = torch.stack(states).mean(0)
    torch.testing.assert_close(found.vectors[1], means["target"] - means["general"])
    assert found.origin == Origin(
        *(
            "model",
            "mean-difference",
            "out",
            "recipe recipe: target refused against general answered",
        )
    )


def test_an_added_direction_is_in_the_bias_to_the_bit(tmp_path: Path) -> None:
    """The vector of the file, behind the block that it names, times the strength."""
    vector = torch.randn(32, generator=torch.Generator().manual_seed(3))
    save_directions(Directions({0: -vector, 1: vector}, Origin("m")), tmp_path / "d.safetensors")
    folder = bake(recipe(tmp_path / "out", f"directions={tmp_path / 'd.safetensors'}"))
    checkpoint = Checkpoint.open(folder)
    bias = checkpoint.read("model.layers.1.mlp.down_proj.bias")
    assert torch.equal(bias, -1.5 * vector)
    assert not checkpoint.read("model.layers.0.mlp.down_proj.bias").any()
    # Only what was used is written down.
    assert load_directions(folder / DIRECTIONS).layers == (1,)


def test_every_file_of_the_folder_is_in_the_manifest_by_its_hash(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.ones(32))
    folder = bake(recipe(tmp_path / "out", f"directions={tmp_path / 'd.npy'}"))
    outputs = json.loads((folder / "bake.json").read_text())["outputs"]
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files - {"bake.json"} == set(outputs)
    assert outputs["steering/directions.safetensors"] == file_hash(folder / DIRECTIONS)
    # vLLM, SGLang and Ollama load every *.safetensors that lies beside the weights.
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("layers", "edits", "words"),
    [
        ((1, 2), "[{op: add, layer: 0, strength: 1}]", "no direction for layer 0, .* it has 1-2"),
        ((0, 2), "[{op: gate, layers: 0-2, strength: 1}]", "for layer 1, .* it has 0, 2, so"),
        ((0,), "[{op: ablate, layers: 0-2}]", "for layer 1, .* it has 0, so"),
        ((1, 3), "[{op: add, layer: 1, strength: 1}]", "layer 3, the model's layers are 0 to 2"),
    ],
)
def test_layers_that_do_not_fit_are_refused_by_the_plan(
    tmp_path: Path, layers: tuple[int, ...], edits: str, words: str
) -> None:
    path = tmp_path / "d.safetensors"
    save_file({f"direction.{layer}": torch.ones(32) for layer in layers}, path)
    loaded = recipe(tmp_path / "out", f"directions={path}", f"edits={edits}")
    with pytest.raises(DirectionsError, match=rf"^{path}: .*{words}"):
        prepare(loaded.recipe)


def test_another_width_is_refused_by_the_plan(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.ones(31))
    loaded = recipe(tmp_path / "out", f"directions={tmp_path / 'd.npy'}")
    with pytest.raises(DirectionsError, match=r"d\.npy: .* width 31, the model's stream has 32"):
        prepare(loaded.recipe)


def test_states_with_the_embedding_in_front_are_refused(tmp_path: Path) -> None:
    """transformers' hidden_states have one row more than the model has blocks."""
    np.save(tmp_path / "d.npy", np.ones((4, 32)))
    loaded = recipe(tmp_path / "out", f"directions={tmp_path / 'd.npy'}")
    with pytest.raises(DirectionsError, match=r"row 0 of an array is behind block 0"):
        prepare(loaded.recipe)


def test_a_bare_vector_for_several_layers_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.ones(32))
    edits = "edits=[{op: gate, layers: 1-2, strength: 1}]"
    loaded = recipe(tmp_path / "out", f"directions={tmp_path / 'd.npy'}", edits)
    with pytest.raises(DirectionsError, match="does not say of which layer"):
        prepare(loaded.recipe)


def test_the_plan_says_where_directions_come_from(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    save_directions(Directions({1: torch.ones(32)}, Origin("some/model", "rmd")), path)
    plan = prepare(recipe(tmp_path / "out", f"directions={path}").recipe).plan
    (note, _) = plan.notes
    assert note.startswith(f"directions: layer 1 of {path} (model some/model, estimator rmd")
    assert note in plan.table()
    assert note in str(plan.as_json()["notes"])


def test_classes_that_do_not_differ_have_no_direction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = torch.ones(32, dtype=torch.float64)
    monkeypatch.setattr("bake.fit.samples.Samples.mean", same)
    monkeypatch.setattr("bake.pipeline.find_judge", ByTopic)
    with pytest.raises(FitError, match="layer 1: target and general have the same mean"):
        bake(recipe(tmp_path / "out"))
