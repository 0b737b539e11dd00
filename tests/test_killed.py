"""Bakes that are killed while they write: nothing half-done appears, and they go on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bake.directions import Directions, save_directions
from tests.conftest import Run
from tests.tiny import write_place


@pytest.mark.parametrize("kills", ["16", pytest.param("200", marks=pytest.mark.slow)])
def test_a_killed_bake_leaves_no_part_and_ends_as_an_unbroken_one(
    tmp_path: Path, kills: str
) -> None:
    """At calls drawn of all that change the disk, the most of them twice in a row."""
    command = [sys.executable, "-m", "tests.killed", str(tmp_path), kills]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert found["kills"] == int(kills)
    # Some were late enough to have begun writing tensors.
    assert found["resumed"] > found["kills"] // 4


@pytest.mark.parametrize("faults", ["16", pytest.param("200", marks=pytest.mark.slow)])
def test_a_full_disk_is_one_line_whatever_finds_it(tmp_path: Path, faults: str) -> None:
    """At calls drawn as above: the output is as it was, and then as of an unbroken bake."""
    command = [sys.executable, "-m", "tests.killed", str(tmp_path), faults, "full"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["wrong"] == []


RECIPE = """\
model: model
directions: directions.safetensors
prompts: {target: a.txt, protected: b.txt, lookalike: null, general: c.txt, text: d.txt}
edits:
  - {op: add, layer: 1, strength: -1.5}
verify: {prompts: 4}
evaluate: {runtimes: [transformers], answer_tokens: 3, limit: 3}
guard: {protected_drop: 100, lookalike_rise: 100, general_rise: 100}
runtimes: [transformers]
"""
KILLED = """\
import os, sys
from pathlib import Path
import bake.writing
from bake.commands import main
def kill(*_):
    Path("busy").touch()
    sys.stdin.read()
    os.kill(os.getpid(), 9)
bake.writing.check_files = kill
main()
"""


def test_a_recipe_that_was_killed_is_baked_by_the_same_command(
    tmp_path: Path, bake: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole command, killed behind the write; while it lives, a second one is refused."""
    write_place(tmp_path, RECIPE, "abcd")
    monkeypatch.chdir(tmp_path)
    vectors = {1: torch.randn(32, generator=torch.Generator().manual_seed(0))}
    save_directions(Directions(vectors), Path("directions.safetensors"))
    command = ["--recipe", "recipe.yaml", "--output", "out"]
    first = subprocess.Popen([sys.executable, "-c", KILLED, *command], stdin=subprocess.PIPE)
    while not Path("busy").exists():
        assert first.poll() is None
        time.sleep(0.05)
    code, _, said = bake(*command)
    assert (code, said.splitlines()[-1]) == (
        1,
        "bake: out: another bake is writing it; wait for its end, or give another --output",
    )
    first.communicate(b"")
    assert first.returncode == -signal.SIGKILL
    assert not Path("out").exists()
    assert bake("clean", "elsewhere")[:2] == (0, "elsewhere: nothing was left\n")
    inode = Path(".out.bake", "files", "model.safetensors").stat().st_ino
    assert bake(*command)[0] == 0
    assert Path("out", "model.safetensors").stat().st_ino == inode
    assert not Path(".out.bake").exists()
    assert bake("verify", "out")[0] == 0
