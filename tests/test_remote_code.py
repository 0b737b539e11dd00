"""Code that comes with a checkpoint is never run, and nobody is asked whether it may be."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bake.archs import ARCHS
from bake.errors import CheckpointError
from bake.model import LiveModel
from tests.tiny import write_tiny

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
