"""Multimodal wrappers: the text model inside is edited, through the disk, and nothing else."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForMultimodalLM

from bake.activations import Conversation, Tap, collect
from bake.arch import Arch
from bake.archs import ARCHS, find_arch
from bake.carriers import carry
from bake.checkpoint import Checkpoint
from bake.errors import ArchitectureError, BakeError, CheckpointError
from bake.hooks import on_output, steered
from bake.model import Batch, LiveModel
from bake.ops.ablate import orthonormal
from bake.ops.gate import Gate
from bake.plan import make_plan
from bake.prepare import prepare
from bake.recipe import Recipe
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
from tests.tiny import WRAPPERS, write_tokenizer, write_wrapper


def whole(name: str) -> str:
    """As the first Hub files have it: a whole causal model in `language_model`."""
    name = name.removeprefix("model.")
    if name.startswith("lm_head"):
        return f"language_model.{name}"
    return re.sub(r"^language_model\.(?!model\.|lm_head)", "language_model.model.", name)


def apart(name: str) -> str:
    """As newer files have it: the blocks in `model.language_model`, the head outside."""
    name = whole(name).replace("language_model.model.", "language_model.", 1)
    return name.removeprefix("language_model.") if "lm_head" in name else f"model.{name}"


LAYOUTS: Mapping[str, tuple[str, Callable[[str], str], str]] = {
    "gemma3-whole": ("gemma3", whole, "language_model.model"),
    "gemma3-apart": ("gemma3", apart, "model.language_model"),
    "mistral3-whole": ("mistral3", whole, "language_model.model"),
    "mistral3-apart": ("mistral3", apart, "model.language_model"),
    "llava-whole": ("llava", whole, "language_model.model"),
    "llava-apart": ("llava", apart, "model.language_model"),
    "qwen3_5": ("qwen3_5", str, "model.language_model"),
    "qwen3_5_moe": ("qwen3_5_moe", str, "model.language_model"),
    "idefics3": ("idefics3", str, "model.text_model"),
    "lfm2_vl": ("lfm2_vl", str, "model.language_model"),
    "granite_speech": ("granite_speech", str, "language_model.model"),
    "qwen2_audio": ("qwen2_audio", str, "language_model.model"),
}


@pytest.fixture(scope="module", params=sorted(LAYOUTS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wrapper on disk; its folder is named after its layout."""
    folder: Path = tmp_path_factory.mktemp("wrappers") / request.param
    model_type, rename, _ = LAYOUTS[request.param]
    write_wrapper(model_type, folder, rename)
    return folder


@pytest.fixture(scope="module", params=["llava-whole", "llava-apart"])
def llava(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("wrappers") / request.param
    write_wrapper("llava", folder, LAYOUTS[request.param][1])
    return folder


def opened(folder: Path) -> tuple[Checkpoint, Arch]:
    base = Checkpoint.open(folder)
    return base, find_arch(base.config, "config.json", base.tensors)


def foreign(base: Checkpoint, arch: Arch) -> list[str]:
    """The tensors beside the text model."""
    heads = tuple(f"{head}." for head in arch.unembeddings)
    return [name for name in base.tensors if not name.startswith((f"{arch.root}.", *heads))]


def logits(model: LiveModel, base: Checkpoint, arch: Arch, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Of the base as it is, and hooked."""
    before = model.logits(BATCH)
    with steered(model, interventions(base, arch, recipe)):
        return before, model.logits(BATCH)


def test_every_wrapper_has_a_layout() -> None:
    assert {model_type for model_type, _, _ in LAYOUTS.values()} == set(WRAPPERS)


def test_ablated_everywhere_leaves_nothing_in_the_stream(case: Path, tmp_path: Path) -> None:
    base, arch = opened(case)
    assert arch.root == LAYOUTS[case.name][2]
    layers = arch.layer_count(base.config)
    recipe = recipe_of(everywhere(layers))
    direction = orthonormal(measured(base).directions[layers // 2][None])
    model = LiveModel.load(case, arch)
    assert left_in_stream(model, direction, layers) > 1e-2
    before, hooked = logits(model, base, arch, recipe)
    after = baked(base, arch, recipe, tmp_path / "out")
    assert effect_lost(before, hooked, after.logits(BATCH)) < 1e-4
    assert left_in_stream(after, direction, layers) < 1e-6


def test_everything_beside_the_text_model_is_equal_to_the_bit(case: Path, tmp_path: Path) -> None:
    base, arch = opened(case)
    recipe = recipe_of(everywhere(arch.layer_count(base.config)))
    baked(base, arch, recipe, tmp_path / "out")
    written = Checkpoint.open(tmp_path / "out")
    beside = foreign(base, arch)
    assert len(beside) > 5
    for name in beside:
        assert torch.equal(base.read(name), written.read(name)), name
    # What writes to the text stream has changed, and only that.
    changed = {
        name for name in base.tensors if not torch.equal(base.read(name), written.read(name))
    }
    writers = [one for layer in arch.written(base.tensors).values() for one in layer]
    names = {name for one in writers for name in (one.weight, one.bias) if name}
    assert changed == names | {f"{name}.weight" for name in arch.embeddings}


@pytest.mark.parametrize("layout", ["gemma3-whole", "llava-apart", "qwen3_5_moe"])
def test_a_row_with_a_wrong_field_fails(layout: str, tmp_path: Path) -> None:
    model_type, rename, _ = LAYOUTS[layout]
    write_wrapper(model_type, tmp_path / "base", rename)
    base, arch = opened(tmp_path / "base")
    layers = arch.layer_count(base.config)
    direction = orthonormal(measured(base).directions[layers // 2][None])
    for number, wrong in enumerate(mutations(arch, base)):
        try:
            after = baked(base, wrong, recipe_of(everywhere(layers)), tmp_path / str(number))
        except (BakeError, RuntimeError):
            continue
        assert left_in_stream(after, direction, layers) > 1e-4, wrong


def test_a_gate_in_the_weights_is_the_hooked_gate(case: Path, tmp_path: Path) -> None:
    base, arch = opened(case)
    recipe = recipe_of({"op": "gate", "layers": [1], "sites": ["attention"], "strength": 1.0})
    before, hooked = logits(LiveModel.load(case, arch), base, arch, recipe)
    after = baked(base, arch, recipe, tmp_path / "out")
    assert effect_lost(before, hooked, after.logits(BATCH)) < 1e-4


@pytest.mark.parametrize(
    ("site", "switch", "module"),
    [("out", "mlp_bias", "mlp.down_proj"), ("mid", "attention_bias", "self_attn.o_proj")],
)
def test_an_added_bias_is_switched_on_in_the_text_config(
    llava: Path, tmp_path: Path, site: str, switch: str, module: str
) -> None:
    base, arch = opened(llava)
    spec = {"op": "add", "layer": 1, "site": site, "strength": 2.0, "carrier": "bias"}
    recipe = recipe_of(spec)
    before, hooked = logits(LiveModel.load(llava, arch), base, arch, recipe)
    after = baked(base, arch, recipe, tmp_path / "out")
    assert effect_lost(before, hooked, after.logits(BATCH)) < 1e-4
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"].pop(switch) is True
    original = json.loads((llava / "config.json").read_text())
    assert original["text_config"].pop(switch) is False
    assert config == original
    bias = after.module(arch.block_module(1, module)).bias
    assert isinstance(bias, Tensor)
    assert torch.equal(
        bias, Checkpoint.open(tmp_path / "out").read(f"{arch.root}.layers.1.{module}.bias")
    )


def test_a_switch_outside_the_text_config_fails(llava: Path, tmp_path: Path) -> None:
    """The stock class reads the switch nowhere else: the written biases find no place."""
    base, arch = opened(llava)
    assert arch.inner is not None
    wrong = replace(arch, inner=replace(arch.inner, section="vision_config"))
    recipe = recipe_of({"op": "add", "layer": 1, "strength": 1.0, "carrier": "bias"})
    with pytest.raises(CheckpointError, match="unexpected keys"):
        baked(base, wrong, recipe, tmp_path / "out")


def test_a_bias_for_a_runtime_whose_wrapper_has_none_is_refused(llava: Path) -> None:
    base, arch = opened(llava)
    spec = {"op": "add", "layer": 1, "strength": 1.0, "carrier": "bias"}
    make_plan(recipe_of(spec, runtimes=("transformers", "llama.cpp", "vllm")), base, arch)
    with pytest.raises(ArchitectureError, match=r"mlx would drop a bias of mlp\.down_proj"):
        make_plan(recipe_of(spec, runtimes=("transformers", "mlx")), base, arch)


def test_a_multiplier_is_read_from_the_text_config(tmp_path: Path) -> None:
    """Granite multiplies its branches and its embedding; the numbers lie in the section."""
    folder = tmp_path / "base"
    write_wrapper("granite_speech", folder)
    base, arch = opened(folder)
    assert "residual_multiplier" not in base.config
    for number, spec in enumerate(({"layer": 1, "site": "out"}, {"layer": 0, "site": "in"})):
        recipe = recipe_of({"op": "add", "strength": 2.0} | spec)
        before, hooked = logits(LiveModel.load(folder, arch), base, arch, recipe)
        after = baked(base, arch, recipe, tmp_path / str(number))
        assert effect_lost(before, hooked, after.logits(BATCH)) < 1e-4
    assert carry(base, arch, 1, "out", "ridge", ())[0].multiplier == 0.4
    folded = replace(arch, branches=tuple(replace(one, folded=True) for one in arch.branches))
    weight = arch.written(base.tensors)[1][0].weight
    assert folded.gguf_factor(weight, base.config) == 0.4
    gate = {"op": "gate", "layers": [1], "sites": ["mlp"], "strength": 4.0}
    [built] = interventions(base, arch, recipe_of(gate))
    assert isinstance(built, Gate)
    torch.testing.assert_close(built.vector, 4.0 / 0.4 * measured(base).directions[1])


def test_an_unknown_tensor_inside_the_language_model_stops(case: Path) -> None:
    base, arch = opened(case)
    known = [f"{arch.root}.layers.0.mlp.second_down_proj.weight", f"{arch.root}.adapter.weight"]
    if not arch.root.startswith("model."):
        known.append("language_model.adapter.weight")
    arch.check_tensors(base.tensors, base.config)
    for name in known:
        with pytest.raises(ArchitectureError, match=name):
            arch.check_tensors([*base.tensors, name], base.config)
    for name in ("model.audio_tower.layers.0.mlp.down_proj.weight", "projector.weight"):
        arch.check_tensors([*base.tensors, name], base.config)
    written = arch.written(base.tensors)[1][0].weight
    without = [name for name in base.tensors if name != written]
    with pytest.raises(ArchitectureError, match=r"layers\.1: no tensor writes its attention"):
        arch.check_tensors(without, base.config)


def test_a_text_model_that_is_missing_or_there_twice_is_refused(llava: Path) -> None:
    base, arch = opened(llava)
    inside = [name for name in base.tensors if name.startswith(f"{arch.root}.")]
    draft = [name.replace(arch.root, "draft.model") for name in inside]
    without = [name for name in inside if ".layers.2." not in name]
    for names, reason in (
        ([*base.tensors, *draft], r"draft\.model\.layers\.\{layer\}, "),
        (without, "found no tensors"),
        ((), "found no tensors"),
    ):
        with pytest.raises(ArchitectureError, match=reason):
            find_arch(base.config, "config.json", names)
    # A second embedding alone is no second text model.
    names = [*base.tensors, "mtp.embed_tokens.weight", "mtp.layers.0.mlp.down_proj.weight"]
    assert find_arch(base.config, "config.json", names) == arch


def test_a_wrapper_of_a_text_model_outside_the_table_is_refused() -> None:
    for config, reason in (
        ({"model_type": "gemma4", "text_config": {}}, "text_config: model_type 'gemma4_text': its"),
        ({"model_type": "qwen3_vl", "text_config": {}}, "'qwen3_vl_text' is not in bake's table"),
        ({"model_type": "wrapper9", "text_config": {"model_type": "llama"}}, "'wrapper9'"),
        (
            {"model_type": "llava", "text_config": {"hidden_size": "wide"}},
            r"none that transformers can read .*hidden_size",
        ),
    ):
        with pytest.raises(ArchitectureError, match=reason):
            find_arch(config, "config.json")


def test_numbers_that_the_file_leaves_to_the_class() -> None:
    """llava-hf/llava-1.5-7b-hf: a text_config without width, layers and heads."""
    text = {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064}
    config = {"model_type": "llava", "text_config": text}
    names = ["language_model.model.embed_tokens.weight", "language_model.lm_head.weight"]
    for layer in range(32):
        block = f"language_model.model.layers.{layer}"
        names += [f"{block}.self_attn.o_proj.weight", f"{block}.mlp.down_proj.weight"]
    arch = find_arch(config, "config.json", names)
    assert (arch.layer_count(config), arch.width(config)) == (32, 4096)
    assert arch.rotary_heads(f"{block}.self_attn.q_proj.weight", config) == 32
    with pytest.raises(ArchitectureError, match="with 32 layers: found no tensors"):
        find_arch(config, "config.json", names[:-2])


def test_a_tied_wrapper_is_known_by_its_tensors(tmp_path: Path) -> None:
    for layout in ("gemma3-whole", "gemma3-apart"):
        for tied in (True, False):
            folder = tmp_path / f"{layout}-{tied}"
            write_wrapper("gemma3", folder, LAYOUTS[layout][1], tie_word_embeddings=tied)
            base, arch = opened(folder)
            assert arch.tied(base.tensors) is tied
            recipe = recipe_of({"op": "ablate", "layers": [0], "embeddings": True})
            if tied:
                with pytest.raises(ArchitectureError, match="tied"):
                    make_plan(recipe, base, arch)
                # One matrix moves all logits of a position alike, so its steering shows not there.
                recipe = recipe_of({"op": "add", "layer": 0, "site": "in", "strength": 2.0})
                before, hooked = logits(LiveModel.load(folder, arch), base, arch, recipe)
                after = baked(base, arch, recipe, folder / "out").logits(BATCH)
                one, other = (torch.log_softmax(found, -1) for found in (hooked, after))
                assert effect_lost(torch.log_softmax(before, -1), one, other) < 1e-4


def test_capped_logits_of_a_tied_wrapper(tmp_path: Path) -> None:
    """The cap, which forbids a vector on a tied embedding, lies in the text_config."""
    changes = {"tie_word_embeddings": True, "final_logit_softcapping": 30.0}
    write_wrapper("gemma3", tmp_path, **changes)
    recipe = recipe_of({"op": "add", "layer": 0, "site": "in", "strength": 2.0})
    with pytest.raises(ArchitectureError, match="the logits are capped"):
        make_plan(recipe, *opened(tmp_path))


def test_gguf_names_are_those_of_the_text_model_alone(case: Path) -> None:
    base, arch = opened(case)
    row = ARCHS[arch.model_type]
    for layer, written in arch.written(base.tensors).items():
        for one in written:
            alone = one.weight.replace(arch.root, row.root)
            assert arch.gguf_name(one.weight) == row.gguf_name(alone)
            assert arch.gguf_name(one.weight).startswith(f"blk.{layer}.")
            numbers = base.config["text_config"]
            assert isinstance(numbers, dict)
            assert arch.gguf_factor(one.weight, base.config) == row.gguf_factor(alone, numbers)
    assert arch.gguf_name(f"{arch.embeddings[0]}.weight") == "token_embd.weight"
    if not arch.tied(base.tensors):
        assert f"{arch.unembeddings[0]}.weight" in base.tensors
        assert arch.gguf_name(f"{arch.unembeddings[0]}.weight") == "output.weight"
    for name in foreign(base, arch):
        with pytest.raises(ArchitectureError, match="no GGUF name"):
            arch.gguf_name(name)


def test_experts_in_one_tensor_as_published(tmp_path: Path) -> None:
    """Qwen 3.5's Hub files have the experts in one tensor, and heads that no class loads."""
    folder = tmp_path / "base"
    write_wrapper("qwen3_5_moe", folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for layer in range(4):
        experts = f"model.language_model.layers.{layer}.mlp.experts"
        found = {
            part: torch.stack([tensors.pop(f"{experts}.{i}.{part}_proj.weight") for i in range(4)])
            for part in ("gate", "up", "down")
        }
        tensors[f"{experts}.down_proj"] = found["down"]
        tensors[f"{experts}.gate_up_proj"] = torch.cat([found["gate"], found["up"]], 1)
    extra = {"mtp.layers.0.mlp.down_proj.weight": drawn(1, 4, 4), "mtp.fc.weight": drawn(2, 4, 4)}
    save_file(tensors | extra, file, {"format": "pt"})
    base, arch = opened(folder)
    recipe = recipe_of(everywhere(4))
    direction = orthonormal(measured(base).directions[2][None])
    before, hooked = logits(LiveModel.load(folder, arch), base, arch, recipe)
    after = baked(base, arch, recipe, tmp_path / "out")
    assert effect_lost(before, hooked, after.logits(BATCH)) < 1e-4
    assert left_in_stream(after, direction, 4) < 1e-6
    for name, tensor in extra.items():
        assert torch.equal(Checkpoint.open(tmp_path / "out").read(name), tensor)
    name = "model.language_model.layers.0.mlp.experts.down_proj"
    assert arch.gguf_name(name) == "blk.0.ffn_down_exps.weight"
    assert not arch.is_transposed(name)


def test_a_baked_text_model_works_in_its_wrapper(tmp_path: Path) -> None:
    """Qwen 3.5 is measured as a causal model alone, and served as a whole."""
    write_wrapper("qwen3_5", tmp_path / "base")
    base, arch = opened(tmp_path / "base")
    alone = baked(base, arch, recipe_of(everywhere(4)), tmp_path / "out")
    served = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out").eval()
    assert type(served) is not type(alone.model)
    with torch.inference_mode():
        found = served(input_ids=BATCH.ids, attention_mask=BATCH.mask).logits
    torch.testing.assert_close(found, alone.logits(BATCH))


def test_a_text_only_conversation(case: Path) -> None:
    """Answered and measured, with padding on the left."""
    base, arch = opened(case)
    model = LiveModel.load(case, arch)
    prompts = [[1, 3, 15, 16, 17, 2, 1, 4], [1, 3, 18, 2, 1, 4], [1, 3, 19, 20, 2, 1, 4]]
    answers = model.answer(prompts, 1)
    seen: list[Tensor] = []
    tail = model.block(arch.layer_count(base.config) - 1)
    handle = on_output(tail, lambda output, _: seen.append(output) or output)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        batch = Batch(ids, torch.ones_like(ids), (0,))
        first = int(model.logits(batch)[0, -1].argmax())
        assert answer == ([] if first == 2 else [first])
        model.run(batch)
        torch.testing.assert_close(seen[-1], seen[-2])
    handle.remove()
    module = arch.written(base.tensors)[1][0].module
    last = len(prompts[0]) - 1
    taps = {
        "stream": Tap(model.block(1), "output", "last"),
        "writer": Tap(model.module(module), "input", "last"),
    }
    moments = collect(model, [Conversation(tuple(prompts[0]), last, (last,))], taps)
    weight = base.read(f"{module}.weight")
    assert (len(moments["stream"].mean), len(moments["writer"].mean)) == (32, weight.shape[1])
    assert moments["stream"].mean.norm() > 0


def test_a_text_model_of_another_class_is_refused(llava: Path) -> None:
    wrong = replace(opened(llava)[1], model_type="qwen2")
    with pytest.raises(CheckpointError, match=r"is a LlamaModel, which is not .*'qwen2'"):
        LiveModel.load(llava, wrong)


PARTS = (
    "{% for message in messages %}<s> {{ message.role }} {% for part in message.content "
    "| selectattr('type', 'equalto', 'text') %}{{ part.text }} {% endfor %}</s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def test_a_chat_template_that_wants_parts(llava: Path, tmp_path: Path) -> None:
    """As llava's: a plain string would be left out silently. Old files have it beside."""
    model = LiveModel.load(llava, opened(llava)[1])
    plain = model.render("w1 w2")
    assert model.text(plain) == "user w1 w2 assistant"
    folder = tmp_path / "model"
    write_wrapper("llava", folder)
    for path in folder.glob("chat_template*"):
        path.unlink()
    write_tokenizer(folder, None)
    with pytest.raises(CheckpointError, match="no chat template"):
        LiveModel.load(folder, opened(folder)[1])
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": PARTS}))
    assert LiveModel.load(folder, opened(folder)[1]).render("w1 w2") == plain
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "<s> assistant"}))
    with pytest.raises(CheckpointError, match="its chat template drops the prompt"):
        LiveModel.load(folder, opened(folder)[1]).render("w1 w2")


def test_a_wrapper_is_prepared_from_its_folder(llava: Path, tmp_path: Path) -> None:
    for number, role in enumerate(("target", "protected", "general")):
        lines = [f"w{10 * number + i} w{i + 40} w{number}" for i in range(9)]
        (tmp_path / f"{role}.txt").write_text("\n".join(lines))
    recipe = Recipe.model_validate(
        {
            "model": str(llava),
            "name": "test",
            "prompts": {
                role: str(tmp_path / f"{role}.txt") for role in ("target", "protected", "general")
            }
            | {"lookalike": None},
            "edits": [{"op": "add", "layer": 1, "strength": 1.0}],
            "evaluate": {"runtimes": ["transformers"]},
            "export": {"gguf": None},
        }
    )
    plan = prepare(recipe).plan
    assert plan.config == {"text_config.mlp_bias": True}
    root = LAYOUTS[llava.name][2]
    assert [edit.tensor for edit in plan.edits] == [f"{root}.layers.1.mlp.down_proj.bias"]
    assert "config.json: text_config.mlp_bias = True" in plan.table()
