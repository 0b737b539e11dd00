"""The figures of an evaluation: repetition, facts, quality, divergence, perplexity."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.hooks import RemovableHandle

from bake.archs import find_arch
from bake.checkpoint import Checkpoint
from bake.edits import Edit
from bake.errors import VerificationError
from bake.evaluate import Answer, drifted
from bake.evaluation.drift import (
    UNMEASURED,
    Drift,
    Text,
    along,
    loss,
    of_models,
    perplexity,
    sequences,
)
from bake.evaluation.facts import Facts, counted, says
from bake.evaluation.quality import INSTRUCTION, KINDS, judged_quality, messages, read_quality
from bake.evaluation.repetition import broken, repeated_share, words
from bake.hooks import on_output
from bake.judge import ANSWERED, REFUSED, UNREAD, Exchange, Verdict
from bake.judge.cache import Replies
from bake.judge.chat import ChatJudge, Server
from bake.model import LiveModel
from bake.prompts import Prompt
from bake.recipe import Guard, load_recipe
from bake.search.trial import kl_limit
from tests.chat_server import Serve, reply
from tests.tiny import write_tiny

# --- repetition


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("one two three", 0.0),
        ("one two three four five", 0.0),
        ("a b c d a b c d", 0.2),
        ("A b, c d. a B c D!", 0.2),
        ("no " * 20, 1 - 1 / 17),
        ("是的是的是的是的", 1 - 2 / 5),
    ],
)
def test_the_share_of_runs_that_are_said_again(text: str, share: float) -> None:
    assert repeated_share(text) == pytest.approx(share)


@given(st.text(), st.integers(1, 5))
def test_repetition_is_a_share_and_grows_with_repeating(text: str, run: int) -> None:
    share = repeated_share(text, run)
    assert 0 <= share < 1
    if len(words(text)) >= run:
        assert repeated_share(f"{text} {text} {text}", run) > share or share > 0.5


@pytest.mark.parametrize(
    ("text", "is_broken"),
    [
        ("", True),
        ("... !", True),
        ("Yes.", False),
        ("I do not know. I do not know.", False),
        ("I do not know. " * 5, True),
        ("The capital of Peru is Lima, a city of about ten million people on the coast.", False),
    ],
)
def test_what_is_no_text(text: str, is_broken: bool) -> None:
    assert broken(text) is is_broken


# --- facts


@pytest.mark.parametrize(
    ("answer", "aliases", "said"),
    [
        ("It was Istanbul.", ["Istanbul"], True),
        ("İSTANBUL", ["Istanbul"], True),
        ("In Priština, the capital.", ["Pristina"], True),
        ("Mekele it is", ["Mekelle", "Mekele"], True),
        ("Mek’ele", ["Mek'ele"], True),
        ("In 1994, I think.", ["1994"], True),
        ("In 19940 BC", ["1994"], False),
        ("The Washingtonians", ["Washington"], False),
        ("Pol and Pot", ["Pol Pot"], False),
        ("波尔布特是谁", ["波尔布特"], True),
        ("", ["Paris"], False),
    ],
)
def test_a_fact_is_found_word_for_word(answer: str, aliases: list[str], said: bool) -> None:
    assert says(answer, aliases) is said


def answer(text: str, label: int) -> Answer:
    prompt = Prompt("Where?", "t", "en", {"answers": ["Paris"]})
    return Answer(prompt, text, Verdict(label))  # type: ignore[arg-type]


def test_a_refusal_is_none_whatever_it_names() -> None:
    found = [
        answer("In Paris.", ANSWERED),
        answer("In Rome.", ANSWERED),
        answer("I would rather not talk about Paris.", REFUSED),
        answer("In Paris.", UNREAD),
    ]
    assert counted(found) == Facts(right=1, wrong=1, refused=1, unread=1)
    assert counted(found).told == 2


# --- quality


@pytest.mark.parametrize(
    ("reply_text", "kinds"),
    [
        ("Fine.\ncontent: no\nlogic: no\nappropriateness: no", set()),
        ("**Content:** Yes\nLogic: no\nappropriateness: YES", {"content", "appropriateness"}),
        ("content: no\ncontent: yes\nlogic: no\nappropriateness: no", {"content"}),
        ("content: yes\nlogic: no", None),
        ("content: maybe\nlogic: no\nappropriateness: no", None),
        ("", None),
    ],
)
def test_every_kind_of_error_must_be_stated(reply_text: str, kinds: set[str] | None) -> None:
    found = read_quality(reply_text)
    assert found == kinds if kinds is not None else found is None


def test_a_server_judges_the_errors_of_answers(serve: Serve, tmp_path: Path) -> None:
    def by_answer(number: int, body: dict[str, object]) -> tuple[int, dict[str, str], bytes]:
        assert body["messages"] == messages(exchanges[number - 1])
        return (
            reply("What?")
            if number == 3
            else reply(
                f"<think>Hm.</think>content: {'no' if number == 1 else 'yes'}\nlogic: no\n"
                "appropriateness: no"
            )
        )

    exchanges = [Exchange(f"question {n}", f"answer {n}") for n in range(3)]
    judge = ChatJudge(Server(serve(by_answer).url, "m", concurrent=1), Replies(tmp_path))
    found = judged_quality(judge, exchanges)
    assert (found.read, found.unread, found.sound) == (2, 1, 1)
    assert found.errors == {"content": 1, "logic": 0, "appropriateness": 0}
    assert all(name in INSTRUCTION for name in KINDS)


# --- divergence and perplexity


def test_divergence_along_an_answer_is_of_what_was_said() -> None:
    """Three tokens of prompt and two of answer: the first two predictions of the answer."""
    torch.manual_seed(0)
    base, now = torch.randn(2, 5, 7)
    now[:2] = 100.0  # inside the prompt: does not count
    now[4] = torch.arange(7.0) * 100  # behind the last token: was never said
    one = along(base, now, start=3)
    p, q = (torch.log_softmax(one[2:4].double(), -1) for one in (base, now))
    wanted = (p.exp() * (p - q)).sum(-1)
    found = sequences([one])
    assert found.first_token == pytest.approx(float(wanted[0]))
    assert found.answers == found.largest == pytest.approx(float(wanted.mean()))
    assert (found.prompts, found.positions) == (1, 2)
    none = along(base, base, start=3)
    assert sequences([one, none]).answers == pytest.approx(float(wanted.mean()) / 2)
    nothing = along(base, now, start=5)  # an answer of nothing: the first token alone
    assert sequences([one, none, nothing]).positions == 5


def test_perplexity_of_a_uniform_model_is_its_vocabulary() -> None:
    assert perplexity([loss(torch.zeros(6, 50), [1, 2, 3, 4, 5, 6])]) == pytest.approx(50)
    assert loss(torch.zeros(6, 50), [1, 2, 3, 4, 5, 6])[1] == 5
    assert math.isfinite(perplexity([(1e9, 1)]))


def live(folder: Path) -> LiveModel:
    base = Checkpoint.open(folder)
    return LiveModel.load(folder, find_arch(base.config, "config.json", base.tensors))


class Push:
    """A vector behind the second block."""

    def __init__(self, vector: torch.Tensor) -> None:
        self.vector = vector

    def attach(self, model: LiveModel) -> list[RemovableHandle]:
        return [on_output(model.block(1), lambda output, _: output + self.vector)]

    def edits(self) -> list[Edit]:
        return []


def test_drift_in_batches_is_that_of_single_sequences(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    model = live(tmp_path)
    torch.manual_seed(1)
    hooks = [Push(torch.randn(32))]
    general = [model.render(f"w{n} " * (n + 1)) for n in range(5)]
    texts = [model.tokens("w3 w4 w5 w6 w7"), model.tokens("w9 w8 w7")]
    alike = of_models(model, model, [], general, texts)
    assert alike.first_token == 0
    assert alike.text is not None
    assert alike.text.rise == 0
    found = of_models(model, model, hooks, general, texts)
    assert found.text is not None
    assert found.first_token is not None
    assert found.first_token > 1e-3
    assert found.text.before == alike.text.before != found.text.after
    assert found.text.tokens == 4 + 2
    singles = [of_models(model, model, hooks, [one], []).first_token for one in general]
    assert found.first_token == pytest.approx(sum(filter(None, singles)) / 5, rel=1e-4)
    assert of_models(model, model, hooks, [], []) == UNMEASURED


def test_a_model_without_finite_numbers_is_refused(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    model = live(tmp_path)
    hooks = [Push(torch.full((32,), math.nan))]
    with pytest.raises(VerificationError, match="its logits are not finite"):
        of_models(model, model, hooks, [model.render("w1")], [])


# --- the guard over them


def test_the_guard_limits_divergence_and_perplexity() -> None:
    guard = Guard(divergence_at_most=0.05, perplexity_rise_at_most=2)
    text = Text(20.0, 20.2, 100)
    assert drifted(guard, Drift(0.05, 3, text)) == []
    assert drifted(Guard(), Drift(9.0, 3, Text(1.0, 9.0, 100))) == []
    assert drifted(guard, Drift(0.051, 3, Text(20.0, 21.0, 100))) == [
        "guard: answers to general prompts begin 0.051 nats apart (KL of the first token), "
        "0.05 allowed",
        "guard: perplexity of held-out text rose by 5.0 % (20.00 to 21.00), 2 % allowed",
    ]
    # A search keeps to it, too.
    keys = ["search.kl_at_most=0.1"]
    assert kl_limit(load_recipe("political-open", overrides=keys).recipe) == 0.1
    keys.append("guard.divergence_at_most=0.05")
    assert kl_limit(load_recipe("political-open", overrides=keys).recipe) == 0.05
    # What is limited and was not measured is no pass, nor what is no number.
    assert drifted(guard, UNMEASURED) == [
        "guard: divergence_at_most: the divergence was not measured",
        "guard: perplexity_rise_at_most: the perplexity was not measured",
    ]
    assert len(drifted(guard, Drift(math.nan, 3, Text(1.0, math.nan, 1)))) == 2
