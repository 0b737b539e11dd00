"""Sampled answers, their likelihood, and the labels that come of them."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bake.archs import ARCHS
from bake.fit.labels import labelled, recorded
from bake.judge import ANSWERED, REFUSED, UNREAD, Exchange, Verdict
from bake.judge.confidence import bucket, refusal_confidence
from bake.model import LiveModel
from bake.prompts import Prompt
from bake.recipe import Recipe
from bake.sampling import sampled_answers

PROMPTS = [[1, 3, 40, 2], [1, 3, 50, 51, 52, 2], [1, 3, 60, 61, 2]]


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> LiveModel:
    return LiveModel.load(tiny_llama, ARCHS["llama"])


def test_log_probabilities_are_those_of_a_plain_forward_pass(model: LiveModel) -> None:
    """Whatever the temperature that the answers were drawn at, and with the end-of-turn token."""
    answers = sampled_answers(
        model, PROMPTS, samples=30, tokens=12, temperature=0.7, seed=3, batch_size=2
    )
    assert [len(one) for one in answers] == [30, 30, 30]
    ended = 0
    for prompt, several in zip(PROMPTS, answers, strict=True):
        for one in several:
            cut = len(one.log_probabilities) == len(one.ids)
            ended += not cut
            ids = [*prompt, *one.ids] + ([] if cut else [2])
            with torch.inference_mode():
                logs = torch.log_softmax(model.model(torch.tensor([ids])).logits[0], -1)
            wanted = [float(logs[place - 1, ids[place]]) for place in range(len(prompt), len(ids))]
            assert one.log_probabilities == pytest.approx(wanted, abs=1e-3)
            assert 2 not in one.ids
    assert ended


def test_the_seed_decides_and_the_callers_random_numbers_are_left_alone(model: LiveModel) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    options = {"samples": 3, "tokens": 6, "temperature": 1.0}
    first = sampled_answers(model, PROMPTS, seed=1, **options)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(9)
    assert sampled_answers(model, PROMPTS, seed=1, **options) == first
    assert sampled_answers(model, PROMPTS, seed=2, **options) != first
    assert len({one.ids for one in first[0]}) > 1


def test_answers_are_drawn_from_the_whole_tempered_distribution(model: LiveModel) -> None:
    answers = sampled_answers(model, PROMPTS[:1], samples=4000, tokens=1, temperature=2.0, seed=0)[
        0
    ]
    with torch.inference_mode():
        logits = model.model(torch.tensor(PROMPTS[:1])).logits[0, -1]
    wanted = torch.softmax(logits / 2.0, -1)
    drawn = torch.zeros(96)
    for one in answers:
        drawn[one.ids[0] if one.ids else 2] += 1 / len(answers)
    assert float((drawn - wanted).abs().max()) < 0.03
    # Unlikely tokens too: a cut at the 50 likeliest would leave them out.
    assert int((drawn > 0).sum()) > 60


class Scripted:
    """A judge that gives the verdicts of its list in turn."""

    name = "scripted"

    def __init__(self, labels: Sequence[int]) -> None:
        self.labels = list(labels)
        self.seen: list[Exchange] = []

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        self.seen += exchanges
        kinds = {1: "lecture", 0: "no verdict", -1: ""}
        return [
            Verdict(label, kinds[label])  # type: ignore[arg-type]
            for label in (self.labels.pop(0) for _ in exchanges)
        ]


def recipe(**answers: object) -> Recipe:
    edit = {"op": "ablate", "layers": [1]}
    return Recipe.model_validate(
        {"name": "x", "edits": [edit], "fit": {"answers": answers}, "seed": 7,
         "evaluate": {"runtimes": ["transformers"]}}
    )  # fmt: skip


def of(text: str) -> Prompt:
    return Prompt(text, text, "en")


def test_one_answer_is_greedy_and_certain(model: LiveModel) -> None:
    prompts = [of("w1 w2"), of("w3"), of("w4 w5 w6")]
    found = labelled(model, recipe(), prompts, Scripted([REFUSED, ANSWERED, UNREAD]))
    assert [one.confidence for one in found] == [1.0, -1.0, 0.0]
    assert [one.side for one in found] == [1, -1, 0]
    greedy = model.answer([model.render(one.text) for one in prompts], 16)
    assert [list(one.answer) for one in found] == greedy
    record = recorded(found)
    assert (record.prompts, record.refused, record.neutral, record.unread) == (3, 1, 1, 1)
    assert record.categories == {"lecture": 1}


def test_several_answers_are_weighed_by_their_likelihood(model: LiveModel) -> None:
    labels = [REFUSED, ANSWERED, REFUSED, UNREAD]
    judge = Scripted(labels)
    (found,) = labelled(model, recipe(samples=4, tokens=12), [of("w1 w2")], judge)
    start = model.render("w1 w2")
    (answers,) = sampled_answers(model, [start], samples=4, tokens=12, temperature=1.0, seed=7)
    assert [one.answer for one in judge.seen] == [model.text(one.ids) for one in answers]
    logs = [one.mean_log_probability() for one in answers]
    assert found.confidence == pytest.approx(refusal_confidence(labels, logs))
    # It stands for its class by the likeliest answer that agrees with the confidence.
    side = bucket(found.confidence)
    agreeing = [place for place, label in enumerate(labels) if label == side]
    best = max(agreeing, key=lambda place: logs[place])
    assert found.answer == answers[best].ids


def test_prompts_between_the_buckets_are_of_no_side(model: LiveModel) -> None:
    labels = [REFUSED, ANSWERED] * 2
    judge = Scripted(labels)
    low = recipe(samples=4, temperature=1e-3)  # nearly the same answer four times
    (found,) = labelled(model, low, [of("w9")], judge)
    assert abs(found.confidence) <= 0.1
    assert found.side == 0
    assert recorded([found]).neutral == 1


def test_only_the_answer_behind_the_thinking_is_judged_and_weighed(model: LiveModel) -> None:
    """The tiny model's own words serve as marks: whatever it says first is its thinking."""
    start = model.render("w1 w2")
    (answers,) = sampled_answers(model, [start], samples=1, tokens=12, temperature=1.0, seed=7)
    words = model.text(answers[0].ids).split()
    mark = next(word for word in words[2:-2] if words.count(word) == 1)
    thinking = {"begin": "never", "end": mark}
    choice = recipe(samples=2, tokens=12)
    choice = choice.model_copy(
        update={"judge": choice.judge.model_validate({"thinking": thinking})}
    )
    judge = Scripted([REFUSED, ANSWERED])
    (found,) = labelled(model, choice, [of("w1 w2")], judge)
    (pair,) = sampled_answers(model, [start], samples=2, tokens=12, temperature=1.0, seed=7)
    logs = []
    for one in pair:
        said = model.text(one.ids).split()
        first = max((place + 1 for place, word in enumerate(said) if word == mark), default=0)
        logs.append(one.mean_log_probability(first))
    assert found.confidence == pytest.approx(refusal_confidence([1, -1], logs))


@given(st.floats(-1, 1))
def test_buckets_are_odd_and_meet_at_a_tenth(confidence: float) -> None:
    assert bucket(confidence) == -bucket(-confidence)
    assert (bucket(confidence) == 0) == (abs(confidence) <= 0.1)
