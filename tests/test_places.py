"""Where directions are measured: the site, the token, one layer for all, and the choice of them."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bake.activations import Conversation, collect
from bake.archs import ARCHS, find_arch
from bake.checkpoint import Checkpoint
from bake.directions import load_directions
from bake.errors import ArchitectureError, FitError, RecipeError
from bake.fit.place import place_of
from bake.fit.select import Candidate, best
from bake.fit.shifted import shifted
from bake.fitting import fit_to_file, select_to_file
from bake.model import LiveModel
from bake.prepare import prepare
from bake.prompts import load_splits
from bake.recipe import LoadedRecipe, load_recipe
from tests.conftest import Run
from tests.test_fit_command import RECIPE, ROLES, ByTopic
from tests.tiny import write_place, write_tiny

# What reads the stream between attention and MLP, in the stock class.
READERS = {
    "llama": "post_attention_layernorm",
    "gemma2": "pre_feedforward_layernorm",
    "granite": "post_attention_layernorm",
    "falcon_h1": "pre_ff_layernorm",
    "olmo2": "mlp",
    "gpt2": "ln_2",
    "qwen3_next": "post_attention_layernorm",
    "deepseek_v3": "post_attention_layernorm",
}
CHATS = [(1, 5, 9, 40, 7), (1, 6, 9), (1, 7, 9, 41, 42, 43, 8)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"), RECIPE, ROLES)


@pytest.fixture
def inside(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("BAKE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("bake.fitting.find_judge", ByTopic)


def loaded(*overrides: str) -> LoadedRecipe:
    return load_recipe("recipe.yaml", overrides=overrides)


def read(model: LiveModel, module: str, ids: Sequence[int], token: int) -> Tensor:
    """What a module of block 1 reads at a token, in a plain pass."""
    seen: list[Tensor] = []
    reader = model.block(1).get_submodule(module)
    handle = reader.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        model.model(torch.tensor([ids]))
    handle.remove()
    return seen[0][0, token]


@pytest.mark.parametrize("model_type", sorted(READERS))
def test_the_middle_of_a_block_is_what_its_mlp_reads(tmp_path: Path, model_type: str) -> None:
    """Measured there, and moved by as much as is added there."""
    write_tiny(model_type, tmp_path)
    base = Checkpoint.open(tmp_path)
    model = LiveModel.load(tmp_path, find_arch(base.config, "config.json", base.tensors))
    middle = place_of(model, base, (1,), "mid", -2)
    chats = [Conversation(ids, len(ids) - 1, ()) for ids in CHATS]
    rows = tuple(range(len(CHATS)))
    found = collect(model, chats, {"mid": middle.tap(1, rows=rows)}, batch_size=2)["mid"].values
    wanted = torch.stack([read(model, READERS[model_type], ids, -2) for ids in CHATS]).float()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    vector = torch.randn(wanted.shape[1], generator=torch.Generator().manual_seed(1))
    with shifted(model, 3, add={1: vector}, place=middle):
        moved = torch.stack([read(model, READERS[model_type], ids, -2) for ids in CHATS])
    torch.testing.assert_close(moved.float(), wanted + vector, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize(("site", "token"), [("out", -1), ("out", -3), ("mid", -1), ("mid", -2)])
def test_directions_are_of_the_recipes_site_and_token(
    tmp_path: Path, site: str, token: int
) -> None:
    choice = (f"fit.site={site}", f"fit.positions.direction={token}", "fit.bootstrap=0")
    found = fit_to_file(loaded(*choice), tmp_path / "d.safetensors")
    assert load_directions(tmp_path / "d.safetensors").origin.site == site
    model = LiveModel.load(Path("model"), ARCHS["llama"])
    # Behind block 1 the stream is what block 2 reads.
    block, module = (1, "post_attention_layernorm") if site == "mid" else (2, "input_layernorm")
    means = []
    for role in ("target", "general"):
        rows = []
        for prompt in load_splits(f"{role}.txt").fit:
            seen: list[Tensor] = []
            reader = model.block(block).get_submodule(module)
            handle = reader.register_forward_pre_hook(lambda _, args, to=seen: to.append(args[0]))
            with torch.inference_mode():
                model.model(torch.tensor([model.render(prompt.text)]))
            handle.remove()
            rows.append(seen[0][0, token])
        means.append(torch.stack(rows).mean(0))
    torch.testing.assert_close(found.vectors[1], means[0] - means[1], atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("inside")
def test_one_layers_direction_serves_all_of_them(tmp_path: Path) -> None:
    """As long, in each, as its own gap along it."""
    own = fit_to_file(loaded(), tmp_path / "own.safetensors", layers=(0, 1, 2))
    found = fit_to_file(loaded("fit.layer=0"), tmp_path / "all.safetensors")
    assert found.layers == (1, 2)
    direction = own.vectors[0] / own.vectors[0].norm()
    for layer in found.layers:
        wanted = (own.vectors[layer] @ direction) * direction
        torch.testing.assert_close(found.vectors[layer], wanted, atol=1e-5, rtol=1e-4)
        # How good an estimate it is, is told of where it was made.
        for name in ("auc", "r", "spread", "bypass", "kl"):
            assert found.figures[layer][name] == pytest.approx(own.figures[0][name], abs=1e-4)


@pytest.mark.usefixtures("inside")
def test_every_place_is_measured_as_a_fit_there_is(tmp_path: Path, bake: Run) -> None:
    arguments = ("--recipe", "recipe.yaml", "--set", "fit.bootstrap=0", "--tokens", "2")
    path = tmp_path / "s.json"
    code, out, err = bake(
        "select", *arguments, "--site", "out", "--site", "mid", "--output", str(path)
    )
    assert code == 0, err
    found = json.loads(path.read_text())
    places = [(one["site"], one["token"], one["layer"]) for one in found["candidates"]]
    assert places == [
        (site, token, layer) for site in ("out", "mid") for token in (-1, -2) for layer in (1, 2)
    ]
    assert len({json.dumps(one["figures"]) for one in found["candidates"]}) == len(places)
    one = found["candidates"][6]
    choice = ("fit.bootstrap=0", "fit.site=mid", "fit.positions.direction=-2")
    alone = fit_to_file(loaded(*choice), tmp_path / "d.safetensors")
    assert one["figures"] == pytest.approx(dict(alone.figures[1]), abs=1e-5)
    chosen = best([Candidate(**one) for one in found["candidates"]], 3)
    assert found["chosen"] == (chosen.as_json() if chosen else None)
    assert (chosen.overrides if chosen else "none is within the limits") in out
    # What was read of the prompts goes with the selection; the table is not overwritten.
    assert not list((tmp_path / "cache").glob("fit/*"))
    code, _, err = bake("select", *arguments, "--output", str(path))
    assert (code, "s.json" in err) == (1, True)


@pytest.mark.usefixtures("inside")
def test_a_selection_that_was_killed_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, passes = LiveModel.run, []

    def counted(model: LiveModel, batch: object) -> None:
        passes.append(batch)
        if len(passes) == most:
            raise KeyboardInterrupt
        run(model, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(LiveModel, "run", counted)
    most = 0
    whole = tmp_path / "whole.json"
    select_to_file(loaded(), whole, sites=("out", "mid"))
    most, count = len(passes) // 2, len(passes)
    passes.clear()
    with pytest.raises(KeyboardInterrupt):
        select_to_file(loaded(), tmp_path / "s.json", sites=("out", "mid"))
    done, most = len(passes) - 1, 0
    passes.clear()
    select_to_file(loaded(), tmp_path / "s.json", sites=("out", "mid"))
    assert len(passes) == count - done
    assert (tmp_path / "s.json").read_bytes() == whole.read_bytes()


def candidate(layer: int, **figures: float) -> Candidate:
    return Candidate("out", -1, layer, {"kl": 0.05, "induce": 1.0, **figures})


def test_the_best_is_the_lowest_bypass_within_the_limits() -> None:
    good = candidate(7, bypass=-2.0)
    others = [
        candidate(6, bypass=-1.0),
        candidate(8, bypass=-9.0),  # of the last fifth
        candidate(5, bypass=-9.0, kl=0.11),
        candidate(4, bypass=-9.0, induce=0.0),
        Candidate("out", -1, 3, {"kl": 0.0}),  # refusals have no opening of their own
    ]
    assert best([*others, good], 10) is good
    assert best(others[1:], 10) is None


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("fit.layer=3",), "fit.layer: layer 3 is out of range; the model has layers 0 to 2"),
        (("fit.positions.direction=-60",), "fit.positions.direction: a prompt has"),
    ],
)
def test_a_place_that_the_model_lacks_is_refused(
    tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises((ArchitectureError, FitError), match=message):
        fit_to_file(loaded(*overrides), tmp_path / "d.safetensors")
    assert not (tmp_path / "d.safetensors").exists()


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize(
    ("estimator", "message"),
    [("cosmic", "cosmic chooses the layer by itself"), ("cone", "--site: cone learns a vector")],
)
def test_a_selection_of_what_is_not_measured_there_is_refused(
    tmp_path: Path, estimator: str, message: str
) -> None:
    with pytest.raises(FitError, match=message):
        select_to_file(
            loaded(f"fit.estimator={estimator}", "fit.basis=1"),
            tmp_path / "s.json",
            sites=("mid", "out"),
        )
    assert not (tmp_path / "s.json").exists()


@pytest.mark.usefixtures("inside")
def test_a_selection_in_parallel_blocks_is_refused_unloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny("phi", tmp_path / "phi")
    monkeypatch.delattr(LiveModel, "load")
    with pytest.raises(ArchitectureError, match=r"^fit.site: .* parallel"):
        select_to_file(
            loaded(f"model={tmp_path / 'phi'}"), tmp_path / "s.json", sites=("mid", "out")
        )


@pytest.mark.usefixtures("inside")
def test_parallel_blocks_have_no_middle(tmp_path: Path) -> None:
    write_tiny("phi", tmp_path / "phi")
    with pytest.raises(ArchitectureError, match=r"^fit.site: .* parallel.*use site: out$"):
        prepare(loaded("fit.site=mid", f"model={tmp_path / 'phi'}").recipe)


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("fit.estimator=cosmic", "fit.layer=1"), "fit.layer: cosmic chooses the layer"),
        (("fit.estimator=low-rank-mix", "fit.site=mid"), "fit.site: low-rank-mix learns"),
        (("fit.site=in",), "fit.site"),
        (("fit.positions.direction=0",), "fit.positions.direction"),
    ],
)
def test_places_that_contradict_are_named(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        loaded(*overrides)
