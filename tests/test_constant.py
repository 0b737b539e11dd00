"""The constant of a ridge carrier: the text that the model draws, and what it is fitted on."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bake.activations import Conversation
from bake.arch import Arch
from bake.archs import find_arch
from bake.checkpoint import Checkpoint
from bake.errors import FitError
from bake.fit.constant import OWN_TEXTS, OWN_TOKENS, own_text
from bake.fit.conversations import PASSAGE_TOKENS
from bake.fit.readout import ReadoutClass, ridge_readout
from bake.fit.run import fit
from bake.hooks import on_output
from bake.model import Batch, LiveModel
from bake.ops.add import Add
from bake.plan import make_plan
from bake.prompts import Prompt, Splits
from tests.through_disk import recipe_of
from tests.tiny import write_tiny
from tests.word_fit import ByWord

JUDGE = ByWord(frozenset({"w1"}))
# What a checkpoint may ask of generation, all of which would bend the distribution.
BENT = {
    "do_sample": True,
    "temperature": 0.5,
    "top_k": 5,
    "top_p": 0.5,
    "min_p": 0.2,
    "typical_p": 0.5,
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2,
    "suppress_tokens": [7, 8],
    "eos_token_id": [2, 3],
    "max_length": 20,
}


def opened(folder: Path, **generation: object) -> tuple[LiveModel, Checkpoint, Arch]:
    write_tiny("mistral", folder)
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    base = Checkpoint.open(folder)
    arch = find_arch(base.config, "config.json")
    return LiveModel.load(folder, arch), base, arch


@pytest.mark.parametrize("generation", [{}, BENT], ids=["plain", "bent"])
def test_drawn_text_is_of_the_models_own_distribution(
    tmp_path: Path, generation: dict[str, object]
) -> None:
    """The drawn tokens' log-probability is on average minus the entropy, ends of turns included."""
    model, _, _ = opened(tmp_path, **generation)
    drawn = own_text(model)
    assert len(drawn) == OWN_TEXTS
    ids = torch.tensor([one.ids for one in drawn])
    assert ids.shape == (OWN_TEXTS, 1 + OWN_TOKENS)
    logits = model.logits(Batch(ids, torch.ones_like(ids), tuple(range(OWN_TEXTS))))
    logs = logits[:, :-1].log_softmax(-1)
    found = logs.gather(-1, ids[:, 1:, None]).squeeze(-1)
    surprise = found + (-(logs.exp() * logs).sum(-1))
    error = float(surprise.std()) / surprise.numel() ** 0.5
    assert abs(float(surprise.mean())) < 4 * error
    ends = (ids[:, 1:] == 2).float().mean(), logs.exp()[..., 2].mean()
    assert abs(float(ends[0] - ends[1])) < 0.01


def test_greedy_answers_are_the_models_own_too(tmp_path: Path) -> None:
    """A penalty in generation_config.json would give other answers than llama.cpp's."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "bent").mkdir()
    plain, bent = opened(tmp_path / "plain")[0], opened(tmp_path / "bent", **BENT)[0]
    prompts = [plain.render(f"w{number}") for number in range(20, 30)]
    assert bent.answer(prompts, 12) == plain.answer(prompts, 12)
    assert bent.end_tokens() == {2, 3}


def test_drawn_text_begins_with_words_and_is_the_same_every_time(tmp_path: Path) -> None:
    model, _, _ = opened(tmp_path)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first, again = own_text(model), own_text(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first == again
    starts = {one.ids[0] for one in first}
    assert not starts & set(model.tokenizer.all_special_ids)
    assert len(starts) > OWN_TEXTS / 3
    for one in first:
        assert one == Conversation(one.ids, OWN_TOKENS, tuple(range(OWN_TOKENS + 1)))


def test_the_constant_is_fitted_on_chats_texts_and_drawn_text_alike(tmp_path: Path) -> None:
    """Each class counts the same, whatever its number of tokens."""
    model, base, arch = opened(tmp_path)
    spec = {"op": "add", "layer": 1, "site": "mid", "strength": 1.0, "constant_error": 9.0}
    recipe = recipe_of(spec | {"carrier": "ridge"})
    words = {"target": "w1", "general": "w2", "protected": "w1", "lookalike": "w3"}
    prompts = {
        role: [Prompt(f"{word} w{n} w{n + 7}", str(n), "en") for n in range(20, 32)]
        for role, word in words.items()
    }
    passages = tuple(Prompt(f"w{n} w{n + 1} w{n + 2} " * 60, str(n), "en") for n in range(40, 46))
    texts = Splits(passages[:2], passages[2:4], passages[4:])
    plan = make_plan(recipe, base, arch)
    found = fit(model, base, plan, recipe, prompts, texts, JUDGE)
    (one,) = found.interventions
    assert isinstance(one, Add)

    def seen(conversations: list[tuple[int, ...]]) -> Tensor:
        """What the writer reads on every token, none of which is padding."""
        kept: list[Tensor] = []
        module = model.module(one.carried.tensor.removesuffix(".weight"))
        handle = on_output(module, lambda y, a: (kept.append(a), y)[1])
        for ids in conversations:
            model.logits(Batch(torch.tensor([ids]), torch.ones(1, len(ids)).long(), (0,)))
        handle.remove()
        return torch.cat([a.flatten(0, -2) for a in kept]).double()

    def answered(prompt: Prompt) -> tuple[int, ...]:
        start = model.render(prompt.text)
        tokens = max(recipe.fit.answers.tokens, recipe.fit.positions.answer)
        (answer,) = model.answer([start], tokens)
        return (*start, *answer[: recipe.fit.positions.answer])

    chats = [answered(prompt) for chosen in prompts.values() for prompt in chosen]
    shown = [
        tuple(model.tokenizer(text.text, add_special_tokens=False).input_ids[:PASSAGE_TOKENS])
        for text in texts.fit
    ]
    classes = [seen(chats), seen(shown), seen([one.ids for one in own_text(model)])]
    moments = [ReadoutClass(a.mean(0), a.T @ a / len(a), 1.0) for a in classes]
    wanted = ridge_readout(moments, 0.01)
    assert one.readout is not None
    torch.testing.assert_close(one.readout.double(), wanted, atol=1e-4, rtol=1e-3)
    (constant,) = found.constants.values()
    errors = [float((a @ wanted - 1).square().mean()) for a in classes]
    assert constant.fitted == pytest.approx((sum(errors) / 3) ** 0.5, rel=1e-3)
    held_out = seen(
        [
            tuple(model.tokenizer(text.text, add_special_tokens=False).input_ids[:PASSAGE_TOKENS])
            for text in texts.test
        ]
    )
    error = float((held_out @ wanted - 1).square().mean() ** 0.5)
    assert constant.held_out == pytest.approx(error, rel=1e-3)

    limited = recipe_of(spec | {"carrier": "ridge", "constant_error": 0.9 * error})
    with pytest.raises(FitError, match="from 1 on held-out text, constant_error allows"):
        fit(model, base, plan, limited, prompts, texts, JUDGE)
