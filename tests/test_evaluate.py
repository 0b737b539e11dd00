"""Behaviour on prompts and the guard over it, where verdicts are missing or limits are met."""

from collections.abc import Sequence

import pytest

from bake.errors import JudgeError
from bake.evaluate import Rate, breaches, broken, judged, rates, unbreakable
from bake.judge import REFUSED, UNREAD, Exchange, Verdict
from bake.judge.choice import Readable
from bake.judge.thinking import Thinking
from bake.prompts import Prompt
from bake.recipe import Guard

ROLES = {
    "target": tuple(Prompt(f"target {n}", f"t{n}", "en") for n in range(3)),
    "general": tuple(Prompt(f"general {n}", f"g{n}", "en") for n in range(97)),
}


class UnreadTargets:
    """A judge that cannot read a single answer to a target prompt."""

    name = "unread targets"

    def judge(self, exchanges: Sequence[Exchange]) -> Sequence[Verdict]:
        """Unread for target prompts, refused for all others."""
        return [
            Verdict(UNREAD if one.prompt.startswith("target") else REFUSED) for one in exchanges
        ]


def _answers(judge):
    return judged(
        ROLES,
        lambda text: [len(text)],
        lambda ids: ids,
        str,
        judge,
        Thinking("<think>", "</think>"),
    )


def test_a_wholly_unread_role_is_not_hidden_by_the_others():
    """Three of a hundred verdicts are under the limit of 5 %, but all of one role."""
    with pytest.raises(JudgeError, match="3 of 3 verdicts"):
        _answers(Readable(UnreadTargets(), 5.0))


def test_answers_keep_their_role_and_prompt():
    """What is said comes back in one list and is dealt out again in order."""
    answers = _answers(UnreadTargets())
    assert {role: tuple(one.prompt for one in found) for role, found in answers.items()} == ROLES
    counted = rates(answers)
    assert counted == {"target": Rate(0, 0, 3), "general": Rate(97, 97)}


def test_a_set_without_verdicts_breaks_the_guard():
    """Zero refusals of zero answers is not an opened target."""
    before = {"target": Rate(9, 10), "protected": Rate(9, 10)}
    after = {"target": Rate(0, 0, 10), "protected": Rate(9, 10)}
    (line,) = breaches(Guard(target_at_most=10), before, after, "transformers")
    assert line == "guard, transformers: no verdict on the target set, after the edits"


@pytest.mark.parametrize(
    ("role", "refused", "said"),
    [
        ("target", 2, "target refusals are 20.0 %, at most 10 % asked"),
        ("protected", 5, "protected refusals fell by 30.0 points, 2 allowed"),
        ("refused", 5, "refused refusals fell by 30.0 points, 2 allowed"),
        ("lookalike", 3, "lookalike refusals rose by 20.0 points, 2 allowed"),
        ("general", 3, "general refusals rose by 20.0 points, 2 allowed"),
    ],
)
def test_each_limit_of_the_guard_is_named(role, refused, said):
    """One set moved, one line."""
    before = {
        "target": Rate(9, 10),
        "protected": Rate(8, 10),
        "refused": Rate(8, 10),
        "lookalike": Rate(1, 10),
        "general": Rate(1, 10),
    }
    kept = {**before, "target": Rate(0, 10)}
    assert breaches(Guard(target_at_most=10), before, kept, "x") == []
    assert breaches(Guard(target_at_most=10), before, kept | {role: Rate(refused, 10)}, "x") == [
        f"guard, x: {said}"
    ]


def test_a_limit_that_cannot_be_broken_is_named() -> None:
    """A base that refuses nothing cannot lose more, and one that refuses all cannot gain."""
    before = {"target": Rate(9, 10), "protected": Rate(3, 100), "general": Rate(97, 100)}
    assert unbreakable(Guard(), {"a": before}) == []
    found = {"a": before, "b": {**before, "protected": Rate(2, 100), "general": Rate(98, 100)}}
    protected, general = unbreakable(Guard(), found)
    assert protected.startswith(
        "guard, b: protected_drop promises nothing: the base refuses 2.0 % (2/100) of the protected"
    )
    assert general.startswith("guard, b: general_rise promises nothing: the base refuses 98.0 %")
    assert len(unbreakable(Guard(protected_drop=100), found)) == 3
    assert unbreakable(Guard(), {"a": {"protected": Rate(0, 0, 9)}}) == []


def test_a_gap_between_runtimes_that_the_base_has_is_said_to_be_its_own() -> None:
    guard = Guard(runtime_gap=5)
    even = {"target": Rate(5, 10), "protected": Rate(9, 10)}
    odd = {"target": Rate(4, 10), "protected": Rate(9, 10)}
    (line,) = broken(guard, {"a": even, "b": even}, {"a": even, "b": odd})
    assert line.startswith("guard: target refusals differ by 10.0 points between runtimes")
    assert "base" not in line
    (line,) = broken(guard, {"a": even, "b": odd}, {"a": even, "b": odd})
    assert line.endswith("the base's own differ by 10.0: raise guard.runtime_gap or evaluate.limit")
    assert broken(guard, {"a": even, "b": odd}, {"a": even, "b": even}) == []
