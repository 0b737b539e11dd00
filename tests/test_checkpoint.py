"""The read side of safetensors: what is accepted, and every way to be malformed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bake.checkpoint import Checkpoint
from bake.errors import CheckpointError
from tests.tiny import write_tiny


def write(folder: Path, header: dict[str, Any], data: bytes = b"\0" * 8) -> Path:
    folder.mkdir(exist_ok=True)
    text = json.dumps(header).encode()
    file = folder / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def entry(shape: list[int], first: int, last: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


def test_tensors_are_those_of_the_library(tiny: Path) -> None:
    base = Checkpoint.open(tiny)
    wanted = load_file(tiny / "model.safetensors")
    assert set(base.tensors) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(base.read(name), tensor)
    assert {path.name for path in base.sidecars()} >= {"config.json", "tokenizer.json"}


def test_shards_are_read_through_the_index(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path, shard="40KB")
    base = Checkpoint.open(tmp_path)
    assert len(base.shards) > 1
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert {name: info.file.name for name, info in base.tensors.items()} == index["weight_map"]


def test_other_copies_of_the_weights_stay_behind(tiny_llama: Path, tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"old weights")
    (tmp_path / "chat_template.jinja").write_text("x")
    names = {path.name for path in Checkpoint.open(tmp_path).sidecars()}
    assert "chat_template.jinja" in names
    assert "pytorch_model.bin" not in names
    assert "model.safetensors" not in names


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry([2], 0, 4)}, b"\0" * 4, "do not match shape"),
        ({"a": entry([2], 0, 8)}, b"\0" * 7, "truncated"),
        ({"a": entry([2], 0, 8)}, b"\0" * 9, "truncated or padded"),
        ({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, b"\0" * 6, "overlap"),
        ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"\0" * 12, "hole"),
        ({"a": entry([-1], 0, 4)}, b"\0" * 4, "malformed shape"),
        ({"a": entry([2], 0, 8, "F12")}, b"\0" * 8, "not supported"),
        ({"a": {"dtype": "F32"}}, b"", "malformed header entry"),
        ({"a": 5}, b"", "malformed header entry"),
        ({"__metadata__": {"format": 3}}, b"", "__metadata__: expected an object of text"),
        ({"__metadata__": ["pt"]}, b"", "__metadata__: expected an object of text"),
        ({"a": entry([2**40, 2**40], 0, 8)}, b"\0" * 8, "do not match shape"),
    ],
)
def test_a_malformed_header_is_one_line(
    tmp_path: Path, header: dict[str, Any], data: bytes, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(write(tmp_path, header, data))
    assert "\n" not in str(caught.value)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"config\.json: missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "expected a JSON object"),
        (lambda folder: (folder / "model.safetensors").unlink(), "neither"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64), "not a saf"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "truncated"),
    ],
)
def test_a_damaged_folder_is_one_line(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    write(tmp_path, {"a": entry([2], 0, 8)})
    Checkpoint.open(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint.open(tmp_path / "nowhere")


def test_an_index_does_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    write(tmp_path, {"a": entry([2], 0, 8)})
    index = {"weight_map": {"a": "../model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a file of this folder"):
        Checkpoint.open(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"a": entry([2], 0, 8)})
    index = {"weight_map": {"a": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: missing"):
        Checkpoint.open(tmp_path)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_mutated_file_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(content))))
    (tmp_path / "model.safetensors").write_bytes(content[:cut])
    try:
        base = Checkpoint.open(tmp_path)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        for name in base.tensors:
            base.read(name)
