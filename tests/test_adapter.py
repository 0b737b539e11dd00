"""Edits as a LoRA: PEFT's on the stock class, llama.cpp's on a GGUF, both against the hooks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import AutoModelForCausalLM

from bake.arch import Arch
from bake.archs import find_arch
from bake.checkpoint import Checkpoint
from bake.edits import AddVector, Edit, LowRank, RemoveKeepingNorms, RemoveSubspace, apply_all
from bake.errors import ArchitectureError, GGUFError
from bake.export.adapter import check_adapter, low_rank, write_gguf_lora, write_peft
from bake.export.gguf import patch
from bake.export.layout import gguf_edits
from bake.gguf_file import GGUFFile
from bake.hooks import Intervention, steered
from bake.llama import LlamaModel
from bake.model import LiveModel
from bake.plan import make_plan
from tests.through_disk import BATCH, effect_lost, interventions, recipe_of
from tests.tiny import write_tiny
from tests.tiny_gguf import write_tiny_gguf

GATE = {"op": "gate", "layers": [1], "sites": ["attention", "mlp"], "strength": 1.0}
ABLATE = {"op": "ablate", "layers": [0, 1]}
ROWS = ("llama", "gemma2", "gpt2", "qwen3")


def opened(folder: Path) -> tuple[Checkpoint, Arch]:
    base = Checkpoint.open(folder)
    return base, find_arch(base.config, "config.json", base.tensors)


def edits_of(built: list[Intervention]) -> dict[str, list[Edit]]:
    found: dict[str, list[Edit]] = {}
    for one in built:
        for edit in one.edits():
            found.setdefault(edit.tensor, []).append(edit)
    return found


def test_edits_compose_to_one_low_rank_write() -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weight = drawn(12, 20)
    rows, columns = (torch.linalg.qr(drawn(size, 2)).Q for size in (12, 20))
    edits: list[Edit] = [
        LowRank("a", drawn(12, 3), drawn(3, 20)),
        RemoveSubspace("a", rows, 0.7),
        RemoveSubspace("a", columns, 1.2, axis=-1),
    ]
    one = low_rank(edits, weight)
    assert one.left.shape == (12, 7)
    torch.testing.assert_close(one.apply(weight), apply_all(edits, weight))
    for wrong in (AddVector("a", drawn(20)), RemoveKeepingNorms("a", rows)):
        with pytest.raises(ArchitectureError, match=f"a: {type(wrong).__name__} is of full rank"):
            low_rank([*edits, wrong], weight)


# PEFT asks transformers 5 for what it will lose in 6.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(
    ("model_type", "spec"),
    [pytest.param(row, GATE, id=f"{row}-gate") for row in ROWS]
    # GPT-2's writers have biases, and an ablation takes from them too.
    + [pytest.param(row, ABLATE, id=f"{row}-ablate") for row in ROWS if row != "gpt2"],
)
def test_peft_loads_it_and_it_is_the_hooked_model(
    tmp_path: Path, model_type: str, spec: dict[str, object]
) -> None:
    peft = pytest.importorskip("peft")
    folder = tmp_path / "base"
    write_tiny(model_type, folder)
    base, arch = opened(folder)
    built = interventions(base, arch, recipe_of(spec))
    model = LiveModel.load(folder, arch)
    before = model.logits(BATCH)
    with steered(model, built):
        hooked = model.logits(BATCH)
    write_peft(edits_of(built), base, arch, str(folder), tmp_path / "adapter")
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(stock, tmp_path / "adapter").eval()
    with torch.inference_mode():
        after = loaded(input_ids=BATCH.ids, attention_mask=BATCH.mask).logits
    assert effect_lost(before, hooked, after) < 1e-4
    files = [
        tmp_path / "adapter" / f"adapter_{name}" for name in ("config.json", "model.safetensors")
    ]
    config = json.loads(files[0].read_text())
    assert config["r"] == config["lora_alpha"] == 1
    assert files[0].stat().st_mode == files[1].stat().st_mode  # whoever reads one reads the other


@pytest.mark.parametrize("spec", [GATE, ABLATE], ids=["gate", "ablate"])
def test_llama_cpp_lays_it_on_a_gguf(
    tiny_llama: Path, tmp_path: Path, spec: dict[str, object]
) -> None:
    base, arch = opened(tiny_llama)
    edits = edits_of(interventions(base, arch, recipe_of(spec)))
    write_tiny_gguf(base, arch, tmp_path / "base.gguf")
    gguf = GGUFFile.open(tmp_path / "base.gguf")
    write_gguf_lora(edits, gguf, arch, base.config, "lora", tmp_path / "lora.gguf")
    moved = gguf_edits(edits, arch, base.config)
    patch(gguf, moved, tmp_path / "patched.gguf", edited_type=GGMLQuantizationType.F32)
    found = []
    for path, lora in (("base", None), ("patched", None), ("base", tmp_path / "lora.gguf")):
        with LlamaModel(tmp_path / f"{path}.gguf", context=16, threads=1) as model:
            if lora:
                model.set_lora(lora)
            found.append(np.stack([model.logits(ids) for ids in BATCH.ids.tolist()]))
    before, wanted, after = found
    assert np.abs(after - wanted).max() < 1e-4 * np.abs(wanted - before).max()
    with (
        LlamaModel(tmp_path / "base.gguf", context=16, threads=1) as model,
        pytest.raises(GGUFError, match=r"base\.gguf: llama\.cpp cannot lay it on"),
    ):
        model.set_lora(tmp_path / "base.gguf")


REFUSED = {
    "bias": ("llama", {"op": "add", "layer": 1, "strength": 1.0, "carrier": "bias"}),
    "block": ("llama", {"op": "add", "layer": 1, "strength": 1.0, "carrier": "block"}),
    "embedding": ("llama", {"op": "ablate", "layers": [1], "embeddings": True}),
    "ablated bias": ("gpt2", ABLATE),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_lora_cannot_hold_is_refused_by_the_plan(tmp_path: Path, case: str) -> None:
    model_type, spec = REFUSED[case]
    # An inserted block needs neurons, two for every number of the stream.
    write_tiny(model_type, tmp_path / "base", intermediate_size=80)
    base, arch = opened(tmp_path / "base")
    plan = make_plan(recipe_of(spec), base, arch)
    with pytest.raises(ArchitectureError, match="a LoRA holds only writes to matrices"):
        check_adapter(plan, arch)
    check_adapter(make_plan(recipe_of(GATE), base, arch), arch)
