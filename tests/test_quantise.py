"""llama.cpp's quantiser behind bake: the same bytes as its C API, and refusals in one line."""

import ctypes
import os
import subprocess
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from bake.arch import Arch
from bake.archs import find_arch
from bake.checkpoint import Checkpoint
from bake.errors import ConverterError, GGUFError, PromptError
from bake.export.importance import CHUNK, collect_importance
from bake.export.quantise import Quantisation, quantise
from bake.ggml import WRITABLE
from bake.gguf_file import GGUFFile
from bake.imatrix import Importance, write_importance
from bake.llama import LlamaModel, _backend_log
from bake.model import LiveModel
from bake.recipe.values import FILE_TYPES, TENSOR_TYPES
from tests.tiny import write_tiny
from tests.tiny_gguf import write_tiny_gguf

WIDE = {"hidden_size": 256, "intermediate_size": 256, "max_position_embeddings": 512}
NAME = "some.imatrix.gguf"
QUICK = ("q8_0", "q4_k_m")
Q6_K, Q8_0 = GGMLQuantizationType.Q6_K, GGMLQuantizationType.Q8_0


def opened(folder: Path) -> tuple[Arch, GGUFFile]:
    write_tiny("llama", folder, **WIDE)
    base = Checkpoint.open(folder)
    arch = find_arch(base.config, "config.json", base.tensors)
    write_tiny_gguf(base, arch, folder / "full.gguf")
    return arch, GGUFFile.open(folder / "full.gguf")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> GGUFFile:
    return opened(tmp_path_factory.mktemp("full"))[1]


@pytest.fixture(scope="module")
def importance(full: GGUFFile) -> Importance:
    random = np.random.default_rng(0)
    names = [name for name, one in full.tensors.items() if len(one.shape) > 1 and "blk" in name]
    return Importance(
        {name: random.random((1, 256), np.float32) for name in names},
        {name: np.ones(1, np.float32) for name in names},
        ("words",),
        4,
        CHUNK,
    )


def by_llama_cpp(
    full: GGUFFile, output: Path, kind: str, importance: Importance | None = None
) -> None:
    """llama-quantize of $BAKE_LLAMA_QUANTIZE, or else the call that it makes."""
    program = os.environ.get("BAKE_LLAMA_QUANTIZE")
    if program:
        command = [program]
        if importance:
            write_importance(importance, output.with_name(NAME))
            command += ["--imatrix", NAME]
        command += [str(full.path), str(output), kind]
        subprocess.run(command, check=True, capture_output=True, cwd=output.parent)
        return
    _backend_log()
    parameters = llama_cpp.llama_model_quantize_default_params()
    alias = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
    name = alias.get(kind.upper(), kind.upper())
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    if importance:
        means = importance.means()
        entries = (llama_cpp.llama_model_imatrix_data * (len(means) + 1))()
        for place, (tensor, values) in zip(entries, means.items(), strict=False):
            place.name, place.size = tensor.encode(), values.size
            place.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        parameters.imatrix = entries
    assert not llama_cpp.llama_model_quantize(
        str(full.path).encode(), str(output).encode(), ctypes.byref(parameters)
    )


def data(path: Path) -> dict[str, tuple[GGMLQuantizationType, bytes]]:
    """The type and the bytes of every tensor."""
    content = path.read_bytes()
    return {
        name: (one.type, content[one.offset : one.offset + one.nbytes])
        for name, one in GGUFFile.open(path).tensors.items()
    }


@pytest.mark.parametrize(
    "kind",
    [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in FILE_TYPES],
)
def test_every_type_is_llama_quantizes_byte_for_byte(
    full: GGUFFile, importance: Importance, tmp_path: Path, kind: str
) -> None:
    output, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    steps: list[int] = []
    quantise(full, output, Quantisation(kind), 2, importance, NAME, steps.append)
    by_llama_cpp(full, theirs, kind, importance)
    assert data(output) == data(theirs)
    assert sum(steps) == len(full.tensors)
    if os.environ.get("BAKE_LLAMA_QUANTIZE"):
        assert output.read_bytes() == theirs.read_bytes()
    metadata = GGUFFile.open(output).metadata
    assert metadata["quantize.imatrix.file"] == NAME
    assert metadata["quantize.imatrix.dataset"] == "words"
    assert metadata["quantize.imatrix.entries_count"] == len(importance.sums)
    assert metadata["quantize.imatrix.chunks_count"] == 4


def test_the_importance_matrix_counts(
    full: GGUFFile, importance: Importance, tmp_path: Path
) -> None:
    paths = tmp_path / "plain.gguf", tmp_path / "weighed.gguf"
    for path, given in zip(paths, (None, importance), strict=True):
        quantise(full, path, Quantisation("q4_k_m"), 1, given, NAME)
    plain, weighed = map(data, paths)
    assert plain["blk.0.attn_q.weight"] != weighed["blk.0.attn_q.weight"]
    assert plain["token_embd.weight"] == weighed["token_embd.weight"]
    assert "quantize.imatrix.file" not in GGUFFile.open(paths[0]).metadata


def test_single_matrices_have_types_of_their_own(full: GGUFFile, tmp_path: Path) -> None:
    asked = Quantisation(
        "q4_0", (("ATTN_V", Q6_K), (r"blk\.[01]\.ffn", Q8_0)), Q8_0, Q6_K, file_type=2
    )
    quantise(full, tmp_path / "out.gguf", asked, 1)
    found = {name: kind for name, (kind, _) in data(tmp_path / "out.gguf").items()}
    assert found["output.weight"] is Q8_0
    assert found["token_embd.weight"] is found["blk.2.attn_v.weight"] is Q6_K
    assert found["blk.1.ffn_up.weight"] is Q8_0
    assert found["blk.2.ffn_up.weight"] is found["blk.0.attn_q.weight"]
    assert found["blk.2.ffn_up.weight"].name == "Q4_0"
    quantise(full, tmp_path / "pure.gguf", Quantisation("q4_k_m", pure=True), 1)
    kinds = {kind.name for name, (kind, _) in data(tmp_path / "pure.gguf").items()}
    assert kinds == {"Q4_K", "F32"}


def test_what_is_refused_leaves_nothing(
    full: GGUFFile, importance: Importance, tmp_path: Path
) -> None:
    output = tmp_path / "out.gguf"

    def refused(asked: Quantisation, message: str, given: Importance | None = None) -> None:
        with pytest.raises((ConverterError, GGUFError), match=message) as caught:
            quantise(full, output, asked, 1, given, NAME)
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    refused(Quantisation("iq2_xs"), "does not make iq2_xs .* requires an imatrix.*give an imatrix")
    refused(Quantisation("q4_0", (("ffn_dwn", Q8_0),)), "'ffn_dwn' is in the name of no matrix")
    refused(Quantisation("q4_0", (("blk.(", Q8_0),)), r"'blk\.\(' is no regular expression")
    narrow = importance.renamed({})
    narrow.sums["blk.0.attn_q.weight"] = np.ones((1, 255), np.float32)  # type: ignore[index]
    refused(Quantisation("q4_0"), r"some\.imatrix\.gguf: blk\.0\.attn_q\.weight has 255", narrow)
    other = importance.renamed({name: f"other.{name}" for name in importance.sums})
    refused(Quantisation("q4_0"), "has no tensor of this model", other)


def test_a_quantiser_that_dies_is_one_line(
    full: GGUFFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ggml ends the process where it finds what cannot be; here the process is none at all."""
    monkeypatch.setattr("bake.export.quantise.sys.executable", "/bin/false")
    with pytest.raises(ConverterError, match="does not make q8_0 of this model: it ended with"):
        quantise(full, tmp_path / "out.gguf", Quantisation("q8_0"), 1)


def test_the_recipe_knows_the_types_that_ggml_writes() -> None:
    assert {kind.name.lower() for kind in WRITABLE} == set(TENSOR_TYPES)


def test_the_sums_are_those_of_what_matrices_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the live model's own inputs."""
    arch, full = opened(tmp_path / "m")
    ids = torch.randint(3, 96, (1, CHUNK), generator=torch.Generator().manual_seed(0))
    # A tiny GGUF has no vocabulary.
    monkeypatch.setattr(LlamaModel, "tokenize", lambda *_: [*ids[0].tolist(), 5, 6])
    read: list[int] = []
    found = collect_importance(full.path, ["words"], "words", 1, read.append)
    assert (found.chunks, found.chunk_size, found.datasets, read) == (1, CHUNK, ("words",), [CHUNK])
    model = LiveModel.load(tmp_path / "m", arch)
    modules = [
        f"model.layers.{one}" for one in ("0.self_attn.o_proj", "1.mlp.up_proj", "2.mlp.down_proj")
    ]
    inputs: list[torch.Tensor] = []
    for module in modules:
        model.module(module).register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.inference_mode():
        model.model(ids)
    names = ("blk.0.attn_output.weight", "blk.1.ffn_up.weight", "blk.2.ffn_down.weight")
    for name, rows in zip(names, inputs, strict=True):
        wanted = rows[0].double().square().sum(0).float().numpy()
        np.testing.assert_allclose(found.sums[name][0], wanted, rtol=1e-3)
        assert found.counts[name].tolist() == [CHUNK]
    monkeypatch.setattr(LlamaModel, "tokenize", lambda *_: [5] * (CHUNK - 1))
    with pytest.raises(PromptError, match=r"prompts\.text: 511 tokens"):
        collect_importance(full.path, ["words"], "words", 1)
