"""Checkpoints that somebody made to do harm, or that broke: one clean line, or a correct result."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bake.checkpoint import INDEX, Checkpoint
from bake.errors import CheckpointError
from bake.stream import write_checkpoint
from bake.verify import check_files

NUMBERS = st.one_of(
    st.integers(-2, 70),
    st.sampled_from([2**31, 2**32 - 1, 2**63, 2**64, -(2**63), 10**400, 1.5, True, None, "8", []]),
)
TEXTS = st.one_of(
    st.sampled_from(["a", "b", "c", "", "é", "\ud800", "a\nb", "\0", "__metadata__", "a" * 999]),
    st.text(max_size=4),
)
DTYPES = st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "F4", "F6_E2M3", "BOOL", "F99", ""])
ENTRY = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": DTYPES,
            "shape": st.lists(NUMBERS, max_size=3),
            "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3),
        }
    ),
    st.recursive(NUMBERS, lambda one: st.lists(one, max_size=2), max_leaves=4),
)


@st.composite
def fitting(draw: st.DrawFn) -> list[tuple[str, Any]]:
    """Entries without a hole, of which a few may then be changed."""
    found: list[tuple[str, Any]] = []
    end = 0
    for name in draw(st.lists(TEXTS, max_size=4)):
        length = draw(st.integers(0, 9))
        entry = {"dtype": "U8", "shape": [length], "data_offsets": [end, end + length]}
        end += length
        found.append((name, entry))
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(found)))
        found[place : place + 1] = [(draw(TEXTS), draw(ENTRY))]
    return found


def as_json(pairs: list[tuple[str, Any]]) -> str:
    """An object that may have a key twice."""
    return "{" + ",".join(f"{json.dumps(key)}:{json.dumps(value)}" for key, value in pairs) + "}"


HEADERS = st.one_of(
    fitting().map(as_json),
    st.sampled_from(
        [
            "",
            "{}",
            "null",
            "[" * 100_000,
            '{"a":' * 5_000,
            '{"__metadata__":{"a":NaN}}',
            '{"__metadata__":NaN}',
            '{"a":{"dtype":"U8","shape":[' + "9" * 5_000 + '],"data_offsets":[0,8]}}',
            '{"a":{"dtype":"U8","shape":[' + "2," * 20_000 + '2],"data_offsets":[0,8]}}',
        ]
    ),
)
FILES = st.sampled_from(
    [
        *("model.safetensors", "other.safetensors", "../out.safetensors", "/etc/passwd"),
        *("..", ".", "", "a/../model.safetensors", "model.safetensors\n", "\ud800.safetensors"),
        *("\0.safetensors", "folder.safetensors", "loop.safetensors", "pipe.safetensors"),
        *("x" * 300 + ".safetensors", "Ünïcödé-模型.safetensors"),
    ]
)
INDICES = st.one_of(
    st.none(),
    st.dictionaries(TEXTS, FILES, max_size=3).map(lambda files: {"weight_map": files}),
    st.sampled_from([{}, [], {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": None}]),
)


def hostile(folder: Path, data: st.DataObject) -> None:
    """Put files into a folder: a header, its bytes, perhaps an index, and a broken config."""
    header = data.draw(HEADERS).encode("utf-8", "surrogatepass")
    length = data.draw(st.sampled_from([len(header), len(header) - 1, 0, 2**40, 2**64 - 1]))
    if data.draw(st.booleans()):
        length = len(header)
    content = max(0, length).to_bytes(8, "little") + header + bytes(data.draw(st.integers(0, 40)))
    for name in ("model.safetensors", "Ünïcödé-模型.safetensors"):
        (folder / name).write_bytes(content)
    index = data.draw(INDICES)
    (folder / INDEX).unlink(missing_ok=True)
    if index is not None:
        (folder / INDEX).write_text(json.dumps(index))
    config = data.draw(st.sampled_from(["{}", '{"model_type": "llama"}', "{" * 100_000, "", "\0"]))
    (folder / "config.json").write_text(config if data.draw(st.booleans()) else "{}")


def tried(folder: Path, output: Path) -> bool:
    """Whether a folder is read, and then copied whole; otherwise it is refused in a line."""
    started = time.monotonic()
    try:
        base = Checkpoint.open(folder)
    except CheckpointError as error:
        assert "\n" not in str(error)
        str(error).encode()
        return False
    else:
        for path in output.iterdir():
            path.unlink()
        write_checkpoint(base, {}, (), {}, output)
        check_files(base, Checkpoint.open(output), {}, ())
        for shard in base.shards:
            assert (output / shard.file.name).read_bytes() == shard.file.read_bytes()
        return True
    finally:
        assert time.monotonic() - started < 2


LONG = (pytest.mark.slow, pytest.mark.timeout(3600))


@pytest.mark.parametrize("examples", [250, pytest.param(20_000, marks=LONG)])
def test_a_hostile_folder_is_read_or_refused(tmp_path: Path, examples: int) -> None:
    base, output = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    output.mkdir()
    (base / "folder.safetensors").mkdir()
    (base / "loop.safetensors").symlink_to("loop.safetensors")
    os.mkfifo(base / "pipe.safetensors")
    (tmp_path / "out.safetensors").write_bytes(b"outside")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = []

    @settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(st.data())
    def one(data: st.DataObject) -> None:
        hostile(base, data)
        found.append(tried(base, output))

    one()
    assert {True, False} <= set(found)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_atheris_finds_nothing_either(tmp_path: Path) -> None:
    """20,000 inputs that go by the lines they reach; the process ends with the first that fails."""
    pytest.importorskip("atheris")
    command = [sys.executable, "-m", "tests.fuzzed", str(tmp_path), "-runs=20000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done 20000 runs" in done.stderr


def test_a_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    """To open one waits for ever."""
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors"):
        Checkpoint.open(tmp_path)
