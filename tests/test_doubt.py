"""Prompts that count in a gate's probe by how unsure the model is whether to refuse them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bake.activations import Tap
from bake.archs import ARCHS
from bake.errors import FitError, RecipeError
from bake.fit.conversations import conversations_of, passages
from bake.fit.doubt import LEAST, doubt, effective, lead, with_doubts
from bake.fit.labels import Labelled
from bake.fit.ordered import fit_in_order
from bake.model import LiveModel
from bake.prompts import Prompt
from bake.recipe import Fit, Recipe, load_recipe
from tests.test_ordered import CLASSES, RIDGE, WANTED, conversations, gates, inputs
from tests.through_disk import recipe_of
from tests.word_fit import WORDS, word_fit, word_prompts


def test_doubt_is_largest_where_both_are_as_likely() -> None:
    logits = torch.tensor([[2.0, 1.0, 2.0, 0.0], [0.0, 9.0, 3.0, 5.0], [5.0, 0.0, 1.0, 9.0]])
    leads = lead(logits, [0, 1])
    torch.testing.assert_close(leads, torch.tensor([0.0, 4.0, -4.0]))
    found = doubt(leads)
    assert found[0] == 0.25
    torch.testing.assert_close(found[1], found[2])
    # Sure beyond what float32 tells from 1, and still a weight.
    assert 0 < float(doubt(torch.tensor([60.0]))) < 1e-20


def test_what_weights_are_worth() -> None:
    assert effective(torch.tensor([0.2, 0.2, 0.2])) == pytest.approx(3)
    assert effective(torch.tensor([1.0, 1e-9, 1e-9])) == pytest.approx(1)


def doubting(**fit: object) -> Recipe:
    spec = {"op": "gate", "layers": [1], "strength": -1.0, "ridge": 1e-2, "protected": 1.0}
    return recipe_of(spec).model_copy(
        update={"fit": Fit.model_validate({"weights": "doubt", **fit})}
    )


def test_a_fit_weighs_the_classes_that_the_gate_steers(tiny_llama: Path) -> None:
    """The probe by hand: every token of a target's or protected prompt counts its doubt."""
    recipe = doubting()
    model, fitted = word_fit(tiny_llama, recipe)
    starts = {
        role: [tuple(model.render(one.text)) for one in word_prompts(word)]
        for role, word in WORDS.items()
    }
    answers = {role: model.answer(each, recipe.fit.answers.tokens) for role, each in starts.items()}
    opened = {role: [one[0] for one in each] for role, each in answers.items()}
    refused = opened["target"] + opened["protected"]
    others = opened["general"] + opened["lookalike"]
    openings = [
        token
        for token in sorted(set(refused))
        if refused.count(token) / len(refused) > others.count(token) / len(others)
    ]
    module = "model.layers.1.mlp.down_proj"
    gram, total = torch.zeros(()).double(), torch.zeros(()).double()
    values = {"target": 1.0, "protected": -1.0}
    for role, each in {**starts, "text": [None]}.items():
        rows: list[Tensor] = []
        weights: list[float] = []
        for place, start in enumerate(each):
            if start is None:
                (ids,) = (one.ids for one in passages(model, [Prompt("w40 w41 w42", "text", "en")]))
                first, weight = 0, 1.0
            else:
                ids = (*start, *answers[role][place][:10])
                first, weight = max(0, len(start) - 6), 1.0
                with torch.inference_mode():
                    logits = model.model(torch.tensor([start])).logits[:, -1]
                if role in values:
                    weight = float(doubt(lead(logits, openings)))
            seen: list[Tensor] = []
            handle = model.module(module).register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0][0])
            )
            with torch.inference_mode():
                model.model(torch.tensor([ids]))
            handle.remove()
            rows.append(seen[0][first:].double())
            weights += [weight] * (len(ids) - first)
        samples, weighed = torch.cat(rows), torch.tensor(weights).double()
        weighed = weighed / weighed.sum()
        gram = gram + (samples * weighed[:, None]).T @ samples
        total = total + values.get(role, 0.0) * weighed @ samples
    size = 1e-2 * gram.diagonal().mean()
    wanted = torch.linalg.solve(gram + size * torch.eye(len(gram)).double(), total)
    found = fitted.kept[f"edits.0.probe.{module}"].double()
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3)
    even = word_fit(tiny_llama, doubting(weights="even"))[1].kept[f"edits.0.probe.{module}"]
    assert (even - found).norm() > 0.01 * found.norm()


def test_gates_in_order_weigh_too(tiny_llama: Path) -> None:
    model = LiveModel.load(tiny_llama, ARCHS["llama"])
    planned = gates(model, [2])[:1]
    module = planned[0][1].module
    taps = {module: Tap(model.module(module), "input", "decision", "second")}
    doubts = {"target": (0.25, 0.01, 0.1), "protected": (0.2, 0.05)}
    classes = {
        role: [
            replace(one, doubt=weight)
            for one, weight in zip(conversations(role), doubts.get(role, (1.0, 1.0)), strict=True)
        ]
        for role in CLASSES
    }
    found = fit_in_order(model, planned, taps, classes, WANTED, RIDGE)[module].probe
    gram, total = torch.zeros(()).double(), torch.zeros(()).double()
    for role, each in classes.items():
        a = inputs(model, module, [])[role]
        weights = torch.tensor([one.doubt for one in each for _ in one.decision]).double()
        weights = weights / weights.sum()
        gram = gram + (a * weights[:, None]).T @ a
        total = total + WANTED.get(role, 0.0) * weights @ a
    size = RIDGE * gram.diagonal().mean()
    wanted = torch.linalg.solve(gram + size * torch.eye(len(gram)).double(), total)
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3)


def labels(model: LiveModel, first: int, other: int) -> dict[str, list[Labelled]]:
    """Target prompts that are refused with one token, and general ones answered with another."""
    return {
        role: [
            Labelled(one, tuple(model.render(one.text)), (token,), sign, ())
            for one in word_prompts(WORDS[role])
        ]
        for role, token, sign in (("target", first, 1.0), ("general", other, -1.0))
    }


def test_refusals_without_an_opening_and_classes_without_doubt(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LiveModel.load(tiny_llama, ARCHS["llama"])

    def weighed(first: int, other: int) -> None:
        found = labels(model, first, other)
        shown = {role: conversations_of(doubting(), role, each) for role, each in found.items()}
        with_doubts(model, shown, found, ["target"])

    with pytest.raises(FitError, match=r"fit\.weights: doubt: no token opens more"):
        weighed(5, 5)
    monkeypatch.setattr("bake.fit.doubt.effective", lambda _: LEAST - 0.5)
    with pytest.raises(FitError, match=r"prompts\.target: the model is so sure of most of 12"):
        weighed(5, 6)


def test_a_block_gate_does_not_weigh(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "model: demo\nfit: {weights: doubt}\nevaluate: {runtimes: [transformers]}\n"
        "edits: [{op: gate, form: block, layers: [3], strength: -1}]\n"
    )
    with pytest.raises(RecipeError, match=r"2:\d+: fit\.weights: is of rank-one gates"):
        load_recipe(str(path))
