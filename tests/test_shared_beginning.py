"""What all prompts begin with is read once: answers and statistics stay what they were."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bake.activations import Conversation, Moments, Tap, collect
from bake.archs import ARCHS
from bake.model import NO_PREFIX, LiveModel, Prefix
from bake.tokens import shared_beginning
from tests.tiny import write_tiny

BEGINNING = (1, 9, 8, 7, 6, 5)
PROMPTS = [[*BEGINNING, *rest] for rest in ((11, 12), (13,), (14, 15, 16, 17, 18), (19, 20, 21))]


@given(st.lists(st.lists(st.integers(0, 2), max_size=4), min_size=1, max_size=4))
def test_it_is_the_longest_that_all_have(sequences: list[list[int]]) -> None:
    shared = shared_beginning(sequences)
    assert all(tuple(each[: len(shared)]) == shared for each in sequences)
    longer = {tuple(each[: len(shared) + 1]) for each in sequences}
    assert len(longer) > 1 or any(len(each) == len(shared) for each in sequences)


def alone(model: LiveModel, monkeypatch: pytest.MonkeyPatch) -> LiveModel:
    def none(_: LiveModel, __: Sequence[Sequence[int]], ___: int) -> Prefix:
        return NO_PREFIX

    monkeypatch.setattr(LiveModel, "prefix", none)
    return model


def statistics(model: LiveModel) -> dict[str, Moments]:
    conversations = [
        Conversation(tuple(ids), len(ids) - 1, tuple(range(len(BEGINNING) - 1, len(ids))), weight)
        for ids, weight in zip(PROMPTS, (1.0, 2.0, 3.0, 4.0), strict=True)
    ]
    last = max(model.arch.layer_count(model.model.config.to_dict()) - 1, 0)
    taps = {
        "last": Tap(model.block(last), "output", "last"),
        "decision": Tap(model.block(last), "input", "decision", "second"),
    }
    return collect(model, conversations, taps, batch_size=3)


def test_answers_and_statistics_are_those_without_it(
    tiny: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_type = request.node.callspec.params["tiny"]
    model = LiveModel.load(tiny, ARCHS[model_type], torch.float32)
    answers, found = model.answer(PROMPTS, 4, batch_size=3), statistics(model)
    alone(model, monkeypatch)
    assert model.answer(PROMPTS, 4, batch_size=3) == answers
    for name, moments in statistics(model).items():
        torch.testing.assert_close(found[name].mean, moments.mean, rtol=1e-4, atol=1e-5)
        assert found[name].weight == moments.weight


def test_a_plain_cache_is_shared_and_a_window_is_not(tiny_llama: Path, tmp_path: Path) -> None:
    model = LiveModel.load(tiny_llama, ARCHS["llama"])
    assert model.prefix(PROMPTS, 60).ids == BEGINNING
    assert model.prefix(PROMPTS, 3).ids == BEGINNING[:3]
    assert model.prefix(PROMPTS[:1], 60) is NO_PREFIX
    assert model.prefix([*PROMPTS, [2, 3]], 60) is NO_PREFIX
    write_tiny("mistral", tmp_path, sliding_window=4)
    assert LiveModel.load(tmp_path, ARCHS["mistral"]).prefix(PROMPTS, 60) is NO_PREFIX


def test_the_beginning_runs_once(tiny_llama: Path) -> None:
    """The blocks see it one time, however many batches there are."""
    model = LiveModel.load(tiny_llama, ARCHS["llama"])
    seen = 0

    def count(_: object, inputs: tuple[torch.Tensor, ...], __: object) -> None:
        nonlocal seen
        seen += inputs[0].shape[0] * inputs[0].shape[1]

    handle = model.block(0).register_forward_hook(count)
    model.answer(PROMPTS, 1, batch_size=1)
    handle.remove()
    assert seen == len(BEGINNING) + sum(len(ids) - len(BEGINNING) for ids in PROMPTS)
