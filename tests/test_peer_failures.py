"""No peer's silent failure is bake's: one test a failure.

Each test makes the edit as the peer does, writes it, loads it with stock classes, and shows
that the behavioural check finds it wrong; bake's edit passes the same check, or is refused
by name. The peers' code was read at the commits named; none of it is copied.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bake.archs import find_arch
from bake.checkpoint import Checkpoint
from bake.errors import ArchitectureError, CheckpointError
from bake.hooks import steered
from bake.model import LiveModel
from bake.ops.ablate import orthonormal
from bake.plan import make_plan
from bake.recipe import Recipe
from bake.stream import write_config
from tests.through_disk import (
    BATCH,
    baked,
    drawn,
    effect_lost,
    everywhere,
    interventions,
    left_in_stream,
    lost_through_disk,
    measured,
    recipe_of,
    with_exact_constants,
)
from tests.tiny import write_tiny

# What an edit that misses a writer leaves of the direction, and what rounding does.
MISSED, ROUNDING = 1e-2, 1e-6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "base"


def rewritten(folder: Path, output: Path, changed: Mapping[str, Tensor]) -> Path:
    """The checkpoint with some tensors in place of its own, or beside them."""
    shutil.copytree(folder, output)
    file = output / "model.safetensors"
    tensors = load_file(file) | {name: one.contiguous() for name, one in changed.items()}
    save_file(tensors, file, {"format": "pt"})
    return output


def everywhere_recipe(folder: Path) -> tuple[Recipe, Tensor]:
    """An ablation of every writer, and the direction r [d] that it takes out."""
    base = Checkpoint.open(folder)
    layers = find_arch(base.config, "config.json").layer_count(base.config)
    direction = measured(base).directions[layers // 2]
    return recipe_of(everywhere(layers)), orthonormal(direction[None])[:, 0]


def left(folder: Path, direction: Tensor) -> float:
    """max |r·h| / |h| over all layers and positions of a checkpoint."""
    base = Checkpoint.open(folder)
    arch = find_arch(base.config, "config.json")
    model = LiveModel.load(folder, arch)
    return left_in_stream(model, direction[:, None], arch.layer_count(base.config))


def bakes_clean(folder: Path, output: Path) -> bool:
    """Whether bake's ablation of every writer leaves nothing but rounding of the direction."""
    base = Checkpoint.open(folder)
    recipe, direction = everywhere_recipe(folder)
    baked(base, find_arch(base.config, "config.json"), recipe, output)
    return left(output, direction) < ROUNDING


def without_rows(weight: Tensor, direction: Tensor) -> Tensor:
    """(I - r rᵀ) W: the written side of a matrix [d_out, d_in]."""
    return weight - torch.outer(direction, direction @ weight)


def without_columns(weight: Tensor, direction: Tensor) -> Tensor:
    """W (I - r rᵀ): the written side of embeddings, biases and Conv1D."""
    return weight - (weight @ direction)[..., None] * direction


def writers(folder: Path) -> dict[str, Tensor]:
    """The weights of o_proj and down_proj, and the embedding, by name."""
    tensors = load_file(folder / "model.safetensors")
    ends = ("o_proj.weight", "down_proj.weight", "embed_tokens.weight")
    return {name: one for name, one in tensors.items() if name.endswith(ends)}


def ablated_naively(folder: Path) -> dict[str, Tensor]:
    """What most peers write: W - r rᵀ W in o_proj and down_proj, and the embedding's rows."""
    direction = everywhere_recipe(folder)[1]
    return {
        name: (without_columns if "embed" in name else without_rows)(one, direction)
        for name, one in writers(folder).items()
    }


def test_fused_experts_are_ablated(folder: Path, tmp_path: Path) -> None:
    """heretic looks for nn.Linear experts in memory and skips a fused block without a word.

    p-e-w/heretic @ 20b7bf7, src/heretic/model.py, `get_layer_modules`, every probe inside
    `with suppress(Exception)`; issue 339, "MLP experts not abliterated".
    """
    write_tiny("qwen3_moe", folder)
    _, direction = everywhere_recipe(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    changed = {
        f"{name}.weight": without_rows(module.weight.data, direction)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(("o_proj", "down_proj"))
    }
    embedding = model.get_input_embeddings().weight.data
    changed["model.embed_tokens.weight"] = without_columns(embedding, direction)
    assert not any("expert" in name for name in changed)
    assert left(rewritten(folder, tmp_path / "naive", changed), direction) > MISSED
    assert bakes_clean(folder, tmp_path / "baked")


def test_the_written_side_of_a_square_matrix_is_ablated(folder: Path, tmp_path: Path) -> None:
    """Where the shape does not tell the sides apart, W - (W r) rᵀ takes r out of the input.

    jwest33/abliterator @ 6ca3356, src/abliterate.py, and OBLITERATUS @ 8ca69a1,
    `_project_out_advanced`, choose the axis by its length; jim-plus/llm-abliteration @
    15a3599, sharded_ablate.py, `modify_tensor_norm_preserved`, takes rows for inputs.
    """
    write_tiny("llama", folder)
    _, direction = everywhere_recipe(folder)
    assert all(one.shape == (32, 32) for name, one in writers(folder).items() if "proj" in name)
    changed = {name: without_columns(one, direction) for name, one in writers(folder).items()}
    assert left(rewritten(folder, tmp_path / "naive", changed), direction) > MISSED
    assert bakes_clean(folder, tmp_path / "baked")


def test_what_a_post_norm_writes_is_ablated(folder: Path, tmp_path: Path) -> None:
    """Gemma 2 scales every channel behind its writers, which turns r back in.

    andyrdt/refusal_direction @ 18f40bc, pipeline/model_utils/gemma2_model.py,
    `orthogonalize_gemma_weights`, takes r out of the writers; issue 4 of that repository
    has a KL above 10.
    """
    write_tiny("gemma2", folder)
    _, direction = everywhere_recipe(folder)
    naive = rewritten(folder, tmp_path / "naive", ablated_naively(folder))
    assert left(naive, direction) > MISSED
    assert bakes_clean(folder, tmp_path / "baked")


def test_existing_biases_are_ablated(folder: Path, tmp_path: Path) -> None:
    """A writer's bias writes to the stream too.

    andyrdt/refusal_direction @ 0b9c8bc, pipeline/utils/utils.py, `get_orthogonalized_matrix`,
    is called on weights alone; heretic @ 20b7bf7 and llm-abliteration @ 43def13 likewise.
    """
    write_tiny("llama", folder, attention_bias=True, mlp_bias=True)
    _, direction = everywhere_recipe(folder)
    naive = rewritten(folder, tmp_path / "naive", ablated_naively(folder))
    assert left(naive, direction) > MISSED
    assert bakes_clean(folder, tmp_path / "baked")


def test_a_bias_is_added_to_and_not_replaced(folder: Path, tmp_path: Path) -> None:
    """andyrdt/refusal_direction @ 0b9c8bc, gemma_model.py, `act_add_gemma_weights`.

    It sets the bias of down_proj to the vector; issue 10 of science-of-finetuning's
    diffing-toolkit, "Replacing bias could add bugs".
    """
    write_tiny("starcoder2", folder)
    base = Checkpoint.open(folder)
    arch = find_arch(base.config, "config.json")
    recipe = recipe_of({"op": "add", "layer": 1, "strength": 1.0, "carrier": "bias"})
    vector = measured(base).directions[1]
    name = "model.layers.1.mlp.c_proj.bias"
    model = LiveModel.load(folder, arch)
    before = model.logits(BATCH)
    with steered(model, interventions(base, arch, recipe)):
        hooked = model.logits(BATCH)
    naive = LiveModel.load(rewritten(folder, tmp_path / "naive", {name: vector}), arch)
    assert effect_lost(before, hooked, naive.logits(BATCH)) > MISSED
    assert lost_through_disk(folder, recipe, tmp_path / "baked")[0] < 1e-4


def test_a_tied_embedding_is_refused_and_left_alone(folder: Path, tmp_path: Path) -> None:
    """Rows of a tied embedding are the unembedding's too, so the output loses r as well.

    andyrdt/refusal_direction @ 0b9c8bc, pipeline/model_utils/gemma_model.py,
    `orthogonalize_gemma_weights`, edits embed_tokens of Gemma, whose embedding is tied.
    """
    write_tiny("llama", folder, tie_word_embeddings=True)
    base = Checkpoint.open(folder)
    arch = find_arch(base.config, "config.json")
    recipe, _ = everywhere_recipe(folder)
    with pytest.raises(ArchitectureError, match=r"edits\.0\.embeddings: .*tied"):
        make_plan(recipe, base, arch)

    # What the hooks do, embedding included: the unembedding is whole.
    untied = tmp_path / "untied"
    shutil.copytree(folder, untied)
    write_config(folder / "config.json", {"tie_word_embeddings": False}, untied / "config.json")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, untied / "model.safetensors", {"format": "pt"})
    model = LiveModel.load(untied, arch)
    before = model.logits(BATCH)
    with steered(model, interventions(Checkpoint.open(untied), arch, recipe)):
        hooked = model.logits(BATCH)
    naive = rewritten(folder, tmp_path / "naive", ablated_naively(folder))
    assert effect_lost(before, hooked, LiveModel.load(naive, arch).logits(BATCH)) > MISSED

    blocks_only = recipe_of({"op": "ablate", "layers": [0, 1, 2]})
    assert lost_through_disk(folder, blocks_only, tmp_path / "baked")[0] < 1e-4
    written = Checkpoint.open(tmp_path / "baked").read("model.embed_tokens.weight")
    assert torch.equal(written, tensors["model.embed_tokens.weight"])


def test_the_written_axis_of_a_conv1d_is_ablated(folder: Path, tmp_path: Path) -> None:
    """GPT-2 stores [d_in, d_out], so W - r rᵀ W takes r out of what the matrix reads.

    The form of p-e-w/heretic @ 00aa0b7, src/heretic/model.py, `abliterate`, `matrix.sub_(weight
    * (projector @ matrix))`, and of every peer that knows nn.Linear alone.
    """
    write_tiny("gpt2", folder)
    _, direction = everywhere_recipe(folder)
    changed = {}
    for name, one in load_file(folder / "model.safetensors").items():
        if name.endswith(("wte.weight", "wpe.weight", "c_proj.bias")):
            changed[name] = without_columns(one, direction)
        elif name.endswith("c_proj.weight"):
            changed[name] = without_rows(one, direction)
    assert left(rewritten(folder, tmp_path / "naive", changed), direction) > MISSED
    assert bakes_clean(folder, tmp_path / "baked")


def test_tensors_of_multi_token_prediction_are_kept(folder: Path, tmp_path: Path) -> None:
    """Stock classes ignore `mtp.*`, so loading and saving again drops them.

    transformers 5.23, models/qwen3_5/modeling_qwen3_5.py,
    `_keys_to_ignore_on_load_unexpected`; downstream llama.cpp issues 21172 and 24502.
    Every peer that ends in `save_pretrained`, as heretic, abliterix and ElSnacko's do.
    """
    write_tiny("qwen3_5_text", folder)
    extra = {"mtp.fc.weight": drawn(1, 4, 4), "mtp.layers.0.mlp.down_proj.weight": drawn(2, 4, 4)}
    rewritten(folder, tmp_path / "full", extra)
    AutoModelForCausalLM.from_pretrained(tmp_path / "full").save_pretrained(tmp_path / "naive")
    assert not set(extra) & set(load_file(tmp_path / "naive" / "model.safetensors"))

    recipe = recipe_of({"op": "ablate", "layers": [0, 1, 2, 3]})
    assert lost_through_disk(tmp_path / "full", recipe, tmp_path / "baked")[0] < 1e-4
    written = Checkpoint.open(tmp_path / "baked")
    for name, one in extra.items():
        assert torch.equal(written.read(name), one)


def test_a_bias_that_the_class_drops_is_never_written(folder: Path, tmp_path: Path) -> None:
    """Qwen 2 has no slot for down_proj.bias: it loads, and nothing is steered.

    ElSnacko/llm-steering @ 59f30cd, src/activation_steering/merge_steering_into_weights.py,
    `merge_steering_into_model`, adds the vector to `layer.mlp.down_proj.bias` of any class.
    """
    write_tiny("qwen2", folder)
    base = Checkpoint.open(folder)
    arch = find_arch(base.config, "config.json")
    name = "model.layers.1.mlp.down_proj.bias"
    naive = rewritten(folder, tmp_path / "naive", {name: measured(base).directions[1]})
    write_config(folder / "config.json", {"mlp_bias": True}, naive / "config.json")
    stock, report = AutoModelForCausalLM.from_pretrained(naive, output_loading_info=True)
    assert set(report["unexpected_keys"]) == {name}
    before = LiveModel.load(folder, arch).logits(BATCH)
    with torch.inference_mode():
        assert torch.equal(stock(BATCH.ids).logits, before)
    with pytest.raises(CheckpointError, match="unexpected keys"):
        LiveModel.load(naive, arch)

    spec = {"op": "add", "layer": 1, "strength": 1.0}
    with pytest.raises(ArchitectureError, match=r"mlp\.down_proj has no bias slot"):
        make_plan(recipe_of(spec | {"carrier": "bias"}), base, arch)
    recipe = recipe_of(spec | {"carrier": "ridge"})
    built = with_exact_constants(folder, interventions(base, arch, recipe))
    assert lost_through_disk(folder, recipe, tmp_path / "baked", built)[0] < 1e-3
