"""Vectors and gates written in front of a norm: what reaches the stream, and what is refused."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from bake.activations import Conversation, Tap, collect
from bake.arch import Arch
from bake.archs import ARCHS
from bake.carriers.gain import read_gain
from bake.checkpoint import Checkpoint
from bake.edits import Edit
from bake.errors import ArchitectureError, FitError
from bake.fit.constant import with_constants
from bake.hooks import Intervention, on_output, steered
from bake.model import LiveModel
from bake.ops.add import Add
from bake.ops.gate import Gate
from bake.plan import make_plan
from bake.recipe import Recipe
from tests.through_disk import BATCH, baked, drawn, effect_lost, interventions, recipe_of
from tests.tiny import write_tiny
from tests.word_fit import word_fit

POST_NORMS = ("gemma2", "gemma3_text", "glm4", "olmo2", "olmo3")
CONVERSATIONS = [Conversation(tuple(ids.tolist()), 7, (7,)) for ids in BATCH.ids]


@dataclass(frozen=True, eq=False)
class Rescaled:
    """What a perfect constant promises: the norm's output o becomes (o + v) / rms((o + v) / g)."""

    norm: str
    vector: Tensor
    gain: Tensor

    def attach(self, model: LiveModel) -> Iterable[RemovableHandle]:
        def change(output: Tensor, _: object) -> Tensor:
            total = output + self.vector
            return total / (total / self.gain).square().mean(-1, keepdim=True).sqrt()

        yield on_output(model.module(self.norm), change)

    def edits(self) -> Sequence[Edit]:
        return ()


def added(site: str, strength: float = 0.2) -> Recipe:
    spec = {"op": "add", "layer": 1, "site": site, "strength": strength, "ridge": 1e-9}
    return recipe_of(spec | {"carrier": "ridge"})


def fitted(folder: Path, arch: Arch, recipe: Recipe) -> Add:
    """The addition with a constant that is exact on the batch: fewer tokens than dimensions."""
    (one,) = interventions(Checkpoint.open(folder), arch, recipe)
    model = LiveModel.load(folder, arch)
    (ready,), errors = with_constants(
        model, [(recipe.edits[0], one)], [CONVERSATIONS], CONVERSATIONS
    )
    assert isinstance(ready, Add)
    assert errors[ready.carried.tensor].held_out < 1e-3
    return ready


@pytest.mark.parametrize("site", ["mid", "out"])
@pytest.mark.parametrize("model_type", POST_NORMS)
def test_a_vector_in_front_of_a_norm_is_added_nearly_and_rescaled(
    tmp_path: Path, model_type: str, site: str
) -> None:
    folder = tmp_path / "base"
    write_tiny(model_type, folder)
    base, arch, recipe = Checkpoint.open(folder), ARCHS[model_type], added(site)
    (note,) = make_plan(recipe, base, arch).notes
    assert "rescales the sum, so the vector is added nearly" in note
    one = fitted(folder, arch, recipe)
    norm = one.carried.norm
    assert norm is not None
    model = LiveModel.load(folder, arch)
    before = model.logits(BATCH)
    with steered(model, [one]):
        hooked = model.logits(BATCH)
    with steered(model, [Rescaled(norm.module, one.vector, read_gain(base, norm))]):
        rescaled = model.logits(BATCH)
    after = baked(base, arch, recipe, tmp_path / "out", [one]).logits(BATCH)
    assert effect_lost(before, rescaled, after) < 2e-3
    assert 5e-3 < effect_lost(before, hooked, after) < 0.6

    offset = {branch.site: 1 - branch.norm_offset for branch in arch.branches}
    branches = (replace(branch, norm_offset=offset[branch.site]) for branch in arch.branches)
    wrong = replace(arch, branches=tuple(branches))
    other = replace(fitted(folder, wrong, recipe), vector=one.vector)
    after = baked(base, wrong, recipe, tmp_path / "wrong", [other]).logits(BATCH)
    assert effect_lost(before, rescaled, after) > 2e-2


def test_the_shorter_the_vector_the_nearer_it_is_added(tmp_path: Path) -> None:
    """What is lost falls with the vector's length, down to its part along the norm's output."""
    folder = tmp_path / "base"
    write_tiny("olmo2", folder)
    base, arch = Checkpoint.open(folder), ARCHS["olmo2"]
    model = LiveModel.load(folder, arch)
    before = model.logits(BATCH)
    lost = []
    for strength in (0.8, 0.4, 0.2):
        recipe = added("out", strength)
        one = fitted(folder, arch, recipe)
        with steered(model, [one]):
            hooked = model.logits(BATCH)
        after = baked(base, arch, recipe, tmp_path / str(strength), [one]).logits(BATCH)
        lost.append(effect_lost(before, hooked, after))
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] < 0.7 * lost[0]


@pytest.mark.parametrize("model_type", POST_NORMS)
def test_a_vector_longer_than_what_the_norm_writes_is_refused(
    tmp_path: Path, model_type: str
) -> None:
    """For a carrier and for a gate, however far it opens."""
    write_tiny(model_type, tmp_path)
    base, arch = Checkpoint.open(tmp_path), ARCHS[model_type]
    norm = arch.post_norm(1, arch.branches[0])
    assert norm is not None
    # Directions are drawn with an entry of 1 on average, so this is what the vector measures.
    longest = float((drawn(1, 32) / read_gain(base, norm)).square().mean() ** -0.5)
    gate = {"op": "gate", "layers": [1], "sites": ["attention"]}
    for spec in (
        {"op": "add", "layer": 1, "site": "mid", "carrier": "ridge"},
        gate,
    ):
        interventions(base, arch, recipe_of(spec | {"strength": -0.99 * longest}))
        with pytest.raises(FitError, match=rf"{norm.weight}: .* 1\.0 times .* lower the strength"):
            interventions(base, arch, recipe_of(spec | {"strength": -1.01 * longest}))
    # Spread over two writers, each part is half as long.
    both = gate | {"sites": ["attention", "mlp"], "strength": 1.01 * longest}
    interventions(base, arch, recipe_of(both))


@pytest.mark.parametrize("op", ["add", "gate"])
def test_a_channel_that_the_norm_closes_is_refused(tmp_path: Path, op: str) -> None:
    """Gemma's gain is 1 + weight, so that of a weight of -1 is zero."""
    write_tiny("gemma2", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.post_attention_layernorm.weight"][3] = -1.0
    save_file(tensors, file, {"format": "pt"})
    gate = recipe_of({"op": "gate", "layers": [1], "sites": ["attention"], "strength": 0.2})
    named = r"model\.layers\.1\.post_attention_layernorm\.weight: .* channel 3 through, so"
    with pytest.raises(ArchitectureError, match=named):
        recipe = added("mid") if op == "add" else gate
        interventions(Checkpoint.open(tmp_path), ARCHS["gemma2"], recipe)


@pytest.mark.parametrize("site", ["mid", "out"])
def test_an_ablation_in_front_of_the_norm_comes_before_the_addition(
    tmp_path: Path, site: str
) -> None:
    write_tiny("gemma2", tmp_path)
    base, arch = Checkpoint.open(tmp_path), ARCHS["gemma2"]
    ablate = {"op": "ablate", "layers": [1]}
    add = {"op": "add", "layer": 1, "site": site, "strength": 0.2}
    make_plan(recipe_of(ablate, add), base, arch)
    with pytest.raises(ArchitectureError, match="name the ablate first"):
        make_plan(recipe_of(add, ablate), base, arch)


def test_a_readout_in_front_of_a_norm_reads_shares_of_what_it_divides_by(tmp_path: Path) -> None:
    """Also where another edit changes what the norm reads, here an ablation of the branch."""
    write_tiny("gemma2", tmp_path)
    base, arch = Checkpoint.open(tmp_path), ARCHS["gemma2"]
    model = LiveModel.load(tmp_path, arch)
    writer, norm = (
        model.module(f"model.layers.1.{name}")
        for name in ("mlp.down_proj", "post_feedforward_layernorm")
    )
    tap = Tap(writer, "input", "decision", "second", norm)
    everywhere = [replace(one, decision=tuple(range(8))) for one in CONVERSATIONS]
    inputs: list[Tensor] = []
    read: list[Tensor] = []
    ablation = interventions(base, arch, recipe_of({"op": "ablate", "layers": [1]}))
    with steered(model, ablation):
        moments = collect(model, everywhere, {"a": tap})["a"]
        handles = [
            writer.register_forward_pre_hook(lambda _, seen: inputs.append(seen[0])),
            norm.register_forward_pre_hook(lambda _, seen: read.append(seen[0])),
        ]
        model.logits(BATCH)
        for handle in handles:
            handle.remove()
    a = (inputs[0] / read[0].square().mean(-1, keepdim=True).sqrt()).flatten(0, 1).double()
    torch.testing.assert_close(moments.mean, a.mean(0), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(moments.gram, a.T @ a / len(a), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("model_type", POST_NORMS)
def test_a_fitted_gate_opens_in_front_of_the_norm_by_shares(
    tmp_path: Path, model_type: str
) -> None:
    """The openings are of cᵀa / rms(y), and hook and weights are the same map."""
    folder = tmp_path / "base"
    write_tiny(model_type, folder)
    base, arch = Checkpoint.open(folder), ARCHS[model_type]
    gate = {"op": "gate", "layers": [1], "sites": ["mlp"], "strength": -0.5}
    recipe = recipe_of(gate)
    (note,) = make_plan(recipe, base, arch).notes
    assert "is rescaled with the rest by model.layers.1." in note
    model, found = word_fit(folder, recipe)
    (one,) = found.interventions
    assert isinstance(one, Gate)
    (openings,) = found.openings.values()
    assert max(openings, key=lambda role: openings[role]) == "target"

    norm = arch.post_norm(1, arch.branches[1])
    assert norm is not None
    inputs: list[Tensor] = []
    read: list[Tensor] = []
    handles = [
        model.module(one.module).register_forward_pre_hook(lambda _, a: inputs.append(a[0])),
        model.module(norm.module).register_forward_pre_hook(lambda _, y: read.append(y[0])),
    ]
    passage = torch.tensor([model.tokenizer("w40 w41 w42", add_special_tokens=False).input_ids])
    with torch.inference_mode():
        model.model(passage)
    for handle in handles:
        handle.remove()
    opened = (inputs[0] @ one.probe) / read[0].square().mean(-1).sqrt()
    assert abs(float(opened.mean()) - openings["text"]) < 1e-3

    before = model.logits(BATCH)
    gates: Sequence[Intervention] = found.interventions
    with steered(model, gates):
        hooked = model.logits(BATCH)
    after = baked(base, arch, recipe, tmp_path / "out", gates).logits(BATCH)
    assert effect_lost(before, hooked, after) < 1e-4
