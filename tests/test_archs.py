"""The behavioural test of the architecture table: every row, every operator, through the disk."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bake.archs import ARCHS, REFUSED, find_arch
from bake.checkpoint import Checkpoint
from bake.edits import AddVector
from bake.errors import ArchitectureError, BakeError, CheckpointError, VerificationError
from bake.export.layout import gguf_edit
from bake.hooks import steered
from bake.model import LiveModel
from bake.ops.ablate import Ablate, cuts, orthonormal
from bake.plan import make_plan
from bake.stream import write_checkpoint
from bake.verify import check_files
from tests.through_disk import (
    BATCH,
    baked,
    drawn,
    effect_lost,
    everywhere,
    interventions,
    left_in_stream,
    measured,
    mutations,
    recipe_of,
)
from tests.tiny import TINY, write_tiny

SITES = ("attention", "mlp")


def test_the_table_and_the_tiny_models_are_the_same_rows() -> None:
    assert set(TINY) == set(ARCHS)


def test_ablated_everywhere_leaves_nothing_in_the_stream(tiny: Path, tmp_path: Path) -> None:
    base = Checkpoint.open(tiny)
    arch = find_arch(base.config, "config.json")
    layers = arch.layer_count(base.config)
    recipe = recipe_of(everywhere(layers))
    direction = orthonormal(measured(base).directions[layers // 2][None])
    model = LiveModel.load(tiny, arch)
    before = model.logits(BATCH)
    assert left_in_stream(model, direction, layers) > 1e-2
    with steered(model, interventions(base, arch, recipe)):
        hooked = model.logits(BATCH)
    after = baked(base, arch, recipe, tmp_path / "out")
    assert effect_lost(before, hooked, after.logits(BATCH)) < 1e-4
    assert left_in_stream(after, direction, layers) < 1e-6


def test_a_basis_of_three_directions_at_half_strength(tiny: Path, tmp_path: Path) -> None:
    base = Checkpoint.open(tiny)
    arch = find_arch(base.config, "config.json")
    names = [
        name
        for layer in (0, 1)
        for one in arch.written(base.tensors)[layer]
        for name in (one.weight, one.bias)
        if name
    ]
    basis = orthonormal(drawn(9, 3, 32))
    ablation = Ablate(cuts(basis, names, measured(base), arch, {0: 0.5, 1: 0.5}))
    made = {edit.tensor: [edit] for edit in ablation.edits()}
    output = tmp_path / "out"
    output.mkdir()
    write_checkpoint(base, made, (), {}, output)
    check_files(base, Checkpoint.open(output), made, set())
    model = LiveModel.load(tiny, arch)
    before = model.logits(BATCH)
    with steered(model, [ablation]):
        hooked = model.logits(BATCH)
    after = LiveModel.load(output, arch).logits(BATCH)
    assert effect_lost(before, hooked, after) < 1e-4


def test_a_row_with_a_wrong_field_fails(tiny: Path, tmp_path: Path) -> None:
    """With any field wrong, the direction stays in the stream or the bake is refused."""
    base = Checkpoint.open(tiny)
    arch = find_arch(base.config, "config.json")
    layers = arch.layer_count(base.config)
    direction = orthonormal(measured(base).directions[layers // 2][None])
    for number, wrong in enumerate(mutations(arch, base)):
        try:
            after = baked(base, wrong, recipe_of(everywhere(layers)), tmp_path / str(number))
        except (BakeError, RuntimeError):
            continue
        assert left_in_stream(after, direction, layers) > 1e-4, wrong


@pytest.mark.parametrize("site", SITES)
def test_a_gate_in_the_weights_is_the_hooked_gate(tiny: Path, tmp_path: Path, site: str) -> None:
    base = Checkpoint.open(tiny)
    arch = find_arch(base.config, "config.json")
    # In front of a post-norm what is added is shorter than what the norm writes.
    strength = 0.4 if any(branch.norm for branch in arch.branches) else 4.0
    recipe = recipe_of({"op": "gate", "layers": [1], "sites": [site], "strength": strength})
    written = [one for one in arch.written(base.tensors)[1] if one.branch.site == site]
    if any("expert" in one.weight for one in written) or (
        arch.model_type == "granitemoe" and site == "mlp"
    ):
        with pytest.raises(ArchitectureError, match=r"edits\.0\.sites: .*; use sites"):
            make_plan(recipe, base, arch)
        return
    model = LiveModel.load(tiny, arch)
    before = model.logits(BATCH)
    with steered(model, interventions(base, arch, recipe)):
        hooked = model.logits(BATCH)
    after = baked(base, arch, recipe, tmp_path / "out")
    assert effect_lost(before, hooked, after.logits(BATCH)) < 1e-4


# Where `add` has an exact bias, with what the stock class offers.
BIASED = {
    "out": {
        *("llama", "smollm3", "granite", "falcon_h1", "gpt_oss", "starcoder2", "gpt_neox"),
        *("gpt2", "phi", "cohere", "cohere2"),
    },
    "mid": {
        *("llama", "smollm3", "granite", "granitemoe", "falcon_h1", "gpt_oss", "starcoder2"),
        *("gpt2", "gemma", "qwen3", "qwen3_moe"),
    },
}


@pytest.mark.parametrize("site", ["out", "mid"])
def test_an_added_vector_is_an_exact_bias_or_refused(tiny: Path, tmp_path: Path, site: str) -> None:
    base = Checkpoint.open(tiny)
    arch = find_arch(base.config, "config.json")
    spec = {"op": "add", "layer": 1, "site": site, "strength": 2.0, "carrier": "bias"}
    recipe = recipe_of(spec)
    if arch.model_type not in BIASED[site]:
        with pytest.raises(ArchitectureError, match="the bias carrier cannot serve"):
            make_plan(recipe, base, arch)
        return
    model = LiveModel.load(tiny, arch)
    before = model.logits(BATCH)
    with steered(model, interventions(base, arch, recipe)):
        hooked = model.logits(BATCH)
    after = baked(base, arch, recipe, tmp_path / "out")
    assert effect_lost(before, hooked, after.logits(BATCH)) < 1e-4


def test_a_vector_on_the_embedding_steers_the_input_of_block_0(tiny: Path, tmp_path: Path) -> None:
    base = Checkpoint.open(tiny)
    arch = find_arch(base.config, "config.json")
    recipe = recipe_of({"op": "add", "layer": 0, "site": "in", "strength": 2.0})
    model = LiveModel.load(tiny, arch)
    before = model.logits(BATCH)
    with steered(model, interventions(base, arch, recipe)):
        hooked = model.logits(BATCH)
    after = baked(base, arch, recipe, tmp_path / "out")
    assert effect_lost(before, hooked, after.logits(BATCH)) < 1e-4


def test_auto_takes_the_most_exact_carrier_that_all_runtimes_serve(tmp_path: Path) -> None:
    def chosen(model_type: str, runtime: str, **spec: object) -> tuple[str, str]:
        folder = tmp_path / model_type
        if not folder.exists():
            write_tiny(model_type, folder)
        recipe = recipe_of({"op": "add", "layer": 1, "strength": 1.0} | spec, runtimes=[runtime])
        step = make_plan(recipe, Checkpoint.open(folder), ARCHS[model_type]).steps[0]
        return step.edits[0].carrier, step.notes[0]

    assert chosen("llama", "vllm") == ("bias", "edits.0: bias carrier (exact)")
    carrier, note = chosen("llama", "sglang")
    assert (carrier, "sglang would drop a bias of mlp.down_proj" in note) == ("ridge", True)
    assert chosen("qwen3", "transformers")[0] == "ridge"
    assert chosen("qwen3", "transformers", site="mid")[0] == "bias"
    assert chosen("llama", "sglang", layer=0, site="in")[0] == "embedding"
    assert chosen("gpt2", "mlx", site="in")[0] == "bias"
    carrier, note = chosen("gemma2", "transformers")
    assert (carrier, "verify.ridge_lost_share decides" in note) == ("ridge", True)
    with pytest.raises(ArchitectureError, match=r"the bias carrier .* the ridge carrier cannot"):
        chosen("mixtral", "transformers")
    with pytest.raises(ArchitectureError, match="the embedding carrier cannot serve site: out"):
        chosen("llama", "vllm", carrier="embedding")


def test_a_multiplier_that_a_row_forgets_is_found(tmp_path: Path) -> None:
    """Granite multiplies its branches, so the bias must hold more than the vector."""
    folder = tmp_path / "granite"
    write_tiny("granite", folder)
    base, arch = Checkpoint.open(folder), ARCHS["granite"]
    wrong = replace(arch, branches=tuple(replace(one, scale=()) for one in arch.branches))
    recipe = recipe_of({"op": "add", "layer": 1, "strength": 2.0})
    model = LiveModel.load(folder, arch)
    before = model.logits(BATCH)
    with steered(model, interventions(base, arch, recipe)):
        hooked = model.logits(BATCH)
    after = baked(base, wrong, recipe, tmp_path / "out")
    assert effect_lost(before, hooked, after.logits(BATCH)) > 1e-2


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (
            {"op": "ablate", "layers": [1]},
            {"op": "add", "layer": 1, "strength": 2.0, "carrier": "bias"},
        ),
        (
            {"op": "gate", "layers": [1], "sites": ["mlp"], "strength": 4.0},
            {"op": "ablate", "layers": [1]},
        ),
    ],
    ids=["ablate-add", "gate-ablate"],
)
def test_edits_of_one_tensor_compose_from_the_inside_out(
    tmp_path: Path, first: dict[str, object], second: dict[str, object]
) -> None:
    """GPT-2 has a bias for the vector already, so the ablation edits it too."""
    folder = tmp_path / "gpt2"
    write_tiny("gpt2", folder)
    base, arch = Checkpoint.open(folder), ARCHS["gpt2"]
    recipe = recipe_of(first, second)
    model = LiveModel.load(folder, arch)
    before = model.logits(BATCH)
    with steered(model, interventions(base, arch, recipe)):
        hooked = model.logits(BATCH)
    after = baked(base, arch, recipe, tmp_path / "out")
    assert effect_lost(before, hooked, after.logits(BATCH)) < 1e-4
    with pytest.raises(ArchitectureError, match=f"name the {first['op']} first"):
        make_plan(recipe_of(second, first), base, arch)


@pytest.mark.parametrize(
    ("add", "embeddings"),
    [
        ({"layer": 1, "site": "mid", "carrier": "bias"}, False),
        ({"layer": 0, "site": "in"}, True),
        ({"layer": 2, "site": "in", "carrier": "ridge"}, False),
    ],
    ids=["a bias that is new", "the embedding", "the input of the next block"],
)
def test_what_an_ablation_in_the_weights_would_cut_otherwise_comes_behind_it(
    tmp_path: Path, add: dict[str, object], embeddings: bool
) -> None:
    """An ablation's hook does not reach these additions, or its edits do not."""
    write_tiny("llama", tmp_path / "base")
    base, arch = Checkpoint.open(tmp_path / "base"), ARCHS["llama"]
    ablate = {"op": "ablate", "layers": [1], "embeddings": embeddings}
    added = {"op": "add", "strength": 2.0} | add
    with pytest.raises(ArchitectureError, match=r"edits\.1: .*; name the ablate first"):
        make_plan(recipe_of(added, ablate), base, arch)
    recipe = recipe_of(ablate, added)
    make_plan(recipe, base, arch)
    if add.get("carrier") == "ridge":
        return
    model = LiveModel.load(tmp_path / "base", arch)
    before = model.logits(BATCH)
    with steered(model, interventions(base, arch, recipe)):
        hooked = model.logits(BATCH)
    after = baked(base, arch, recipe, tmp_path / "out")
    assert effect_lost(before, hooked, after.logits(BATCH)) < 1e-4


def test_a_slot_that_the_class_does_not_have_fails(tmp_path: Path) -> None:
    """Qwen 2 hard-codes down_proj without a bias: a row that says otherwise is caught."""
    folder = tmp_path / "qwen2"
    write_tiny("qwen2", folder)
    wrong = replace(ARCHS["qwen2"], branches=ARCHS["llama"].branches)
    recipe = recipe_of({"op": "add", "layer": 1, "strength": 1.0, "carrier": "bias"})
    with pytest.raises(CheckpointError, match="unexpected keys"):
        baked(Checkpoint.open(folder), wrong, recipe, tmp_path / "out")


@pytest.mark.parametrize(
    ("model_type", "site", "runtime"),
    [("qwen3", "mid", "llama.cpp"), ("qwen3", "mid", "vllm"), ("llama", "out", "sglang")],
)
def test_a_bias_that_a_runtime_would_drop_is_refused(
    tmp_path: Path, model_type: str, site: str, runtime: str
) -> None:
    write_tiny(model_type, tmp_path)
    spec = {"op": "add", "layer": 1, "site": site, "strength": 1.0, "carrier": "bias"}
    base, arch = Checkpoint.open(tmp_path), ARCHS[model_type]
    make_plan(recipe_of(spec), base, arch)
    with pytest.raises(ArchitectureError, match=f"{runtime} would drop a bias"):
        make_plan(recipe_of(spec, runtimes=("transformers", runtime)), base, arch)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("falcon_h1", {"attention_bias": True, "mlp_bias": True, "projectors_bias": True}),
        ("deepseek_v2", {"attention_bias": True}),
        ("stablelm", {"use_parallel_residual": True}),
        ("gpt_neox", {"use_parallel_residual": False}),
    ],
)
def test_existing_biases_and_other_variants_of_a_row(
    tmp_path: Path, model_type: str, changes: dict[str, object]
) -> None:
    folder = tmp_path / "base"
    write_tiny(model_type, folder, **changes)
    base, arch = Checkpoint.open(folder), ARCHS[model_type]
    layers = arch.layer_count(base.config)
    after = baked(base, arch, recipe_of(everywhere(layers)), tmp_path / "out")
    direction = orthonormal(measured(base).directions[layers // 2][None])
    assert left_in_stream(after, direction, layers) < 1e-6


def test_a_bias_that_is_there_already_may_be_dropped_too(tmp_path: Path) -> None:
    """llama.cpp loads falcon-h1's attn_output.bias and never adds it (falcon-h1.cpp:91, 153)."""
    write_tiny("falcon_h1", tmp_path, attention_bias=True)
    base, arch = Checkpoint.open(tmp_path), ARCHS["falcon_h1"]
    spec = {"op": "add", "layer": 1, "site": "mid", "strength": 1.0, "carrier": "bias"}
    make_plan(recipe_of(spec, runtimes=("transformers", "mlx")), base, arch)
    with pytest.raises(
        ArchitectureError, match=r"llama\.cpp would drop a bias of self_attn\.o_proj"
    ):
        make_plan(recipe_of(spec, runtimes=("transformers", "llama.cpp")), base, arch)


def test_gpt2_without_its_prefix_is_the_same_model(tmp_path: Path) -> None:
    """The Hub's gpt2 stores `h.0.attn.c_attn.weight`, with the causal masks beside."""
    folder = tmp_path / "bare"
    write_tiny("gpt2", folder, tie_word_embeddings=True)
    file = folder / "model.safetensors"
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()
    }
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(3)}
    save_file(tensors | masks, file, {"format": "pt"})
    base = Checkpoint.open(folder)
    arch = find_arch(base.config, "config.json", base.tensors)
    assert arch.gguf_name("h.2.mlp.c_proj.bias") == "blk.2.ffn_down.bias"
    assert arch.gguf_name("wte.weight") == "token_embd.weight"
    recipe = recipe_of(
        {"op": "gate", "layers": [0, 1], "strength": 4.0},
        {"op": "ablate", "layers": [2]},
        {"op": "add", "layer": 1, "strength": 2.0},
        {"op": "add", "layer": 0, "site": "in", "strength": 2.0},
    )
    model = LiveModel.load(folder, arch)
    before = model.logits(BATCH)
    with steered(model, interventions(base, arch, recipe)):
        hooked = model.logits(BATCH)
    after = baked(base, arch, recipe, tmp_path / "out").logits(BATCH)
    # The embedding is the unembedding too: all logits of a position move alike.
    assert effect_lost(*(each.log_softmax(-1) for each in (before, hooked, after))) < 1e-4
    kept = [name for name in tensors if "c_attn" in name or "ln_" in name]
    written = Checkpoint.open(tmp_path / "out")
    assert all(torch.equal(written.read(name), tensors[name]) for name in kept)


def test_a_tied_embedding_is_not_ablated(tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    write_tiny("llama", folder, tie_word_embeddings=True)
    recipe = recipe_of({"op": "ablate", "layers": [0], "embeddings": True})
    with pytest.raises(ArchitectureError, match="tied"):
        make_plan(recipe, Checkpoint.open(folder), ARCHS["llama"])


def test_tensors_that_stock_classes_ignore_are_copied(tmp_path: Path) -> None:
    """The multi-token prediction heads of Qwen 3.5, and a 62nd layer as DeepSeek V3 has."""
    for model_type, extra in (
        ("qwen3_5_text", "mtp.layers.0.mlp.down_proj.weight"),
        ("qwen3_5_text", "mtp.fc.weight"),
        ("deepseek_v3", "model.layers.61.eh_proj.weight"),
    ):
        folder = tmp_path / f"{model_type}-{extra}"
        write_tiny(model_type, folder)
        file = folder / "model.safetensors"
        save_file(load_file(file) | {extra: drawn(1, 4, 4)}, file, {"format": "pt"})
        base, arch = Checkpoint.open(folder), ARCHS[model_type]
        recipe = recipe_of({"op": "ablate", "layers": [0, 1]})
        baked(base, arch, recipe, folder / "out")
        assert torch.equal(Checkpoint.open(folder / "out").read(extra), drawn(1, 4, 4))


def test_an_unknown_tensor_or_model_type_stops(tiny_llama: Path) -> None:
    base = Checkpoint.open(tiny_llama)
    for name in ("model.layers.0.mlp.second_down_proj.weight", "model.layers.0.mlp.extra"):
        with pytest.raises(ArchitectureError, match=name):
            ARCHS["llama"].check_tensors([*base.tensors, name], base.config)
    without = [name for name in base.tensors if name != "model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(ArchitectureError, match=r"model\.layers\.1: no tensor writes its mlp"):
        ARCHS["llama"].check_tensors(without, base.config)
    config = json.loads((tiny_llama / "config.json").read_text()) | {"model_type": "mamba9"}
    with pytest.raises(ArchitectureError, match="'mamba9' is not in bake's table"):
        find_arch(config, "config.json")
    for refused in REFUSED:
        with pytest.raises(ArchitectureError, match=refused):
            find_arch({"model_type": refused}, "config.json")


def test_gguf_knows_every_writer(tiny: Path) -> None:
    """gguf's own table of names has each row's writers, at the layer that they are in."""
    base = Checkpoint.open(tiny)
    arch = find_arch(base.config, "config.json")
    for layer, written in arch.written(base.tensors).items():
        for one in written:
            assert arch.gguf_name(one.weight).startswith(f"blk.{layer}.")
            assert arch.gguf_name(one.weight).endswith(".weight")
            if one.bias:
                bias = arch.gguf_name(one.bias)
                assert bias == arch.gguf_name(one.weight).removesuffix("weight") + "bias"
    assert arch.gguf_name(f"{arch.embeddings[0]}.weight") == "token_embd.weight"


def test_a_gguf_of_falcon_h1_has_its_multipliers_in_the_weights(tmp_path: Path) -> None:
    """llama.cpp's converter multiplies them in, so what is added there is the vector itself."""
    write_tiny("falcon_h1", tmp_path)
    base, arch = Checkpoint.open(tmp_path), ARCHS["falcon_h1"]
    for spec in (
        {"op": "add", "layer": 0, "site": "in", "strength": 1.0},
        {"op": "add", "layer": 1, "site": "out", "strength": 1.0},
    ):
        (one,) = interventions(base, arch, recipe_of(spec))
        (edit,) = one.edits()
        moved = gguf_edit(edit, arch, base.config)
        assert isinstance(edit, AddVector)
        assert isinstance(moved, AddVector)
        vector = measured(base).directions[int(str(spec["layer"]))]
        torch.testing.assert_close(moved.vector, vector)
        assert not torch.allclose(edit.vector, vector, rtol=0.1)


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"])
def test_a_gate_follows_the_columns_of_linear_attention_into_the_gguf(
    tmp_path: Path, model_type: str
) -> None:
    """llama.cpp's converter puts the first value head of every key head first, but in Next."""
    write_tiny(model_type, tmp_path)
    base, arch = Checkpoint.open(tmp_path), ARCHS[model_type]
    recipe = recipe_of({"op": "gate", "layers": [1], "sites": ["attention"], "strength": 1.0})
    (one,) = interventions(base, arch, recipe)
    (edit,) = one.edits()
    assert edit.tensor == "model.layers.1.linear_attn.out_proj.weight"

    def converted(weight: Tensor) -> Tensor:
        if model_type == "qwen3_next":
            return weight
        # Four value heads of width 8, the first two of one key head.
        heads = weight.split(8, -1)
        return torch.cat([heads[place] for place in (0, 2, 1, 3)], -1)

    weight = base.read(edit.tensor)
    moved = gguf_edit(edit, arch, base.config)
    torch.testing.assert_close(moved.apply(converted(weight)), converted(edit.apply(weight)))


def test_a_changed_byte_is_found(tiny_llama: Path, tmp_path: Path) -> None:
    base = Checkpoint.open(tiny_llama)
    output = tmp_path / "out"
    output.mkdir()
    write_checkpoint(base, {}, (), {}, output)
    info = Checkpoint.open(output).find("model.norm.weight")
    with info.file.open("r+b") as stream:
        stream.seek(info.start)
        first = stream.read(1)[0]
        stream.seek(info.start)
        stream.write(bytes([first ^ 1]))
    with pytest.raises(VerificationError, match=r"model\.norm\.weight differs"):
        check_files(base, Checkpoint.open(output), {}, set())
