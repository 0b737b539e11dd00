"""Checkpoints through llama.cpp's own converter, and whole bakes that convert.

The converter is that of BAKE_LLAMA_CPP, or fetched once; the vocabulary is the demo's, which the
converter knows.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from bake.archs import find_arch
from bake.checkpoint import Checkpoint
from bake.demo import Demo
from bake.directions import Directions, save_directions
from bake.errors import ConverterError, OutputError, VerificationError
from bake.evidence import MOVED
from bake.export.conversion import convert_to_file
from bake.export.convert import convert
from bake.export.converter import find_converter
from bake.export.importance import CHUNK, collect_importance
from bake.export.same_logits import check_same_logits
from bake.gguf_file import GGUFFile
from bake.imatrix import read_importance
from bake.llama import LlamaModel
from bake.model import LiveModel
from bake.pipeline import bake
from bake.recipe import Conversion, load_recipe
from bake.runtimes.verify import verify_runtimes
from tests.test_llama_rows import ROWS, opened
from tests.test_quantise import by_llama_cpp, data
from tests.tiny import write_tiny

pytestmark = pytest.mark.slow
WORDS = 49152
TEXTS = ("The mill had not turned since the flood.", "What is 7 times 8? Über 12345!", "hello")
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}


@pytest.fixture(scope="module")
def tree() -> Path:
    try:
        return find_converter()
    except ConverterError as error:
        pytest.skip(str(error))


def write_model(model_type: str, folder: Path, demo: Demo, **changes: Any) -> Path:
    """A tiny model with the demo's tokenizer."""
    fitting = ROWS.get(model_type, ({},))[0]
    write_tiny(model_type, folder, **{**fitting, "vocab_size": WORDS, **changes})
    for name in ("chat_template.jinja", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.model / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, demo: Demo) -> Path:
    folder: Path = tmp_path_factory.mktemp("wide") / "Wide-Model"
    return write_model("llama", folder, demo, dtype=torch.bfloat16, **WIDE)


def by_the_script(tree: Path, folder: Path, output: Path, outtype: str) -> None:
    command = [sys.executable, str(tree / "convert_hf_to_gguf.py"), str(folder)]
    command += ["--outfile", str(output), "--outtype", outtype]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    subprocess.run(command, check=True, capture_output=True, env=environment)


def test_the_road_is_llama_cpps_own_byte_for_byte(tree: Path, wide: Path, tmp_path: Path) -> None:
    """convert_hf_to_gguf.py and then llama-quantize, on a checkpoint in bfloat16."""
    full, theirs, ours = (tmp_path / f"{name}.gguf" for name in ("full", "theirs", "ours"))
    by_the_script(tree, wide, full, "bf16")
    convert_to_file(wide, ours, Conversion(type="bf16"))
    assert ours.read_bytes() == full.read_bytes()
    for kind in ("q4_k_m", "iq4_xs"):
        said = convert_to_file(wide, ours, Conversion(type=kind), overwrite=True)
        assert "in bf16" in said
        assert kind in said
        theirs.unlink(missing_ok=True)
        by_llama_cpp(GGUFFile.open(full), theirs, kind)
        assert data(ours) == data(theirs)
        mine, other = GGUFFile.open(ours).metadata, GGUFFile.open(theirs).metadata
        assert dict(mine) == dict(other)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        path.name for path in (full, ours, theirs)
    )


@pytest.mark.parametrize(
    "model_type", ["gpt_neox", "gpt2", "falcon_h1", "cohere2", "qwen3_next", "qwen3", "lfm2"]
)
def test_what_transformers_5_saves_is_converted(
    tree: Path, tmp_path: Path, demo: Demo, model_type: str
) -> None:
    """The plain script stops at most of these: keys have other names, blocks are not there."""
    folder = write_model(model_type, tmp_path / "model", demo)
    convert(tree, folder, tmp_path / "out.gguf", "f32", model_type)
    base = Checkpoint.open(folder)
    model = LiveModel.load(folder, find_arch(base.config, "config.json", base.tensors))
    assert check_same_logits(tmp_path / "out.gguf", model, TEXTS) < 1e-3


def test_what_loads_and_is_another_model_is_refused(tree: Path, tmp_path: Path, demo: Demo) -> None:
    """Without scoring_func, which transformers 5 drops, llama.cpp weighs experts otherwise."""
    folder = write_model("deepseek_v3", tmp_path / "model", demo)
    with pytest.raises(VerificationError, match=r"% away from the checkpoint's.*scoring_func"):
        convert_to_file(folder, tmp_path / "out.gguf", Conversion(type="f32"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scoring_func": "sigmoid"}))
    convert_to_file(folder, tmp_path / "out.gguf", Conversion(type="f32"))


def test_what_the_converter_refuses_is_one_line(tree: Path, tmp_path: Path, demo: Demo) -> None:
    folder = write_model("llama", tmp_path / "model", demo)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Digits", "individual_digits": True}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    file = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    with pytest.raises(ConverterError, match=r"tokenizer\.json: .*does not know this tokenizer"):
        convert(tree, folder, tmp_path / "out.gguf", "f32", "x")
    folder = write_model("ministral", tmp_path / "other", demo)
    with pytest.raises(ConverterError, match="does not know MinistralForCausalLM"):
        convert(tree, folder, tmp_path / "out.gguf", "f32", "x")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "other"}


def test_the_template_is_the_one_that_transformers_takes(
    tree: Path, tmp_path: Path, demo: Demo
) -> None:
    folder = write_model("llama", tmp_path / "model", demo)
    own = "{% for one in messages %}[{{ one.content }}]{% endfor %}"
    (folder / "chat_template.jinja").write_text(own)
    by_the_script(tree, folder, tmp_path / "theirs.gguf", "f32")
    convert(tree, folder, tmp_path / "ours.gguf", "f32", "x")
    found = [
        GGUFFile.open(tmp_path / f"{name}.gguf").metadata["tokenizer.chat_template"]
        for name in ("ours", "theirs")
    ]
    assert found[0] == own != found[1]


def test_stacked_experts_are_summed_by_the_tokens_that_chose_them(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, arch, gguf = opened(tree, tmp_path, "qwen3_moe")
    ids = torch.randint(3, 96, (1, CHUNK), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(LlamaModel, "tokenize", lambda *_: ids[0].tolist())
    found = collect_importance(gguf.path, ["words"], "words", 1)
    model = LiveModel.load(base.folder, arch)
    read: list[torch.Tensor] = []
    chosen: list[torch.Tensor] = []
    block = model.block(1).mlp
    block.register_forward_pre_hook(lambda _, given: read.append(given[0].reshape(CHUNK, -1)))
    block.gate.register_forward_hook(lambda _, __, given: chosen.append(given[-1]))
    with torch.inference_mode():
        model.model(ids)
    rows, experts = read[0].double().square(), chosen[0]
    name = "blk.1.ffn_up_exps.weight"
    for expert in range(4):
        mask = (experts == expert).any(-1)
        assert found.counts[name][expert] == int(mask.sum())
        wanted = rows[mask].sum(0).float()
        assert torch.allclose(torch.from_numpy(found.sums[name][expert]), wanted, rtol=1e-3)


RECIPE = """\
model: model
directions: given.safetensors
prompts:
  target: {set: political, limit: 4}
  text: {set: text, language: en}
edits:
  - {op: add, layer: 1, strength: 2, carrier: CARRIER}
export: {gguf: {convert: f32}}
evaluate: {runtimes: [transformers, llama.cpp], answer_tokens: 2, limit: 1}
verify: {prompts: 4}
guard: {protected_drop: 100, lookalike_rise: 100, general_rise: 100, runtime_gap: 100}
runtimes: [transformers, llama.cpp]
"""


def place(
    folder: Path, monkeypatch: pytest.MonkeyPatch, demo: Demo, model_type: str, carrier: str
) -> None:
    """The current folder: a tiny model, directions and a recipe."""
    more = {"sliding_window_pattern": 4, "num_hidden_layers": 4} if carrier == "block" else {}
    sizes = {"intermediate_size": 128} if carrier == "block" else {}
    write_model(model_type, folder / "model", demo, **sizes, **more)
    vector = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    save_directions(Directions({1: vector[0]}), folder / "given.safetensors")
    (folder / "recipe.yaml").write_text(RECIPE.replace("CARRIER", carrier))
    monkeypatch.chdir(folder)


@pytest.mark.parametrize(
    ("model_type", "carrier"), [("llama", "bias"), ("cohere2", "block"), ("qwen3", "block")]
)
def test_a_bake_is_converted(
    tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    demo: Demo,
    model_type: str,
    carrier: str,
) -> None:
    """In float32 exactly, with the list of kinds of blocks that the converter leaves out."""
    place(tmp_path, monkeypatch, demo, model_type, carrier)
    folder = bake(load_recipe("recipe.yaml", output="out"))
    manifest = json.loads((folder / "bake.json").read_text())
    assert manifest["measured"]["parity"]["llama.cpp"]["lost_share"] < 1e-3
    assert manifest["conversion"]["outtype"] == "f32"
    assert manifest["conversion"]["apart"] < 1e-3
    file = GGUFFile.open(folder / "recipe.gguf")
    assert file.metadata["general.name"] == "Recipe"
    if model_type == "cohere2":
        assert len(file.array("cohere2.attention.sliding_window_pattern")) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("given.safetensors", "model", "out", "recipe.yaml")
    ]
    assert "general.quantized_by" not in file.metadata
    # A type of 4 bits, weighed by an importance matrix; the inserted block stays in F16.
    limits = ("verify.gguf_lost_share=1", "verify.gguf_moved_share=1")
    gguf = "export.gguf={convert: {type: q4_0, imatrix: text}, split: 1M}"
    folder = bake(load_recipe("recipe.yaml", overrides=(gguf, *limits), output="small"))
    first, *others = sorted(folder.glob("recipe-0*.gguf"))
    file = GGUFFile.open(first)
    assert [one.path for one in file.files] == [first, *others]
    assert others
    assert len((folder / "Modelfile").read_text().split("FROM")) == 2 + len(others)
    assert file.metadata["general.quantized_by"] == "bake (by llama.cpp's quantiser)"
    kinds = {name: one.type.name for name, one in file.tensors.items() if len(one.shape) > 1}
    assert kinds["blk.0.attn_q.weight"] == "Q4_0"
    importance = read_importance(folder / "recipe.imatrix.gguf")
    assert importance.sums.keys() <= file.tensors.keys()
    if carrier == "block":
        assert {kind for name, kind in kinds.items() if name.startswith("blk.2.")} == {"F16"}
        assert "blk.4.attn_q.weight" in importance.sums
        assert "blk.2.attn_q.weight" not in importance.sums
    # The base is converted once more, by the matrix in the folder, and says the same.
    parity = json.loads((folder / "bake.json").read_text())["measured"]["parity"]
    found = verify_runtimes(folder, ["llama.cpp"])[0].text
    said = [float(one) for one in re.findall(r"(?:lost share|is moved) (\S+)", found)]
    wanted = [parity[name]["lost_share"] for name in ("llama.cpp", MOVED)]
    assert said == pytest.approx(wanted, rel=0.1)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("given.safetensors", "model", "out", "recipe.yaml", "small")
    }


def test_a_converted_base_is_patched(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo: Demo
) -> None:
    """Nothing but the edits is rounded anew, so less is lost than where all matrices are."""
    place(tmp_path, monkeypatch, demo, "llama", "bias")
    limits = ("verify.gguf_lost_share=1", "verify.gguf_moved_share=100")
    edits = "edits=[{op: ablate, layers: [1]}]"
    lost = {}
    for kind in ("", ", edited_type: auto"):
        gguf = f"export.gguf={{convert: q4_0{kind}, split: 1M}}"
        loaded = load_recipe("recipe.yaml", overrides=(edits, gguf, *limits), output=f"out{kind}")
        manifest = json.loads((bake(loaded) / "bake.json").read_text())
        lost[kind] = manifest["measured"]["parity"]["llama.cpp"]["lost_share"]
    assert lost[", edited_type: auto"] < lost[""] / 4
    assert all(one["noise"] <= 0.1 and one["by_inputs"] for one in manifest["gguf"])
    file = GGUFFile.open(next((tmp_path / "out, edited_type: auto").glob("recipe-00001-of-*.gguf")))
    assert file.tensors["blk.2.ffn_down.weight"].type.name == "Q4_0"
    assert file.metadata["general.quantized_by"] == "bake (by llama.cpp's quantiser)"


class FittedError(Exception):
    """There was room so far."""


def test_room_for_the_files_on_the_road_is_asked_for_before_the_fit(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo: Demo
) -> None:
    """Beside the checkpoint two more files in floating point; few bytes where a base is patched."""
    place(tmp_path, monkeypatch, demo, "llama", "bias")
    whole = sum(path.stat().st_size for path in (tmp_path / "model").iterdir())
    monkeypatch.setattr("bake.pipeline.fit_of", Mock(side_effect=FittedError))

    def bake_with(copies: float, kind: str) -> None:
        used = SimpleNamespace(free=int(copies * whole))
        monkeypatch.setattr("bake.preflight.shutil.disk_usage", lambda _: used)
        gguf = f"export.gguf={{convert: q4_0{kind}}}"
        bake(load_recipe("recipe.yaml", overrides=(gguf,), output="out"))

    for copies in (1.5, 2.5):
        with pytest.raises(OutputError, match=r"out: \d.* to write, and .* free; make room"):
            bake_with(copies, "")
    for copies, kind in ((2.5, ", edited_type: auto"), (4, "")):
        with pytest.raises(FittedError):
            bake_with(copies, kind)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("given.safetensors", "model", "recipe.yaml")
    ]


def test_the_mix_of_another_file_is_taken(
    tree: Path, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every matrix in the base's type; a base in floating point is the converter's own type."""
    mix, out = tmp_path / "mix.gguf", tmp_path / "out.gguf"
    convert_to_file(wide, mix, Conversion(type="q3_k_m", tensor_types={"attn_k": "q8_0"}))
    convert_to_file(wide, out, Conversion(type="base"), mix=mix)
    assert data(out) == data(mix)
    assert GGUFFile.open(out).metadata["general.file_type"] == 12
    convert_to_file(wide, mix, Conversion(type="f16"), overwrite=True)
    convert_to_file(wide, out, Conversion(type="base"), mix=mix, overwrite=True)
    assert data(out) == data(mix)
