"""The variants of `ablate` and its kernel: every row of the table, through the disk."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bake.activations import Conversation
from bake.archs import ARCHS
from bake.checkpoint import Checkpoint
from bake.edits import Edit, RemoveKeepingNorms, RemoveSubspace
from bake.errors import ArchitectureError, FitError
from bake.export.layout import gguf_edit
from bake.fit.constant import with_constants
from bake.hooks import steered
from bake.model import LiveModel
from bake.ops.ablate import Ablate, orthonormal, projected
from bake.plan import make_plan
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
    opened,
    recipe_of,
    stream,
    with_exact_constants,
)
from tests.tiny import write_tiny
from tests.word_fit import word_fit, word_prompts

# Their experts are one tensor in memory, so no hook sees what one expert's matrix reads.
EXPERTS = {
    *("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "gpt_oss"),
    *("glm4_moe", "deepseek_v2", "deepseek_v3", "granitemoe"),
}
# The first layer is dense, so it can be ablated in every variant.
FIRST_DENSE = {"glm4_moe", "deepseek_v2", "deepseek_v3"}
# A post-norm stands behind every writer: the constant of a ridge carrier is added nearly there.
POST_NORMS = {"gemma2", "gemma3_text", "olmo2", "olmo3", "glm4"}
PARALLEL = {"phi", "cohere", "cohere2", "gpt_neox"}


@pytest.mark.parametrize("others", [(), ("projected",), ("affine",)], ids=" ".join)
def test_norms_are_kept_and_nothing_is_left_in_the_stream(
    tiny: Path, tmp_path: Path, others: tuple[str, ...]
) -> None:
    """Of the direction, of what is left of it beside the mean, or of all but the mean's part."""
    base, arch, layers = opened(tiny)
    recipe = recipe_of({**everywhere(layers), "variant": ["norm-preserving", *others]})
    if arch.model_type in EXPERTS:
        named = r"edits\.0\.variant: \S+(experts\.|output_linear)\S+: .*; leave norm-preserving out"
        with pytest.raises(ArchitectureError, match=named):
            make_plan(recipe, base, arch)
        return
    lost, after = lost_through_disk(tiny, recipe, tmp_path / "out")
    assert lost < 1e-4
    found = measured(base)
    direction, mean = found.directions[layers // 2], found.means[layers // 2]
    if "projected" in others:
        direction = direction - (direction @ mean) / (mean @ mean) * mean
    basis = orthonormal(direction[None])
    kept = mean @ basis if "affine" in others else torch.zeros(1)
    for h in stream(after, layers):
        assert float(((h @ basis - kept).norm(dim=-1) / h.norm(dim=-1)).max()) < 1e-5
    written = Checkpoint.open(tmp_path / "out")
    for one in (one for found in arch.written(base.tensors).values() for one in found):
        now, old = written.read(one.weight), base.read(one.weight)
        axis = one.writer.axis
        torch.testing.assert_close(now.norm(dim=axis), old.norm(dim=axis), rtol=1e-5, atol=1e-6)
        assert not torch.equal(now, old)


def test_norms_are_kept_in_a_dense_layer_of_a_mixture(tiny: Path, tmp_path: Path) -> None:
    arch = opened(tiny)[1]
    recipe = recipe_of({"op": "ablate", "layers": [0], "variant": "norm-preserving"})
    if arch.model_type in FIRST_DENSE:
        assert lost_through_disk(tiny, recipe, tmp_path / "out")[0] < 1e-4


def test_a_partial_norm_preserving_ablation_under_a_kernel(tiny: Path, tmp_path: Path) -> None:
    arch = opened(tiny)[1]
    kernel = {"peak": 0, "width": 2, "edge": -0.5}
    spec = {"op": "ablate", "layers": [0, 1], "variant": "norm-preserving", "kernel": kernel}
    if arch.model_type not in EXPERTS:
        assert lost_through_disk(tiny, recipe_of(spec), tmp_path / "out")[0] < 1e-4


def test_the_projected_direction_leaves_the_mean(tiny: Path, tmp_path: Path) -> None:
    base, arch, layers = opened(tiny)
    recipe = recipe_of({**everywhere(layers), "variant": "projected"})
    lost, after = lost_through_disk(tiny, recipe, tmp_path / "out")
    assert lost < 1e-4
    found = measured(base)
    mean, direction = found.means[layers // 2], found.directions[layers // 2]
    (ablation,) = interventions(base, arch, recipe)
    assert isinstance(ablation, Ablate)
    for cut in ablation.cuts:
        if "embed" in cut.module:
            assert abs(float(mean @ cut.basis)) < 1e-5 * float(mean.norm())
    left = orthonormal((direction - (direction @ mean) / (mean @ mean) * mean)[None])
    assert left_in_stream(after, left, layers) < 1e-6
    assert left_in_stream(after, orthonormal(direction[None]), layers) > 1e-2


def test_a_direction_along_the_mean_is_refused() -> None:
    mean = drawn(1, 32)
    assert abs(float(projected(drawn(2, 32), mean) @ mean)) < 1e-5
    with pytest.raises(FitError, match="leaves nothing of the direction"):
        projected(-2 * mean, mean)


def test_affine_everywhere_puts_the_mean_in_place_of_the_component(
    tiny: Path, tmp_path: Path
) -> None:
    """R Rᵀ h is R Rᵀ μ behind every block, at every token."""
    base, arch, layers = opened(tiny)
    recipe = recipe_of({**everywhere(layers), "variant": "affine"})
    plan = make_plan(recipe, base, arch)
    assert (plan.edits[-1].operator, plan.edits[-1].carrier) == ("add", "embedding")
    lost, after = lost_through_disk(tiny, recipe, tmp_path / "out")
    assert lost < 1e-4
    found = measured(base)
    basis = orthonormal(found.directions[layers // 2][None])
    wanted = found.means[layers // 2] @ basis
    assert float(wanted.abs()) > 0.1
    for h in stream(after, layers):
        assert float(((h @ basis - wanted).norm(dim=-1) / h.norm(dim=-1)).max()) < 1e-5


@pytest.mark.parametrize("variant", [["affine"], ["norm-preserving", "affine"]], ids=" ".join)
def test_affine_from_a_layer_on_adds_the_constant_once(
    tiny: Path, tmp_path: Path, variant: list[str]
) -> None:
    """Behind layer 1 there is λ R Rᵀ μ more along R than before it, and layer 2 adds nothing."""
    base, arch, _ = opened(tiny)
    if arch.model_type in EXPERTS and len(variant) > 1:
        return
    spec = {"op": "ablate", "layers": [1, 2], "variant": variant, "strength": 1.0}
    recipe = recipe_of(spec)
    plan = make_plan(recipe, base, arch)
    planned = plan.edits[-1]
    site = "out" if arch.model_type in PARALLEL else "mid"
    assert (planned.operator, planned.layer, planned.site) == ("add", 1, site)
    assert ("added nearly" in plan.notes[-1]) == (arch.model_type in POST_NORMS)
    if arch.model_type in POST_NORMS:
        return
    built = with_exact_constants(tiny, interventions(base, arch, recipe))
    made = [edit.tensor for one in built for edit in one.edits()]
    assert sorted(made) == sorted(edit.tensor for edit in plan.edits)
    lost, after = lost_through_disk(tiny, recipe, tmp_path / "out", built)
    assert lost < 1e-4
    found = measured(base)
    basis = orthonormal(found.directions[2][None])
    first, second, third = (h @ basis for h in stream(after, 3))
    wanted = (found.means[2] @ basis).expand_as(first)
    torch.testing.assert_close(second - first, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(third - second, torch.zeros_like(first), atol=1e-4, rtol=0)


def test_the_constant_is_in_the_stream_before_the_first_mlp(tmp_path: Path) -> None:
    """It joins at the first cut writer, not behind the block."""
    write_tiny("llama", tmp_path / "base")
    base = Checkpoint.open(tmp_path / "base")
    recipe = recipe_of({"op": "ablate", "layers": [1], "variant": "affine", "strength": 0.5})
    _, after = lost_through_disk(tmp_path / "base", recipe, tmp_path / "out")
    plain = recipe_of({"op": "ablate", "layers": [1], "strength": 0.5})
    _, without = lost_through_disk(tmp_path / "base", plain, tmp_path / "plain")
    seen: list[Tensor] = []
    for model in (after, without):
        norm = model.model.get_submodule("model.layers.1.post_attention_layernorm")
        handle = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        model.logits(BATCH)
        handle.remove()
    found = measured(base)
    basis = orthonormal(found.directions[1][None])
    wanted = 0.5 * basis @ (basis.T @ found.means[1])
    torch.testing.assert_close(seen[0] - seen[1], wanted.expand_as(seen[0]), atol=1e-5, rtol=1e-4)


def test_a_ridge_constant_of_affine_is_fitted(tmp_path: Path) -> None:
    """Mistral has no bias slot, so the constant is read off the attention's own output."""
    write_tiny("mistral", tmp_path / "base")
    base, arch, _ = opened(tmp_path / "base")
    recipe = recipe_of({"op": "ablate", "layers": [1], "variant": "affine"})
    built = interventions(base, arch, recipe)
    model = LiveModel.load(tmp_path / "base", arch)
    conversations = [Conversation(tuple(ids.tolist()), 7, (7,)) for ids in BATCH.ids]
    pairs = [(recipe.edits[0], one) for one in built]
    with pytest.raises(FitError, match=r"o_proj\.weight: .* begin at another layer"):
        # The readout of one token everywhere says nothing about others.
        with_constants(model, pairs, [[Conversation((1,), 0, (0,))]], conversations)
    ready, constants = with_constants(model, pairs, [conversations], conversations)
    assert list(constants) == ["model.layers.1.self_attn.o_proj.weight"]
    lost, _ = lost_through_disk(tmp_path / "base", recipe, tmp_path / "out", ready)
    assert lost < 1e-2


def test_a_kernel_falls_from_its_peak_in_hooks_and_weights(tiny: Path, tmp_path: Path) -> None:
    """Strength 1.5 at layer 0, 1.0 at 1, 0.5 at 2, and layer 3, where there is one, stays."""
    base, arch, layers = opened(tiny)
    kernel = {"peak": 0, "width": 3, "edge": 0.0}
    spec = {"op": "ablate", "layers": list(range(layers)), "strength": 1.5, "kernel": kernel}
    recipe = recipe_of(spec)
    plan = make_plan(recipe, base, arch)
    assert plan.steps[0].notes == ("edits.0: strength by layer 0: 1.5, 1: 1, 2: 0.5",)
    assert {edit.layer for edit in plan.edits} == {0, 1, 2}
    lost, _ = lost_through_disk(tiny, recipe, tmp_path / "out")
    assert lost < 1e-4
    written = Checkpoint.open(tmp_path / "out")
    (ablation,) = interventions(base, arch, recipe)
    assert isinstance(ablation, Ablate)
    # The middle of the edited layers.
    basis = orthonormal(measured(base).directions[1][None])
    for cut in ablation.cuts:
        (layer,) = (one for one in range(layers) if f".{one}." in f"{cut.module}.")
        if arch.model_type not in POST_NORMS:
            torch.testing.assert_close(cut.basis, basis)
        for name, axis in cut.tensors:
            old, now = (one.read(name).movedim(axis, -1) for one in (base, written))
            wanted = (1 - {0: 1.5, 1: 1.0, 2: 0.5}[layer]) * (old @ cut.basis)
            torch.testing.assert_close(now @ cut.basis, wanted, atol=1e-5, rtol=1e-4)


def test_the_layers_of_a_kernel_must_exist(tiny_llama: Path) -> None:
    kernel = {"peak": 3, "width": 9}
    recipe = recipe_of({"op": "ablate", "layers": [0], "kernel": kernel})
    with pytest.raises(ArchitectureError, match=r"edits\.0\.kernel\.peak: layer 3 is out of range"):
        make_plan(recipe, Checkpoint.open(tiny_llama), ARCHS["llama"])


def test_a_norm_preserving_ablation_comes_first(tiny_llama: Path, tmp_path: Path) -> None:
    """Its hook reads the base's weights, so it cannot follow another edit of them."""
    keeping = {"op": "ablate", "layers": [1], "variant": "norm-preserving"}
    gate = {"op": "gate", "layers": [1], "sites": ["mlp"], "strength": 4.0}
    recipe = recipe_of(keeping, gate)
    assert lost_through_disk(tiny_llama, recipe, tmp_path / "out")[0] < 1e-4
    with pytest.raises(ArchitectureError, match=r"edits\.1: .*down_proj.* edited by edits\.0"):
        make_plan(recipe_of(gate, keeping), Checkpoint.open(tiny_llama), ARCHS["llama"])
    make_plan(recipe_of(gate, keeping | {"layers": [0]}), *opened(tiny_llama)[:2])


def test_the_constant_of_a_norm_preserving_ablation_comes_behind_other_ablations(
    tmp_path: Path,
) -> None:
    """Gemma's lies behind a norm, and a gate at the writer may still follow."""
    write_tiny("gemma2", tmp_path / "base")
    base, arch, _ = opened(tmp_path / "base")
    both = {"op": "ablate", "layers": [1], "variant": ["norm-preserving", "affine"]}
    with pytest.raises(ArchitectureError, match=r"edits\.1: .*o_proj.*; name the ablate first"):
        make_plan(recipe_of(both, {"op": "ablate", "layers": [1]}), base, arch)
    gate = {"op": "gate", "layers": [1], "sites": ["attention"], "strength": 0.3}
    make_plan(recipe_of(both, gate), base, arch)

    write_tiny("llama", tmp_path / "llama")
    recipe = recipe_of(both, gate)
    assert lost_through_disk(tmp_path / "llama", recipe, tmp_path / "out")[0] < 1e-4


def test_the_fit_measures_the_mean_of_the_answered_class(tiny_llama: Path) -> None:
    """The projected direction is orthogonal to it, at the layer where both are measured."""
    recipe = recipe_of({"op": "ablate", "layers": [0, 1], "variant": "projected"})
    words = {"target": "w1", "general": "w2", "protected": "w1", "lookalike": "w3"}
    model, found = word_fit(tiny_llama, recipe, words)
    (ablation,) = found.interventions
    assert isinstance(ablation, Ablate)
    states = []
    for prompt in word_prompts("w2"):
        ids = torch.tensor([model.render(prompt.text)])
        with torch.inference_mode():
            states.append(model.model(ids, output_hidden_states=True).hidden_states[2][0, -1])
    mean = torch.stack(states).mean(0)
    assert abs(float(mean @ ablation.cuts[0].basis)) < 1e-4 * float(mean.norm())


@pytest.mark.parametrize(
    "variant",
    [
        *(["norm-preserving"], ["projected"], ["affine"]),
        *(["projected", "norm-preserving"], ["norm-preserving", "affine"]),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_written_within_its_rounding(
    tmp_path: Path, variant: list[str], dtype: torch.dtype
) -> None:
    write_tiny("llama", tmp_path / "base", dtype=dtype)
    recipe = recipe_of({**everywhere(3), "variant": variant, "strength": 0.8})
    base, arch, _ = opened(tmp_path / "base")
    baked(base, arch, recipe, tmp_path / "out")
    model, after = (
        LiveModel.load(tmp_path / name, arch, torch.float32) for name in ("base", "out")
    )
    before = model.logits(BATCH)
    with steered(model, interventions(base, arch, recipe)):
        hooked = model.logits(BATCH)
    assert effect_lost(before, hooked, after.logits(BATCH)) < 2e-2


@pytest.mark.parametrize("kind", [RemoveSubspace, RemoveKeepingNorms])
def test_an_ablation_of_the_gguf_is_that_of_the_checkpoint(tiny: Path, kind: type) -> None:
    """Converted after the edit or edited after the conversion: the same matrix."""
    base, arch, _ = opened(tiny)

    def converted(name: str, weight: Tensor) -> Tensor:
        turned = weight.mT if arch.is_transposed(name) else weight
        return arch.gguf_factor(name, base.config) * turned

    for one in (one for found in arch.written(base.tensors).values() for one in found):
        edit: Edit = kind(one.weight, orthonormal(drawn(3, 2, 32)), 0.75, one.writer.axis)
        moved = gguf_edit(edit, arch, base.config)
        assert moved.tensor == arch.gguf_name(one.weight)
        weight = base.read(one.weight)
        torch.testing.assert_close(
            moved.apply(converted(one.weight, weight)), converted(one.weight, edit.apply(weight))
        )
