"""Models on a device: the same figures as on the processor, and names that are refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bake.device import chosen_device
from bake.errors import InputError
from bake.placement import placement
from tests.tiny import write_tiny


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


@pytest.mark.slow
def test_figures_on_another_device_are_those_of_the_processor(tmp_path: Path) -> None:
    """Fits, hooks, gradients, answers and drawn text, with every tensor where it has to be.

    `auto` is the processor through accelerate's device map where there is no accelerator.
    """
    write_tiny("llama", tmp_path / "model")
    found = []
    for device in ("cpu", "auto", "other"):
        file = tmp_path / f"{device}.safetensors"
        command = [sys.executable, "-m", "tests.device_figures", str(tmp_path / "model"), str(file)]
        subprocess.run(command, check=True, env=os.environ | {"BAKE_DEVICE": device})
        found.append(load_file(file))
    here, *others = found
    for there in others:
        assert here.keys() == there.keys()
        for name, value in here.items():
            if value.is_floating_point():
                assert (there[name] - value).norm() <= 1e-4 * value.norm(), name
            else:
                assert torch.equal(there[name], value), name
