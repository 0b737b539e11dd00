"""Models and edits on a device: what they are on the processor, and names that are refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bake.device import chosen_device, edit_device
from bake.errors import InputError
from bake.manifest import versions
from bake.pipeline import bake as run_recipe
from bake.placement import placement
from bake.recipe import load_recipe
from tests.conftest import Run
from tests.test_blocks import CASES
from tests.tiny import write_place, write_tiny

RECIPE = """\
model: model
directions: d.npy
prompts: {target: target.txt, protected: protected.txt, lookalike: null, general: general.txt}
edits:
  - {op: add, layer: 1, strength: -1.5}
  - {op: ablate, layers: 0-2}
verify: {prompts: 4}
evaluate: {runtimes: [transformers], answer_tokens: 3, limit: 3}
guard: {protected_drop: 100, lookalike_rise: 100, general_rise: 100}
runtimes: [transformers]
"""


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, words in (
        ("gpu", r"torch knows no device 'gpu'; give cpu, cuda"),
        ("cuda", "torch finds no cuda device here; give cpu"),
    ):
        monkeypatch.setenv("BAKE_DEVICE", name)
        with pytest.raises(InputError, match=rf"BAKE_DEVICE: {words}"):
            chosen_device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("BAKE_DEVICE", "cuda:2")
    with pytest.raises(InputError, match="there is no cuda:2; cuda has 2 here"):
        chosen_device()


def test_processes_of_one_machine_take_a_device_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny("llama", tmp_path)
    monkeypatch.delenv("BAKE_DEVICE", raising=False)
    assert chosen_device() == "cpu"
    assert placement(tmp_path, torch.float32) == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("BAKE_DEVICE", "cuda")
    assert chosen_device() == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert placement(tmp_path, torch.float32) == {"device_map": {"": "cuda:1"}}
    assert edit_device() == "cuda:1"


def test_of_all_accelerators_one_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAKE_DEVICE", "auto")
    found: list[torch.device | None] = [None, torch.device("cuda")]
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: found[0])
    assert edit_device() == "cpu"
    assert versions()["device"] == "auto (cpu)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found.pop(0)
    assert edit_device() == "cuda"
    assert versions()["device"] == "auto (cuda)"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert edit_device() == "cuda:1"


def test_edits_on_another_device_are_those_of_the_processor(tmp_path: Path) -> None:
    """To the byte, since its numbers are the processor's, and made there, but in float64."""
    command = [sys.executable, "-m", "tests.device_edits", str(tmp_path)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) > 4 * len(CASES)
    for line in lines:
        assert line.endswith(": cpu cpu" if "float64" in line else ": cpu other"), line


@pytest.mark.slow
def test_figures_on_another_device_are_those_of_the_processor(tmp_path: Path) -> None:
    """Fits, hooks, gradients, answers and drawn text, with every tensor where it has to be.

    `auto` is the processor through accelerate's device map where there is no accelerator. The
    last device has no float64.
    """
    write_tiny("llama", tmp_path / "model")
    found = []
    for device, lacking in (("cpu", ""), ("auto", ""), ("other", ""), ("other", "float64")):
        file = tmp_path / f"{device}{lacking}.safetensors"
        command = [sys.executable, "-m", "tests.device_figures", str(tmp_path / "model"), str(file)]
        where = {"BAKE_DEVICE": device, "LACKING": lacking}
        subprocess.run(command, check=True, env=os.environ | where)
        found.append(load_file(file))
    here, *others = found
    for there in others:
        assert here.keys() == there.keys()
        for name, value in here.items():
            if value.is_floating_point():
                assert (there[name] - value).norm() <= 1e-4 * value.norm(), name
            else:
                assert torch.equal(there[name], value), name


@pytest.mark.slow
def test_a_bake_on_another_device_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bake: Run
) -> None:
    """Its weights are the processor's here; made again there, the device is among the versions."""
    monkeypatch.chdir(write_place(tmp_path, RECIPE, ("target", "protected", "general")))
    np.save("d.npy", np.random.default_rng(0).standard_normal((3, 32)).astype("float32"))
    command = [sys.executable, "-m", "tests.on_other", "--recipe", "recipe.yaml", "--output"]
    where = {"PYTHONPATH": str(Path(__file__).parent.parent), "BAKE_DEVICE": "other"}
    subprocess.run([*command, "there"], check=True, env=os.environ | where)
    code, _, err = bake("--recipe", "recipe.yaml", "--output", "here")
    assert code == 0, err
    here, there = (Path(name, "model.safetensors").read_bytes() for name in ("here", "there"))
    assert here == there
    assert json.loads(Path("there", "bake.json").read_text())["versions"]["device"] == "other"
    code, out, err = bake("reproduce", "there")
    assert code == 0, err
    assert "other bytes: model.safetensors" not in out
    assert ["device", "other", "none"] in [line.split() for line in out.splitlines()]
    # Not the models' device alone.
    monkeypatch.setattr("bake.writing.edit_device", lambda: "nowhere")
    with pytest.raises(RuntimeError, match="nowhere"):
        run_recipe(load_recipe("recipe.yaml", output="nowhere"))
