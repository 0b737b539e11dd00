"""A recipe's system prompt stands in front of every prompt, in the fit and in the measurement."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bake.archs import ARCHS
from bake.directions import load_directions
from bake.errors import CheckpointError
from bake.judge import Exchange, Verdict
from bake.model import LiveModel
from tests.conftest import Run
from tests.tiny import write_tiny
from tests.word_fit import ByWord

RECIPE = """\
model: model
prompts: {target: target.txt, protected: protected.txt, lookalike: null, general: general.txt}
edits: [{op: add, layer: 1, strength: -1, carrier: bias}]
evaluate: {runtimes: [transformers], answer_tokens: 6}
guard: {protected_drop: 100, general_rise: 100, target_at_most: null}
"""
# As Gemma's, and as one that leaves out the turns that it does not know.
FUSSY = (
    "{% for message in messages %}{% if message.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "<s> {{ message.content }} {% endfor %}"
)
DEAF = "{% for one in messages if one.role == 'user' %}<s> {{ one.content }} {% endfor %}"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BAKE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("bake.fit.run.MINIMUM", 0)
    # Whoever is asked about w1 refuses.
    monkeypatch.setattr("bake.judge.keyword.KeywordJudge.judge", refusals)
    write_tiny("llama", tmp_path / "model")
    for number, role in enumerate(("target", "protected", "general")):
        lines = [f"w{number + 1} w{n} w{n + 7}" for n in range(20, 50)]
        (tmp_path / f"{role}.txt").write_text("\n".join(lines))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def refusals(_: object, exchanges: Sequence[Exchange]) -> list[Verdict]:
    return ByWord(frozenset({"w1", "w2"})).judge(exchanges)


def test_it_is_rendered_as_the_systems_turn(place: Path) -> None:
    plain = LiveModel.load(place / "model", ARCHS["llama"])
    asked = LiveModel.load(place / "model", ARCHS["llama"], system="w60 w61")
    turns = [{"role": "system", "content": "w60 w61"}, {"role": "user", "content": "w5"}]
    wanted = plain.tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False
    )
    assert asked.render("w5") == wanted != plain.render("w5")


@pytest.mark.parametrize("template", [FUSSY, DEAF])
def test_a_template_without_one_is_refused(place: Path, bake: Run, template: str) -> None:
    file = place / "model" / "chat_template.jinja"
    assert file.exists()
    file.write_text(template)
    assert LiveModel.load(place / "model", ARCHS["llama"]).render("w5")
    live = LiveModel.load(place / "model", ARCHS["llama"], system="w60")
    with pytest.raises(CheckpointError, match="its chat template takes no system prompt"):
        live.render("w5")
    code, _, err = bake(
        *("fit", "--recipe", "recipe.yaml", "--output", "d.safetensors"),
        *("--set", "system_prompt=w60"),
    )
    assert code == 1
    assert "model: its chat template takes no system prompt; leave system_prompt out" in err
    assert not Path("d.safetensors").exists()


def test_fit_and_answers_see_it(place: Path, bake: Run) -> None:
    for name, options in (("none", ()), ("some", ("--set", "system_prompt=w60 w61 w62"))):
        arguments = ["fit", "--recipe", "recipe.yaml", "--output", f"{name}.safetensors"]
        assert bake(*arguments, *options)[0] == 0
        code, _, err = bake("--recipe", "recipe.yaml", "--output", name, *options)
        assert code == 0, err
    found = [load_directions(Path(f"{name}.safetensors")).vectors[1] for name in ("none", "some")]
    assert not torch.allclose(*found, rtol=0.01)
    rows = [Path(name, "answers.jsonl").read_text().splitlines()[-1] for name in ("none", "some")]
    plain, last = map(json.loads, rows)
    assert plain["prompt"] == last["prompt"]
    assert plain["before"] != last["before"]
    asked = LiveModel.load(place / "model", ARCHS["llama"], system="w60 w61 w62")
    (ids,) = asked.answer([asked.render(last["prompt"])], 6)
    assert asked.text(ids) == last["before"]
