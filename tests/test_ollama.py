"""What Ollama gets of a bake.

The program itself is not here. A script stands in its place, and what is tested is what bake asks
of it and makes of its exit codes.
"""

import json
import os
from pathlib import Path

import pytest

from bake.errors import CheckpointError
from bake.export.ollama import parameters, write_ollama
from bake.manifest import file_hash, write_manifest
from tests.conftest import Run

OLLAMA = """#!/bin/sh
echo "$@" >> "$0.asked"
case "$1 $2" in "show known") exit 0;; "show "*) exit 1;; "create bad") echo no >&2; exit 3;; esac
"""


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (None, {}),
        ({"eos_token_id": 2}, {}),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0},
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0},
        ),
        ({"repetition_penalty": 1.05, "temperature": None}, {"repeat_penalty": 1.05}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
    ],
)
def test_parameters_are_those_of_the_generation_config(
    tmp_path: Path, config: object, wanted: dict[str, object]
) -> None:
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert parameters(tmp_path, []) == wanted
    ends = ["</s>", '"""\nFROM elsewhere', '"""']
    assert parameters(tmp_path, ends) == wanted | {"stop": ["</s>"]}


def test_a_broken_generation_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: cannot be read as JSON"):
        parameters(tmp_path, [])


def test_the_modelfile_and_the_parameters_of_the_hub(tmp_path: Path) -> None:
    chosen = {"temperature": 0.6, "stop": ["<|im_end|>", 'say "done"!']}
    parts = [f"model-0000{number}-of-00002.gguf" for number in (1, 2)]
    write_ollama(tmp_path, parts, chosen)
    assert (tmp_path / "Modelfile").read_text().splitlines() == [
        *(f"FROM ./{part}" for part in parts),
        "PARAMETER temperature 0.6",
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop """say "done"!"""',
    ]
    assert json.loads((tmp_path / "params").read_text()) == chosen


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "baked"
    made.mkdir()
    (made / "model.gguf").write_bytes(b"GGUF")
    write_ollama(made, ["model.gguf"], {})
    names = ("model.gguf", "Modelfile", "params")
    outputs = {name: file_hash(made / name) for name in names}
    write_manifest(made, {"name": "mine", "outputs": outputs})
    return made


@pytest.fixture
def ollama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "bin" / "ollama"
    program.parent.mkdir()
    program.write_text(OLLAMA)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return program.with_name("ollama.asked")


def test_a_model_is_created(bake: Run, folder: Path, ollama: Path) -> None:
    code, out, err = bake("ollama", str(folder))
    assert (code, err) == (0, "")
    assert "ollama run mine" in out
    assert ollama.read_text().splitlines() == ["show mine", f"create mine -f {folder}/Modelfile"]


def test_a_model_that_is_there_is_replaced_only_on_demand(
    bake: Run, folder: Path, ollama: Path
) -> None:
    code, _, err = bake("ollama", str(folder), "--name", "known")
    assert code == 1
    assert "a model known already; give another --name, or --overwrite" in err
    assert bake("ollama", str(folder), "--name", "known", "--overwrite")[0] == 0
    assert ollama.read_text().splitlines()[-1].startswith("create known")


def test_what_ollama_refuses_is_said(bake: Run, folder: Path, ollama: Path) -> None:
    code, _, err = bake("ollama", str(folder), "--name", "bad")
    assert code == 1
    assert "`ollama create bad` ended with code 3" in err


def test_without_ollama_the_remedy_is_named(
    bake: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(folder))
    code, _, err = bake("ollama", str(folder))
    assert code == 1
    assert f"`ollama create mine -f {folder}/Modelfile` where it is" in err


def test_a_changed_gguf_and_a_folder_without_one_are_refused(
    bake: Run, folder: Path, ollama: Path
) -> None:
    (folder / "model.gguf").write_bytes(b"GGUG")
    assert "model.gguf: is not as the bake wrote it" in bake("ollama", str(folder))[2]
    write_manifest(folder, {"name": "mine", "outputs": {}})
    assert "has no Modelfile" in bake("ollama", str(folder))[2]
    assert not ollama.exists()
