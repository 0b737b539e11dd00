"""Rows of the table in llama.cpp: a GGUF patched by bake against the hooked model.

The base GGUF is written by llama.cpp's own converter, which lies in the source distribution
of llama-cpp-python, so names, axes, row orders and multipliers are not bake's own idea of
them. BAKE_LLAMA_CPP may name a llama.cpp tree; otherwise the distribution is fetched once.
"""

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from torch.nn.functional import gelu
from transformers.activations import GELUTanh, NewGELUActivation

from bake.arch import Arch
from bake.archs import find_arch
from bake.checkpoint import Checkpoint
from bake.edits import AddVector, CreatedTensor
from bake.errors import GGUFError
from bake.export.gguf import patch
from bake.export.layout import patch_gguf
from bake.export.same_model import check_same_model
from bake.gguf_file import GGUFFile
from bake.hooks import edits_by_tensor, steered
from bake.llama import LlamaModel
from bake.model import LiveModel
from bake.plan import check_gguf, make_plan
from tests.test_block import WIDE
from tests.through_disk import BATCH, interventions, recipe_of
from tests.tiny import write_tiny
from tests.tiny_gguf import check_control_vector

pytestmark = pytest.mark.slow
ADD = {"op": "add", "layer": 1, "strength": 2.0, "carrier": "bias"}
ABLATE = {"op": "ablate", "layers": [0, 1]}
START = {"op": "add", "layer": 0, "site": "in", "strength": 2.0}


def gate(*sites: str, strength: float = 2.0) -> dict[str, object]:
    return {"op": "gate", "layers": [2], "sites": list(sites), "strength": strength}


BOTH = gate("attention", "mlp")
ONE = gate("attention")
# In front of a post-norm what is added is shorter than what the norm writes.
SHORT = gate("attention", "mlp", strength=0.5)
BLOCK = {"op": "add", "layer": 1, "strength": 2.0, "carrier": "block"}
FIRST = BLOCK | {"layer": 0}
# llama.cpp holds no head of its own for these, or its converter leaves it out.
TIED = {"tie_word_embeddings": True}
SECTIONS = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "mrope_section": [1, 1, 0],
}
# What converters read of a config.json of the Hub, and transformers 5 does not write.
LOST = {
    "falcon_h1": {"head_dim": 8},
    "cohere2": {"rotary_pct": 1.0},
    "gpt2": {"n_ctx": 64},
    "deepseek_v3": {"scoring_func": "sigmoid"},
}
# By row: what the tiny model must be for llama.cpp to hold it, and the edits.
ROWS: Mapping[str, tuple[Mapping[str, Any], Sequence[Mapping[str, object]]]] = {
    "llama": ({}, (ADD, ABLATE, BOTH, START)),
    "mistral": ({}, (ABLATE, BOTH, START)),
    "ministral3": ({}, (ABLATE, BOTH)),
    "qwen2": ({}, (ABLATE, BOTH, START)),
    "qwen3": ({}, (ABLATE, BOTH, START)),
    "mixtral": ({}, (ABLATE, ONE)),
    "phi3": ({}, (ABLATE, BOTH, START)),
    "olmo2": ({}, (ABLATE, SHORT, START)),
    "glm4": ({}, (ABLATE, SHORT, START)),
    "granite": ({}, (ADD, ABLATE, BOTH, START)),
    "smollm3": ({}, (ABLATE, BOTH, START)),
    "stablelm": ({}, (ABLATE, BOTH, START)),
    "starcoder2": ({}, (ADD, ABLATE, BOTH, START)),
    "falcon_h1": (WIDE, (ADD, ABLATE, BOTH, START)),
    "lfm2": (WIDE, (ABLATE, BOTH, START, BLOCK, FIRST)),
    # The scale of the attention is that of the head's width, but in the 27B sizes.
    "gemma": (TIED, (ABLATE, BOTH, START)),
    "gemma2": (TIED | {"query_pre_attn_scalar": 8}, (ABLATE, SHORT)),
    "gemma3_text": (TIED | {"query_pre_attn_scalar": 8}, (ABLATE, SHORT, START)),
    "cohere": (TIED | {"logit_scale": 1.0}, (ABLATE, BOTH, START)),
    "cohere2": (
        TIED | {"logit_scale": 1.0, "num_hidden_layers": 4, "sliding_window": 4},
        (ABLATE, BOTH, START),
    ),
    # The converter says that the MLP is four times as wide as the stream.
    "gpt2": ({"n_inner": 128}, (ADD, ABLATE, BOTH, START)),
    # The weights of the chosen experts sum to 1 in llama.cpp, whatever the config says.
    "qwen3_moe": ({"norm_topk_prob": True}, (ABLATE, ONE, START)),
    # llama.cpp rounds the bounds of YaRN to whole dimensions, of which tiny heads have few.
    "gpt_oss": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        (ADD, ABLATE, ONE, START),
    ),
    # As for gpt2, and the converter knows no groups of heads.
    "phi": ({"intermediate_size": 128, "num_key_value_heads": 4}, (ADD, ABLATE, BOTH, START)),
    "olmo3": ({}, (ABLATE, SHORT, START)),
    "glm4_moe": (WIDE, (ABLATE, ONE, START, FIRST)),
    "granitemoe": ({}, (ADD | {"site": "mid"}, ABLATE, ONE, START)),
    # The sections of the rotary embedding have to fit into a tiny head.
    "qwen3_5_text": ({"rope_parameters": SECTIONS}, (ABLATE, BOTH, START)),
    "qwen3_5_moe_text": ({"rope_parameters": SECTIONS}, (ABLATE, ONE, START)),
    "qwen3_next": ({}, (ABLATE, ONE, START)),
    "qwen2_moe": ({}, (ABLATE, ONE, START)),
    "deepseek_v2": ({}, (ABLATE, ONE, START)),
    "deepseek_v3": ({}, (ABLATE, ONE, START)),
}
# A vector behind a block goes into a bias there.
BIASED = ("llama", "granite", "falcon_h1", "starcoder2", "gpt2", "phi", "gpt_oss")
CONVERT = """
import sys
from pathlib import Path
tree, folder, output, words, predicting = sys.argv[1:]
sys.path[:0] = [tree, str(Path(tree, "gguf-py"))]
import gguf, torch
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

def set_vocab(model):
    model._set_vocab_none()
    model.gguf_writer.add_vocab_size(int(words))

chosen = get_model_architecture(ModelBase.load_hparams(Path(folder), False), ModelType.TEXT)
converter = get_model_class(chosen)
converter.no_mtp = predicting == "False"
for one in [converter, *vars(converter).values()]:
    if isinstance(one, type):
        one.set_vocab = set_vocab
with torch.inference_mode():
    converter(Path(folder), gguf.LlamaFileType.ALL_F32, Path(output)).write()
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama.cpp tree with its converter."""
    chosen = os.environ.get("BAKE_LLAMA_CPP")
    if chosen:
        return Path(chosen)
    folder: Path = tmp_path_factory.mktemp("llama.cpp")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", ":all:", "--dest", str(folder), "llama-cpp-python==0.3.36"]
    fetched = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(folder.glob("*.tar.gz"))
    if not archives:
        pytest.skip(f"no source distribution of llama-cpp-python: {fetched.stderr.strip()[-200:]}")
    with tarfile.open(archives[0]) as archive:
        wanted = ("conversion/", "gguf-py/")
        inside = [one for one in archive.getmembers() if any(part in one.name for part in wanted)]
        archive.extractall(folder, inside, filter="data")
    return next(folder.glob("*/vendor/llama.cpp"))


def converted(tree: Path, folder: Path, output: Path, predicting: bool) -> GGUFFile:
    """The checkpoint as llama.cpp's converter writes it, in float32, with a bare vocabulary."""
    arguments = map(str, (tree, folder, output, 96, predicting))
    command = [sys.executable, "-c", CONVERT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return GGUFFile.open(output)


def logits(path: Path) -> torch.Tensor:
    with LlamaModel(path, context=16, threads=1) as model:
        return torch.from_numpy(np.stack([model.logits(ids) for ids in BATCH.ids.tolist()]))


class TableGELU(torch.nn.Module):
    """GELU as ggml looks it up in a table of float16 (src/ggml-cpu/vec.h, `ggml_vec_gelu_f32`)."""

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        found = gelu(given.half().float(), approximate="tanh").half().float()
        return torch.where(given.abs() < 10, found, given.clamp_min(0))


def with_gelu_of_ggml(model: LiveModel) -> LiveModel:
    """The same model with llama.cpp's GELU: what is compared is the edit and not the table."""
    for module in list(model.model.modules()):
        for name, child in module.named_children():
            if isinstance(child, (NewGELUActivation, GELUTanh)):
                setattr(module, name, TableGELU())
    return model


def centred(logits: torch.Tensor) -> torch.Tensor:
    return logits - logits.mean(-1, keepdim=True)


def opened(
    tree: Path, folder: Path, model_type: str, *, predicting: bool = False
) -> tuple[Checkpoint, Arch, GGUFFile]:
    """A tiny checkpoint and its GGUF by llama.cpp's converter."""
    write_tiny(model_type, folder / "base", **ROWS[model_type][0])
    file = folder / "base" / "config.json"
    config = json.loads(file.read_text()) | LOST.get(model_type, {})
    file.write_text(json.dumps(config))
    base = Checkpoint.open(folder / "base")
    arch = find_arch(base.config, "config.json", base.tensors)
    gguf = converted(tree, base.folder, folder / "base.gguf", predicting)
    assert gguf.architecture == arch.gguf_architecture
    check_same_model(gguf, base, arch)
    return base, arch, gguf


def check_edits(
    base: Checkpoint, arch: Arch, gguf: GGUFFile, edits: Sequence[Mapping[str, object]]
) -> None:
    """Patch the GGUF by each of some edits: its logits move as those of the hooked model do."""
    model = with_gelu_of_ggml(LiveModel.load(base.folder, arch))
    # An entry of the table may be the next one where the last digit of what it is asked differs.
    by_table = any(isinstance(one, TableGELU) for one in model.model.modules())
    before = model.logits(BATCH)
    there = logits(gguf.path)
    torch.testing.assert_close(there, before, atol=2e-2, rtol=2e-3)

    for number, spec in enumerate(edits):
        built = interventions(base, arch, recipe_of(spec))
        made = edits_by_tensor(built)
        output = gguf.path.with_name(f"{number}.gguf")
        plan = make_plan(recipe_of(spec), base, arch)
        check_gguf(plan, base, arch, gguf)
        patch_gguf(
            *(plan, arch, base.config, gguf, made, output), edited_type=GGMLQuantizationType.F32
        )
        with steered(model, built):
            hooked = model.logits(BATCH)
        # A vector on a tied embedding moves all logits of a position alike.
        moved, moved_there = (
            centred(after - base) for after, base in ((hooked, before), (logits(output), there))
        )
        lost = float((moved_there - moved).abs().max()) / float(moved.abs().max())
        assert lost < (1e-3 if by_table else 1e-4), (spec, lost)


@pytest.mark.parametrize("model_type", ROWS)
def test_a_patched_gguf_is_the_hooked_model(tree: Path, tmp_path: Path, model_type: str) -> None:
    check_edits(*opened(tree, tmp_path, model_type), ROWS[model_type][1])


def test_blocks_that_predict_further_tokens_are_left_alone(tree: Path, tmp_path: Path) -> None:
    """The last block of such a file is none of the checkpoint's; no block goes in before it."""
    base, arch, gguf = opened(tree, tmp_path, "glm4_moe", predicting=True)
    assert gguf.metadata["glm4moe.block_count"] == arch.layer_count(base.config) + 1
    check_edits(base, arch, gguf, (ABLATE, ONE, START))
    plan = make_plan(recipe_of(FIRST), base, arch)
    with pytest.raises(GGUFError, match="multi-token prediction; convert it with --no-mtp"):
        check_gguf(plan, base, arch, gguf)


@pytest.mark.parametrize("model_type", BIASED)
def test_a_bias_is_the_control_vector_in_every_type(
    tree: Path, tmp_path: Path, model_type: str
) -> None:
    """In a quantised file to the last bit: the rounding of activations swallows another order."""
    base, arch, gguf = opened(tree, tmp_path, model_type)
    check_control_vector(base, arch, gguf)


def test_llama_cpp_never_adds_the_attention_bias_of_falcon_h1(tree: Path, tmp_path: Path) -> None:
    """Its loader makes the tensor and its graph passes it over (src/models/falcon-h1.cpp)."""
    _, _, gguf = opened(tree, tmp_path, "falcon_h1")
    name, output = "blk.1.attn_output.bias", tmp_path / "out.gguf"
    created = CreatedTensor(name, (32,), "F32", "blk.1.attn_output.weight")
    edits = {name: [AddVector(name, torch.ones(32))]}
    patch(gguf, edits, output, edited_type="auto", created=[created])
    assert torch.equal(logits(output), logits(gguf.path))
    with LlamaModel(output, context=16, threads=1) as model:
        assert GGUFFile.open(output).tensors.keys() - model.tensors_read() == {name}
