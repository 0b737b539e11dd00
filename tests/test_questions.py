"""Gates that are shut at a question's own tokens too."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bake.activations import Conversation
from bake.fit.questions import questions
from bake.model import LiveModel
from bake.recipe import Fit, Recipe
from bake.tokens import shared_beginning
from tests.through_disk import recipe_of
from tests.word_fit import WORDS, word_fit, word_prompts

RIDGE = 1e-3
MODULE = "model.layers.1.mlp.down_proj"


def test_what_stands_in_front_is_a_class_of_its_own() -> None:
    chats = {
        "target": [Conversation((1, 2, 3, 4, 9, 8), 4, (4, 5)), Conversation((1, 2, 9), 2, (2,))],
        "general": [Conversation((1, 2, 5, 9), 3, (3,), doubt=0.1)],
    }
    assert questions(chats) == {
        "question, target": [Conversation((1, 2, 3, 4), 3, (2, 3), 0.0)],
        "question, general": [Conversation((1, 2, 5), 2, (2,), 0.0)],
        "beginning": [Conversation((1, 2), 1, (0, 1), 0.0)],
    }
    # Where gates decide at every token, there is nothing in front.
    assert questions({"target": [Conversation((1, 2), 1, (0, 1))]}) == {}


def asked(question: str, **spec: object) -> Recipe:
    gate = {"op": "gate", "layers": [1], "strength": -1.0, "ridge": RIDGE, **spec}
    positions = {"template": 1, "answer": 0, "question": question}
    return recipe_of(gate).model_copy(update={"fit": Fit.model_validate({"positions": positions})})


def test_a_fit_shuts_gates_at_the_questions(tiny_llama: Path) -> None:
    """The probe by hand: 1 at the target's last tokens, 0 at all others and in front of them."""
    model, fitted = word_fit(tiny_llama, asked("shut"))
    starts = {
        role: [model.render(one.text) for one in word_prompts(word)] for role, word in WORDS.items()
    }
    begun = len(shared_beginning([one for each in starts.values() for one in each]))
    assert 0 < begun < min(len(one) - 1 for each in starts.values() for one in each)
    read = {role: [inputs(model, ids) for ids in each] for role, each in starts.items()}
    classes = {role: torch.stack([one[-1] for one in each]) for role, each in read.items()}
    for role, each in read.items():
        classes[f"question, {role}"] = torch.cat([one[begun:-1] for one in each])
    classes["beginning"] = read["target"][0][:begun]
    classes["text"] = inputs(model, model.tokens("w40 w41 w42"))
    gram = torch.stack([one.T @ one / len(one) for one in classes.values()]).sum(0)
    size = RIDGE * gram.diagonal().mean()
    wanted = torch.linalg.solve(
        gram + size * torch.eye(len(gram)).double(), classes["target"].mean(0)
    )
    found = fitted.kept[f"edits.0.probe.{MODULE}"].double()
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
    openings = fitted.openings[f"edits.0.{MODULE}"]
    assert openings.keys() == classes.keys()
    for role, one in classes.items():
        assert openings[role] == pytest.approx(float((one @ wanted).mean()), abs=1e-4)
    free = word_fit(tiny_llama, asked("free"))[1].kept[f"edits.0.probe.{MODULE}"].double()
    for role in WORDS:
        asides = classes[f"question, {role}"]
        assert (asides @ found).square().mean() < 0.5 * (asides @ free).square().mean()


def test_gates_in_order_are_shut_there_too(tiny_llama: Path) -> None:
    _, fitted = word_fit(tiny_llama, asked("shut", ordered=True))
    asides = {f"question, {role}" for role in WORDS}
    for openings in fitted.openings.values():
        assert openings.keys() == {*WORDS, *asides, "beginning", "text"}


def inputs(model: LiveModel, ids: Sequence[int]) -> Tensor:
    """What the gated writer reads at each token."""
    seen: list[Tensor] = []
    handle = model.module(MODULE).register_forward_pre_hook(lambda _, a: seen.append(a[0][0]))
    with torch.inference_mode():
        model.model(torch.tensor([list(ids)]))
    handle.remove()
    return seen[0].double()
