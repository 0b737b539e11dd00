"""Code that comes with a checkpoint is not run, and nobody is asked whether it may be.

But a tokenizer's, where the recipe says so and the command line too.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bake.archs import ARCHS
from bake.directions import Directions, save_directions
from bake.errors import CheckpointError
from bake.model import LiveModel
from tests.conftest import Run
from tests.tiny import write_place, write_tiny

CODE = """\
from pathlib import Path
Path({ran!r}).touch()
class Own: pass
"""


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# What is in the way of the stock classes, and whether the model then loads without the code.
PLACES: dict[str, tuple[Callable[[Path], object], bool]] = {
    "a model, and a way to generate": (
        lambda folder: (
            change(
                folder / "config.json",
                auto_map={"AutoModelForCausalLM": "own.Own", "AutoConfig": "own.Own"},
            ),
            (folder / "custom_generate").mkdir(),
        ),
        True,
    ),
    "a config of another type": (
        lambda folder: change(
            folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"}
        ),
        False,
    ),
    "a tokenizer": (
        lambda folder: change(
            folder / "tokenizer_config.json",
            tokenizer_class="Own",
            auto_map={"AutoTokenizer": ["own.Own", "own.Own"]},
        ),
        False,
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_code_beside_the_weights_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    asked: list[object] = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    folder = tmp_path / "model"
    write_tiny("llama", folder)
    put, loads = PLACES[place]
    put(folder)
    code = CODE.format(ran=str(tmp_path / "ran"))
    (folder / "own.py").write_text(code)
    if (folder / "custom_generate").is_dir():
        (folder / "custom_generate" / "generate.py").write_text(f"{code}\ndef generate(*_): pass\n")
    if loads:
        model = LiveModel.load(folder, ARCHS["llama"])
        assert model.answer([[5, 6]], 2)
    else:
        with pytest.raises(CheckpointError, match="transformers cannot load it"):
            LiveModel.load(folder, ARCHS["llama"])
    assert not (tmp_path / "ran").exists()
    assert asked == []


RECIPE = """\
model: model
prompts: {target: a.txt, protected: b.txt, lookalike: null, general: c.txt, text: d.txt}
directions: directions.safetensors
trust_remote_code: true
edits:
  - {op: add, layer: 1, strength: -1.5}
verify: {prompts: 4}
evaluate: {runtimes: [transformers], answer_tokens: 3, limit: 3}
guard: {protected_drop: 100, lookalike_rise: 100, general_rise: 100}
runtimes: [transformers]
"""
TOKENIZER = """\
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({ran!r}).touch()
class Own(PreTrainedTokenizerFast): pass
"""


def test_a_tokenizers_code_runs_where_recipe_and_command_line_say_so(
    tmp_path: Path, bake: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the code of a model beside it does not."""
    write_place(tmp_path, RECIPE, "abcd")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    vectors = {1: torch.randn(32, generator=torch.Generator().manual_seed(0))}
    save_directions(Directions(vectors), Path("directions.safetensors"))
    own = {"AutoTokenizer": [None, "own.Own"]}
    change(tmp_path / "model" / "tokenizer_config.json", tokenizer_class="Own", auto_map=own)
    change(tmp_path / "model" / "config.json", auto_map={"AutoModelForCausalLM": "model.Own"})
    Path("model", "own.py").write_text(TOKENIZER.format(ran=str(tmp_path / "ran")))
    Path("model", "model.py").write_text(CODE.format(ran=str(tmp_path / "ran too")))
    command = ("--recipe", "recipe.yaml", "--output", "out")
    for words in (command, ("fit", *command[:2], "--output", "d.safetensors")):
        code, _, said = bake(*words)
        assert code == 1
        assert "trust_remote_code: true lets Python code run that comes with model; read" in said
    code, _, said = bake(*command, "--set", "trust_remote_code=false", "--trust-remote-code")
    assert (code, "--trust-remote-code: the recipe does not have" in said) == (1, True)
    assert bake(*command, "--set", "trust_remote_code=false")[0] == 1
    assert not Path("ran").exists()
    code, _, said = bake(*command, "--trust-remote-code")
    assert code == 0, said
    assert Path("ran").exists()
    assert not Path("ran too").exists()
    # What it wrote is a recipe again, and nobody has confirmed that one.
    Path("ran").unlink()
    code, _, said = bake("reproduce", "out")
    assert (code, "confirm with --trust-remote-code" in said) == (1, True)
    assert not Path("ran").exists()
