"""The map of the kinds of refusal and what their directions trade, on a tiny model."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bake.archs import ARCHS
from bake.errors import FitError, PromptError
from bake.fit.geometry import cosines, generic, of_length, random_direction
from bake.fit.shifted import shifted
from bake.geometry import Question, geometry_to_file, table
from bake.judge import ANSWERED, REFUSED, Exchange, Verdict
from bake.model import LiveModel
from bake.prompts import load_prompts, load_splits
from bake.prompts.kinds import KINDS
from bake.recipe import LoadedRecipe, load_recipe
from tests.conftest import Run
from tests.tiny import write_place

RECIPE = """\
model: model
prompts:
  target: target.txt
  protected: protected.txt
  lookalike: null
  general: general.txt
edits:
  - {op: add, layer: 1, strength: -0.5}
evaluate: {runtimes: [transformers]}
runtimes: [transformers]
fit: {bootstrap: 2, answers: {tokens: 4}}
"""
ROLES = ("target", "protected", "general", "kind")


def test_the_cosines_and_lengths() -> None:
    found = cosines({"a": torch.tensor([3.0, 0]), "b": torch.tensor([1.0, 1])})
    assert found == [pytest.approx([1, 0.5**0.5]), pytest.approx([0.5**0.5, 1])]
    means = {"a": torch.tensor([3.0, 0]), "b": torch.tensor([1.0, 2])}
    assert generic(means, torch.tensor([1.0, 1])).tolist() == [1, 0]
    assert of_length(means, 6.0)["a"].tolist() == [6, 0]
    one, other = random_direction(4000, 1), random_direction(4000, 2)
    assert abs(cosines({"a": one, "b": other})[0][1]) < 0.1
    assert torch.equal(one, random_direction(4000, 1))


# --- the sets


@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_kind_has_prompts_on_many_topics_in_words_of_their_own(name: str) -> None:
    prompts = load_prompts(name, language="en")
    topics = Counter(one.topic for one in prompts)
    assert len(prompts) >= 40
    assert len(topics) >= 8
    assert min(topics.values()) >= 4
    assert len({one.text for one in prompts}) == len(prompts)
    assert all(len(one.text) <= 200 for one in prompts)
    # No template: few prompts of a set begin alike, or end alike.
    words = [one.text.casefold().split() for one in prompts]
    for ends in (Counter(tuple(each[:3]) for each in words if len(each) > 3),
                 Counter(tuple(each[-2:]) for each in words if len(each) > 3)):  # fmt: skip
        assert max(ends.values()) <= 0.1 * len(prompts)
    parts = load_splits(name)
    assert parts.removed == 0
    assert len(parts.fit) >= 20


def test_no_prompt_is_of_two_kinds() -> None:
    texts = Counter(one.text for name in KINDS for one in load_prompts(name))
    assert max(texts.values()) == 1
    assert len(KINDS) == 11


# --- on a model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"), RECIPE, ROLES)


class ByAnswer:
    """A judge to whom answers that begin with a word of the first half are refusals."""

    name = "by-answer"

    def __init__(self, _: object = None) -> None:
        pass

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        return [Verdict(REFUSED if refuses(one.answer) else ANSWERED) for one in exchanges]


def refuses(answer: str) -> bool:
    return answer[:1] == "w" and int(answer.split()[0][1:]) < 45


@pytest.fixture(autouse=True)
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("bake.geometry.find_judge", ByAnswer)
    # Few of a random model's answers are of one class.
    monkeypatch.setattr("bake.geometry.MINIMUM", 1)


def loaded(*overrides: str) -> LoadedRecipe:
    return load_recipe("recipe.yaml", overrides=overrides)


def states(model: LiveModel, texts: Sequence[str], layer: int) -> torch.Tensor:
    rows = []
    for text in texts:
        with torch.inference_mode():
            output = model.model(torch.tensor([model.render(text)]), output_hidden_states=True)
        rows.append(output.hidden_states[layer + 1][0, -1].double())
    return torch.stack(rows)


def first_word(model: LiveModel, text: str) -> str:
    return model.text(model.answer([model.render(text)], 4)[0])


def test_the_map_and_the_trades_against_plain_passes(tmp_path: Path) -> None:
    path = tmp_path / "g.json"
    question = Question(("target.txt", "kind.txt"), None, (-1.0, 2.0), 3)
    found = geometry_to_file(loaded(), question, path)
    assert json.loads(path.read_text()) == found
    model = LiveModel.load(Path("model"), ARCHS["llama"])
    fit = {name: [one.text for one in load_splits(f"{name}.txt").fit] for name in ROLES}
    answers = {name: [first_word(model, text) for text in fit[name]] for name in ROLES}

    def mean(name: str, refused: bool) -> torch.Tensor:
        chosen = [
            text
            for text, said in zip(fit[name], answers[name], strict=True)
            if refuses(said) == refused
        ]
        return states(model, chosen or fit[name], 1).mean(0)

    answered = mean("general", False)
    deltas = {f"{name}.txt": mean(name, True) - answered for name in ("target", "kind")}
    deltas["generic"] = (deltas["target.txt"] + deltas["kind.txt"]) / 2
    deltas["random"] = random_direction(32, 0)
    assert found["cosines"]["names"] == list(deltas)
    for row, wanted in zip(found["cosines"]["values"], cosines(deltas), strict=True):
        assert row == pytest.approx(wanted, abs=1e-4)
    length = float(deltas["generic"].norm())
    assert found["trades"]["length"] == pytest.approx(length, rel=1e-4)
    for name, vector in of_length(deltas, length).items():
        kind = found["kinds"].get(name)
        if kind:
            said = answers[name.removesuffix(".txt")]
            assert kind["refused"] == sum(map(refuses, said))
            assert kind["by"] == ("behaviour" if kind["refused"] else "set")
        for point, strength in zip(found["trades"]["curves"][name], (-1.0, 2.0), strict=True):
            assert point["strength"] == strength
            with shifted(model, 3, add={1: (strength * vector).float()}):
                check_point(model, point)
    check_point(model, found["trades"]["base"])
    assert found["trades"]["base"]["divergence"] == 0
    assert found["trades"]["prompts"] == {"target": 2, "protected": 2, "general": 2}
    assert "target.txt" in table(found)
    assert len(table(found).splitlines()) == 5


def check_point(model: LiveModel, point: dict[str, object]) -> None:
    """The percentages are of the selection split, with one forward pass after the other."""
    for role in ROLES[:3]:
        texts = [one.text for one in load_splits(f"{role}.txt").select]
        wanted = 100 * sum(refuses(first_word(model, text)) for text in texts) / len(texts)
        assert point["refused"][role] == pytest.approx(wanted)  # type: ignore[index]


def test_steering_moves_general_prompts(tmp_path: Path) -> None:
    question = Question(("target.txt",), 0, (0.5, 4.0), 3)
    found = geometry_to_file(loaded(), question, tmp_path / "g.json")
    for curve in found["trades"]["curves"].values():
        assert 0 < curve[0]["divergence"] < curve[1]["divergence"]
        assert math.isfinite(curve[1]["divergence"])


def test_what_cannot_be_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "g.json"
    with pytest.raises(PromptError, match=r"harmfull: .*did you mean 'harmful'"):
        geometry_to_file(loaded(), Question(("harmfull",)), path)
    monkeypatch.setattr("bake.geometry.MINIMUM", 11)
    with pytest.raises(FitError, match=r"prompts\.general: only \d+ of 10 .* at least 11"):
        geometry_to_file(loaded(), Question(("target.txt",), limit=1), path)
    monkeypatch.setattr("bake.geometry.MINIMUM", 1)
    copy = tmp_path / "copy.txt"
    copy.write_text(Path("general.txt").read_text())
    monkeypatch.setattr("tests.test_geometry.refuses", lambda _: False)
    with pytest.raises(FitError, match=r"has the same mean as prompts\.general behind layer 1"):
        geometry_to_file(loaded(), Question((str(copy),), limit=1), path)
    assert not path.exists()


def test_the_command(bake: Run, tmp_path: Path) -> None:
    path = tmp_path / "g.json"
    options = ["geometry", "--recipe", "recipe.yaml", "--output", str(path), "--kind", "kind.txt"]
    options += ["--strength", "-1", "--limit", "1"]
    code, out, err = bake(*options)
    assert code == 0, err
    assert out.splitlines()[1].startswith("kind.txt")
    found = json.loads(path.read_text())
    assert list(found["kinds"]) == ["kind.txt"]
    assert [len(curve) for curve in found["trades"]["curves"].values()] == [1, 1, 1]
    code, out, err = bake(*options)
    assert (code, "--overwrite" in err) == (1, True)
    code, out, err = bake(*options, "--overwrite", "--layer", "3")
    assert (code, len(err.splitlines())) == (1, 1)
    assert "--layer: layer 3 is out of range" in err
    assert bake("geometry", "--recipe", "recipe.yaml")[0] == 2
