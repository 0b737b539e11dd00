"""The block carrier: one more block is the added vector, on every row that offers it."""

import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from bake.arch import Arch, Block
from bake.archs import ARCHS, find_arch
from bake.checkpoint import Checkpoint
from bake.edits import CreatedTensor, Edit
from bake.errors import ArchitectureError, BakeError, VerificationError
from bake.export.layout import patch_gguf
from bake.gguf_file import GGUFFile
from bake.hooks import steered
from bake.insertion import Insertion, with_copies
from bake.llama import LlamaModel
from bake.model import LiveModel
from bake.plan import check_gguf, make_plan
from bake.recipe import Recipe
from bake.stream import write_checkpoint
from bake.verify import check_files
from tests.through_disk import BATCH, baked, effect_lost, interventions, recipe_of
from tests.tiny import write_tiny, write_wrapper
from tests.tiny_gguf import write_tiny_gguf

F32, Q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0

# More than twice the width, and no multiple of it; a window shorter than the texts.
WIDE: Mapping[str, Any] = {"intermediate_size": 80, "block_ff_dim": 80}
ALTERNATING: Mapping[str, Any] = {
    "num_hidden_layers": 4,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
}
# Mixtures of experts whose first blocks are dense, here the first two.
LEADING = {"deepseek_v2", "deepseek_v3", "glm4_moe"}
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    **{name: (name, {}) for name, row in ARCHS.items() if isinstance(row.block, Block)},
    **{name: (name, {"first_k_dense_replace": 2}) for name in LEADING},
    **{
        name: (name, ALTERNATING)
        for name in ("ministral", "gemma2", "gemma3_text", "olmo3", "cohere2")
    },
    "qwen2-windows": ("qwen2", ALTERNATING | {"use_sliding_window": True}),
    "qwen3-windows": ("qwen3", ALTERNATING | {"use_sliding_window": True}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 1]}),
    "qwen3_moe-mixed": ("qwen3_moe", {"mlp_only_layers": [1, 2]}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "gelu": ("llama", {"hidden_act": "gelu"}),
    "relu": ("llama", {"hidden_act": "relu"}),
}
TIED: Mapping[str, Any] = {"tie_word_embeddings": True}
OFFERED = {
    *("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "gemma", "gemma2"),
    *("gemma3_text", "phi3", "olmo2", "olmo3", "glm4", "granite", "smollm3", "cohere", "cohere2"),
    *("stablelm", "falcon_h1", "lfm2", "qwen3_5_text"),
    *("qwen2_moe", "qwen3_moe", "qwen3_next", "deepseek_v2", "deepseek_v3", "glm4_moe"),
}


def adding(layer: int, **others: object) -> dict[str, object]:
    return {"op": "add", "layer": layer, "strength": 2.0, "carrier": "block"} | others


def opened(folder: Path) -> tuple[Checkpoint, Arch]:
    base = Checkpoint.open(folder)
    return base, find_arch(base.config, "config.json", base.tensors)


def lost(
    folder: Path, recipe: Recipe, output: Path, row: Arch | None = None
) -> tuple[float, LiveModel]:
    """What the baked model, by the row given, lost against the hooks of the true one."""
    base, arch = opened(folder)
    model = LiveModel.load(folder, arch)
    before = model.logits(BATCH)
    with steered(model, interventions(base, arch, recipe)):
        hooked = model.logits(BATCH)
    after = baked(base, row or arch, recipe, output)
    return effect_lost(before, hooked, after.logits(BATCH)), after


def edits_of(base: Checkpoint, arch: Arch, recipe: Recipe) -> dict[str, list[Edit]]:
    made: dict[str, list[Edit]] = {}
    for one in interventions(base, arch, recipe):
        for edit in one.edits():
            made.setdefault(edit.tensor, []).append(edit)
    return made


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param) / "base"
    model_type, changes = VARIANTS[request.param]
    write_tiny(model_type, folder, **WIDE | changes)
    return folder


def test_the_rows_that_offer_a_block() -> None:
    assert {name for name, row in ARCHS.items() if isinstance(row.block, Block)} == OFFERED


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_an_inserted_block_is_the_hook(wide: Path, tmp_path: Path, layer: int) -> None:
    base, arch = opened(wide)
    count = arch.layer_count(base.config)
    if layer < 0 and arch.model_type in LEADING:
        message = r"the block has no mlp\.gate_proj\.weight, which an inserted one needs"
        with pytest.raises(ArchitectureError, match=message):
            make_plan(recipe_of(adding(2)), base, arch)
        return
    share, after = lost(wide, recipe_of(adding(layer % count)), tmp_path / "out")
    assert share < 1e-4
    assert after.model.config.num_hidden_layers == count + 1


def test_untouched_tensors_are_the_same_bits_under_their_new_names(
    wide: Path, tmp_path: Path
) -> None:
    base, arch = opened(wide)
    recipe = recipe_of(adding(1))
    plan = make_plan(recipe, base, arch)
    baked(base, arch, recipe, tmp_path / "out")
    written = Checkpoint.open(tmp_path / "out")
    for name in base.tensors:
        parts = name.split(".")
        if "layers" in parts and int(parts[2]) > 1:
            parts[2] = str(int(parts[2]) + 1)
        new = ".".join(parts)
        assert torch.equal(base.read(name), written.read(new))
        assert plan.renamed.get(name, name) == new
    added = written.tensors.keys() - {plan.name(name) for name in base.tensors}
    assert added
    assert all(name.startswith("model.layers.2.") for name in added)
    # One edit alone: the vector; the order of the files is the base's, the block behind its own.
    assert len(plan.edits) == 1
    order = [name for shard in written.shards for name in (one.name for one in shard.tensors)]
    assert [name for name in order if name not in added] == [plan.name(n) for n in base.tensors]


def mutations(arch: Arch) -> Iterator[Arch]:
    """The row with one thing of its block wrong that changes what the block computes."""
    block = arch.block
    assert isinstance(block, Block)
    yield replace(arch, block=replace(block, gate="self_attn.q_proj", up="self_attn.q_proj"))
    if block.gate != block.up:
        yield replace(arch, block=replace(block, up=block.gate))
    else:
        yield replace(arch, block=replace(block, up="mlp.up_proj"))
    yield replace(arch, block=replace(block, activation="model_type"))
    (mlp,) = (one for one in arch.branches if one.site == "mlp")
    if block.norms:
        yield replace(arch, block=replace(block, norms=("self_attn",)))
    # Zero is Gemma's gain 1 already, and its post-norm takes out any other gain.
    if block.norms and not (block.norm_offset and mlp.norm):
        yield replace(arch, block=replace(block, norm_offset=1.0 - block.norm_offset))
    if len(block.norms) == 1 and not block.norm_offset:
        yield replace(arch, block=replace(block, norms=()))
    for key in block.per_layer:
        others = tuple(one for one in block.per_layer if one != key)
        yield replace(arch, block=replace(block, per_layer=others))
    if block.gate_scale:
        yield replace(arch, block=replace(block, gate_scale=()))
    if block.dense:
        yield replace(arch, block=replace(block, dense=None))
        yield replace(arch, block=replace(block, dense=replace(block.dense, listed="dense")))
        step = replace(block.dense, step="num_experts")
        yield replace(arch, block=replace(block, dense=step))
    if "first_k_dense_replace" in block.leading:
        yield replace(arch, block=replace(block, leading=()))
    wrong = [replace(mlp, scale=())] if mlp.scale else []
    if mlp.norm:
        wrong += [replace(mlp, norm=None), replace(mlp, norm_offset=1.0 - mlp.norm_offset)]
    for other in wrong:
        branches = tuple(other if one == mlp else one for one in arch.branches)
        readers = (*arch.readers, mlp.norm) if mlp.norm else arch.readers
        yield replace(arch, branches=branches, readers=readers)


def test_a_row_with_a_wrong_role_fails(wide: Path, tmp_path: Path) -> None:
    """The bake is refused, or its logits are not the hook's."""
    for number, wrong in enumerate(mutations(opened(wide)[1])):
        try:
            share, _ = lost(wide, recipe_of(adding(1)), tmp_path / str(number), wrong)
        except (BakeError, RuntimeError):
            continue
        assert share > 1e-3, wrong


def test_rows_without_a_block_say_why(tiny: Path) -> None:
    base, arch = opened(tiny)
    if arch.model_type in LEADING:
        message = r"the block has no mlp\.gate_proj\.weight"
    elif isinstance(arch.block, Block):
        message = r"the MLP has 32 neurons, an inserted block needs twice .*, 64"
    else:
        message = rf"model_type '{arch.model_type}': {arch.block}"
    with pytest.raises(ArchitectureError, match=f"the block carrier cannot serve: .*{message}"):
        make_plan(recipe_of(adding(1)), base, arch)


REFUSALS: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any], str, str]] = {
    "another activation": ("llama", {"hidden_act": "relu2"}, {}, "vllm", "hidden_act: 'relu2' is"),
    "half precision without a norm": ("olmo2", {"dtype": torch.float16}, {}, "vllm", "is F16"),
    "window by number": ("gemma2", {}, {}, "sglang", "sglang takes a block's window from its"),
    "windows by number in MLX": ("cohere2", {}, {}, "mlx", "mlx takes a block's window"),
    "rotary by number": ("smollm3", {}, {}, "llama.cpp", "llama.cpp takes every 4th block"),
    "a size of llama.cpp's": (
        *("gemma2", {"num_hidden_layers": 46}, {}, "llama.cpp"),
        "llama.cpp takes a model of 46 layers for another size",
    ),
    "one less than such a size": (
        *("gemma3_text", {"num_hidden_layers": 61}, {}, "ollama"),
        "ollama takes a model of 62 layers for another size",
    ),
    "kinds by number": ("qwen3_5_text", {}, {}, "sglang", "takes a block's kind from its number"),
    "no dense block": ("qwen3_moe", {}, {}, "llama.cpp", "llama.cpp has no dense block among"),
    "dense blocks by number": (
        *("qwen2_moe", {"decoder_sparse_step": 2}, {}, "vllm"),
        r"decoder_sparse_step: is 2, so which blocks are dense",
    ),
    "a list that nobody knows": (
        *("llama", {}, {"layer_scales": [1.0, 2.0, 3.0]}, "vllm"),
        "layer_scales: has 3 entries as the model has layers",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_no_exact_block_is_refused(tmp_path: Path, case: str) -> None:
    model_type, changes, config, runtime, message = REFUSALS[case]
    write_tiny(model_type, tmp_path, **WIDE | changes)
    edit_config(tmp_path, **config)
    with pytest.raises(ArchitectureError, match=f"the block carrier cannot serve: .*{message}"):
        make_plan(recipe_of(adding(1), runtimes=[runtime]), *opened(tmp_path))


def edit_config(folder: Path, *gone: str, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in gone}))


def test_sites_that_a_block_cannot_reach(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path, **WIDE)
    base, arch = opened(tmp_path)
    for spec in (adding(1, site="mid"), adding(0, site="in")):
        with pytest.raises(ArchitectureError, match="the block carrier cannot serve site"):
            make_plan(recipe_of(spec), base, arch)
    # Before a block is behind the one before it.
    assert make_plan(recipe_of(adding(2, site="in")), base, arch).insertion.after == (1,)


def test_tensors_behind_the_last_layer_are_refused(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path, **WIDE)
    edit_config(tmp_path, num_hidden_layers=2)
    with pytest.raises(
        ArchitectureError, match=r"layers\.2.*: is behind the last of the model's 2"
    ):
        make_plan(recipe_of(adding(1)), *opened(tmp_path))


PATTERNS = {
    "gemma2": (5, {}, ()),
    "gemma3_text": (7, {"sliding_window_pattern": 3}, ()),
    "cohere2": (6, {"sliding_window_pattern": 3}, ()),
    "olmo3": (6, {}, ()),
    "smollm3": (6, {"no_rope_layer_interval": 3}, ("no_rope_layers",)),
}


@pytest.mark.parametrize("model_type", PATTERNS)
def test_a_period_in_the_config_becomes_the_list_of_the_base(
    tmp_path: Path, model_type: str
) -> None:
    """Published files give a period, or nothing; what they say of the base's blocks stays."""
    layers, given, gone = PATTERNS[model_type]
    folder = tmp_path / "base"
    write_tiny(model_type, folder, **WIDE, num_hidden_layers=layers, sliding_window=4)
    edit_config(folder, "layer_types", *gone, **given)
    share, after = lost(folder, recipe_of(adding(2)), tmp_path / "out")
    assert share < 1e-4
    was = LiveModel.load(folder, opened(folder)[1]).model.config
    for key in gone or ("layer_types",):
        old = getattr(was, key)
        assert len(set(old)) == 2
        assert getattr(after.model.config, key) == [*old[:3], *old[2:]]
        assert json.loads((tmp_path / "out" / "config.json").read_text())[key] == [
            *old[:3],
            *old[2:],
        ]


def test_leading_layers_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    changes = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    write_tiny("qwen2", folder, **WIDE, **changes, num_hidden_layers=4)
    edit_config(folder, "layer_types")
    base, arch = opened(folder)
    for layer, leading, windows in ((1, 3, 2), (2, 2, 3)):
        config = make_plan(recipe_of(adding(layer)), base, arch).config
        assert config["max_window_layers"] == leading
        kinds = ["full_attention"] * leading + ["sliding_attention"] * windows
        assert config["layer_types"] == kinds


def test_the_numbers_of_layers_that_a_config_lists_follow(tmp_path: Path) -> None:
    """LFM2's files say which layers have attention, by number alone; MLX reads it there."""
    folder = tmp_path / "base"
    write_tiny("lfm2", folder, **WIDE, num_hidden_layers=4, full_attn_idxs=[1, 3])
    edit_config(folder, "layer_types")
    for number, (layer, listed) in enumerate(((1, [1, 2, 4]), (0, [2, 4]), (3, [1, 3, 4]))):
        output = tmp_path / str(number)
        share, after = lost(folder, recipe_of(adding(layer)), output)
        assert share < 1e-4
        assert json.loads((output / "config.json").read_text())["full_attn_idxs"] == listed
        kinds = ["full_attention" if one in listed else "conv" for one in range(5)]
        assert after.model.config.layer_types == kinds


COMPOSED: Mapping[str, tuple[str, Sequence[Mapping[str, object]], tuple[int, ...]]] = {
    "two layers": ("llama", (adding(0), adding(2)), (0, 2)),
    "two layers, the later first": ("gemma2", (adding(2), adding(1)), (1, 2)),
    "one layer twice": ("llama", (adding(1), adding(1, strength=-0.5)), (1,)),
    "one layer twice behind a norm": ("gemma3_text", (adding(1), adding(1, strength=3.0)), (1,)),
    "with an ablation behind": (
        "qwen3",
        ({"op": "ablate", "layers": [0, 1, 2]}, adding(0)),
        (0,),
    ),
    "with a gate behind": (
        "mistral",
        (adding(0), {"op": "gate", "layers": [2], "strength": 4.0}),
        (0,),
    ),
    "with biases in every layer": (
        "llama",
        (adding(1), {"op": "add", "layer": 2, "strength": 2.0, "carrier": "bias"}),
        (1,),
    ),
    "with a bias in the same layer": (
        "llama",
        ({"op": "add", "layer": 1, "strength": 2.0, "carrier": "bias"}, adding(1)),
        (1,),
    ),
}


@pytest.mark.parametrize("case", COMPOSED)
def test_blocks_compose_with_other_edits(tmp_path: Path, case: str) -> None:
    model_type, edits, after = COMPOSED[case]
    folder = tmp_path / "base"
    write_tiny(model_type, folder, **WIDE)
    recipe = recipe_of(*edits)
    assert make_plan(recipe, *opened(folder)).insertion.after == after
    share, _ = lost(folder, recipe, tmp_path / "out")
    assert share < 1e-4


def test_the_constant_of_an_affine_ablation_may_be_a_block(tmp_path: Path) -> None:
    """Cohere's blocks are parallel: the constant joins behind one, and llama.cpp has no bias."""
    folder = tmp_path / "base"
    write_tiny("cohere", folder, **WIDE)
    spec = {"op": "ablate", "layers": [1, 2], "variant": "affine"}
    recipe = recipe_of(spec, runtimes=["transformers", "llama.cpp"])
    plan = make_plan(recipe, *opened(folder))
    assert [edit.carrier for edit in plan.edits][-1] == "block"
    share, _ = lost(folder, recipe, tmp_path / "out")
    assert share < 1e-4


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_the_checkpoints_own_type(tmp_path: Path, model_type: str, dtype: torch.dtype) -> None:
    """The written block, computed in float32, is the hook but for the rounding of the vector."""
    folder, output = tmp_path / "base", tmp_path / "out"
    write_tiny(model_type, folder, dtype=dtype, **WIDE)
    base, arch = opened(folder)
    recipe = recipe_of(adding(1))
    model = LiveModel.load(folder, arch, torch.float32)
    before = model.logits(BATCH)
    with steered(model, interventions(base, arch, recipe)):
        hooked = model.logits(BATCH)
    baked(base, arch, recipe, output)
    after = LiveModel.load(output, arch, torch.float32).logits(BATCH)
    assert effect_lost(before, hooked, after) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_shards_and_index(tmp_path: Path, shard: str) -> None:
    folder, output = tmp_path / "base", tmp_path / "out"
    write_tiny("llama", folder, shard=shard, **WIDE)
    share, _ = lost(folder, recipe_of(adding(0)), output)
    assert share < 1e-4
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in output.iterdir()
    )
    if shard == "40KB":
        index = json.loads((output / "model.safetensors.index.json").read_text())
        written = Checkpoint.open(output)
        assert index["weight_map"] == {
            name: info.file.name for name, info in written.tensors.items()
        }
        size = sum(info.stop - info.start for info in written.tensors.values())
        assert index["metadata"]["total_size"] == size


def test_what_was_not_planned_is_found(tmp_path: Path) -> None:
    """A created tensor that is another, and a tensor under a name that is not its new one."""
    folder, output = tmp_path / "base", tmp_path / "out"
    write_tiny("llama", folder, **WIDE)
    base, arch = opened(folder)
    recipe = recipe_of(adding(0))
    baked(base, arch, recipe, output)
    plan = make_plan(recipe, base, arch)
    made = edits_of(base, arch, recipe)
    written = Checkpoint.open(output)
    check_files(base, written, made, plan.created, plan.renamed)
    for number, tensor in enumerate(plan.created):
        if tensor.name in made:
            continue
        others = list(plan.created)
        others[number] = replace(tensor, value=tensor.value + 0.5)
        with pytest.raises(VerificationError, match="is new and not what was planned"):
            check_files(base, written, made, others, plan.renamed)
    first, second = "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"
    swapped = {**plan.renamed, first: plan.renamed[second], second: plan.renamed[first]}
    with pytest.raises(VerificationError, match="differs from the base"):
        check_files(base, written, made, plan.created, swapped)
    with pytest.raises(VerificationError, match=r"model\.layers\.1\.\S+ is new"):
        check_files(base, written, made, plan.created[1:], plan.renamed)


def test_a_created_tensor_is_built_when_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never two of them at a time: they are the largest tensors of a bake."""
    folder = tmp_path / "base"
    write_tiny("llama", folder, **WIDE)
    base, arch = opened(folder)
    plan = make_plan(recipe_of(adding(1)), base, arch)
    held: list[str] = []
    fill = CreatedTensor.filled

    def filled(self: CreatedTensor) -> Tensor:
        tensor = fill(self)
        held.append(self.name)
        weakref.finalize(tensor, held.remove, self.name)
        assert held == [self.name]
        return tensor

    monkeypatch.setattr(CreatedTensor, "filled", filled)
    (tmp_path / "out").mkdir()
    write_checkpoint(base, {}, plan.created, plan.config, tmp_path / "out", renamed=plan.renamed)
    assert held == []


def test_auto_prefers_a_block_to_ridge_and_a_bias_to_a_block(tmp_path: Path) -> None:
    def chosen(model_type: str, runtime: str) -> tuple[str, str]:
        folder = tmp_path / model_type
        if not folder.exists():
            write_tiny(model_type, folder, **WIDE)
        spec = {"op": "add", "layer": 1, "strength": 1.0}
        step = make_plan(recipe_of(spec, runtimes=[runtime]), *opened(folder)).steps[0]
        return step.edits[0].carrier, step.notes[0]

    assert chosen("llama", "vllm")[0] == "bias"
    carrier, note = chosen("llama", "sglang")
    assert (carrier, "sglang would drop a bias of mlp.down_proj" in note) == ("block", True)
    assert chosen("qwen3", "mlx")[0] == "block"
    assert chosen("gemma2", "vllm")[0] == "block"
    carrier, note = chosen("smollm3", "llama.cpp")
    assert (carrier, "every 4th block" in note) == ("ridge", True)
    carrier, note = chosen("gemma2", "sglang")
    assert (carrier, "the block carrier cannot serve" in note) == ("ridge", True)


@pytest.mark.parametrize("model_type", ["gemma3", "llava", "mistral3", "granite_speech"])
def test_the_text_model_of_a_wrapper_gets_a_block(tmp_path: Path, model_type: str) -> None:
    folder = tmp_path / "base"
    write_wrapper(model_type, folder, **WIDE)
    share, _ = lost(folder, recipe_of(adding(1)), tmp_path / "out")
    assert share < 1e-4
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 4
    base, arch = opened(folder)
    with pytest.raises(ArchitectureError, match="mlx has classes of its own"):
        make_plan(recipe_of(adding(1), runtimes=["mlx"]), base, arch)


def test_the_plan_shows_the_block_the_names_and_the_config(tmp_path: Path) -> None:
    write_tiny("gemma2", tmp_path, **WIDE | ALTERNATING)
    base, arch = opened(tmp_path)
    recipe = recipe_of({"op": "ablate", "layers": [3]}, adding(1))
    plan = make_plan(recipe, base, arch)
    table = plan.table()
    assert "add       block    model.layers.2.post_feedforward_layernorm.weight" in table
    assert "ablate    -        model.layers.4.mlp.down_proj.weight" in table
    assert "inserted: block 2 behind block 1, 11 tensors" in table
    assert "renamed: 22 tensors of the blocks behind" in table
    assert "created" not in table
    assert "config.json: num_hidden_layers = 5" in table
    values = plan.as_json()
    assert values["inserted"] == [2]
    renamed = values["renamed"]
    assert isinstance(renamed, dict)
    assert len(renamed) == 22
    assert renamed["model.layers.3.mlp.down_proj.weight"] == "model.layers.4.mlp.down_proj.weight"
    json.dumps(values, allow_nan=False)


def test_numbers_and_lists_of_an_insertion() -> None:
    insertion = Insertion("a.{layer}", 4, (0, 2))
    # Base block 0, the new one, 1, 2, the new one, 3.
    assert [insertion.number(block) for block in (0, 4, 1, 2, 6, 3)] == [0, 1, 2, 3, 4, 5]
    names = [f"a.{block}.x" for block in (0, 1, 3, 4, 6)]
    assert insertion.renamed([*names, "a.12", "b.3.x"]) == {
        "a.1.x": "a.2.x",
        "a.3.x": "a.5.x",
        "a.4.x": "a.1.x",
        "a.6.x": "a.4.x",
    }
    assert with_copies("abcd", (0, 2)) == list("aabccd")
    assert insertion.copies("a.2.x") == ("a.6.x",)
    assert insertion.original("a.6.x") == "a.2.x"
    assert insertion.original("a.2.x") is None


# What llama.cpp is asked for: its loss against the hooks, of the steering's own effect. Its GELU
# comes from a table in half precision.
IN_LLAMA_CPP: Mapping[str, tuple[Mapping[str, Any], float]] = {
    "llama": ({}, 1e-4),
    "qwen3": ({}, 1e-4),
    "phi3": ({}, 1e-4),
    "granite": ({}, 1e-4),
    "olmo2": ({}, 1e-4),
    "glm4": ({}, 1e-4),
    "stablelm": ({}, 1e-4),
    "cohere": (TIED, 1e-4),
    "cohere2": (TIED | {"num_hidden_layers": 6, "sliding_window": 4}, 1e-4),
    "gemma": (TIED, 1e-2),
    "gemma2": (TIED | {"sliding_window": 4, "query_pre_attn_scalar": 8}, 1e-2),
    "gemma3_text": (
        TIED | {"num_hidden_layers": 7, "sliding_window": 4, "query_pre_attn_scalar": 8},
        1e-2,
    ),
}


@pytest.mark.parametrize("kind", [F32, Q8_0], ids=["f32", "q8_0"])
@pytest.mark.parametrize("model_type", IN_LLAMA_CPP)
def test_llama_cpp_runs_the_inserted_block(
    tmp_path: Path, model_type: str, kind: GGMLQuantizationType
) -> None:
    """The patched GGUF in llama.cpp itself, against the hooked checkpoint."""
    changes, limit = IN_LLAMA_CPP[model_type]
    folder, source, output = tmp_path / "base", tmp_path / "base.gguf", tmp_path / "out.gguf"
    write_tiny(model_type, folder, **WIDE | {"num_hidden_layers": 4} | changes)
    base, arch = opened(folder)
    write_tiny_gguf(base, arch, source)
    recipe = recipe_of(adding(1), runtimes=["transformers", "llama.cpp"])
    plan, gguf = make_plan(recipe, base, arch), GGUFFile.open(source)
    if arch.block.listed:
        assert f"{gguf.architecture}.attention.sliding_window_pattern" not in gguf.metadata
    check_gguf(plan, base, arch, gguf)
    patch_gguf(
        plan, arch, base.config, gguf, edits_of(base, arch, recipe), output, edited_type=kind
    )
    model = LiveModel.load(folder, arch)
    before = model.logits(BATCH)
    with steered(model, interventions(base, arch, recipe)):
        hooked = model.logits(BATCH)
    found = []
    for path in (source, output):
        with LlamaModel(path, context=16, parallel=1, threads=2) as llama:
            rows = [torch.from_numpy(llama.logits(ids.tolist())) for ids in BATCH.ids]
        found.append(torch.stack(rows))
    assert effect_lost(before, hooked, hooked - before + found[0]) < limit
    assert effect_lost(before, hooked, found[1]) < max(limit, 3e-3 if kind is Q8_0 else 0)
