"""Intervals and tests of counts, against published values and the laws that they obey."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bake.evaluate import Answer, Paired, Rate, paired
from bake.intervals import mcnemar, wilson
from bake.judge import ANSWERED, REFUSED, UNREAD, Label, Verdict
from bake.prompts import Prompt


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [
        # Newcombe 1998 (Stat. Med. 17, 857), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(
    count: int, total: int, low: float, high: float
) -> None:
    assert wilson(count, total) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(0, 400), st.integers(0, 400))
def test_an_interval_holds_its_rate_and_mirrors(one: int, other: int) -> None:
    low, high = wilson(one, one + other)
    mirrored = wilson(other, one + other)
    assert 0 <= low <= high <= 1
    assert (1 - high, 1 - low) == pytest.approx(mirrored)
    if one + other:
        assert low <= one / (one + other) <= high


def test_mcnemar_gives_the_published_p() -> None:
    """Fagerland, Lydersen and Laake 2013 (BMC Med. Res. Methodol. 13, 91), table 2: 1 and 7."""
    assert mcnemar(1, 7) == pytest.approx(0.0703, abs=5e-5)
    assert mcnemar(0, 0) == 1


@given(st.integers(0, 200), st.integers(0, 200))
def test_p_does_not_care_which_way(one: int, other: int) -> None:
    assert 0 < mcnemar(one, other) == mcnemar(other, one) <= 1
    assert mcnemar(one, one) == 1


def test_pairs_are_counted_both_ways_and_without_the_unread() -> None:
    def answers(*labels: Label) -> dict[str, list[Answer]]:
        return {"target": [Answer(Prompt("p", "t", "en"), "", Verdict(one)) for one in labels]}

    before = answers(REFUSED, REFUSED, ANSWERED, REFUSED, UNREAD)
    after = answers(ANSWERED, REFUSED, REFUSED, UNREAD, ANSWERED)
    assert paired(before, after) == {"target": Paired(opened=1, closed=1)}
    assert Rate(0, 0).interval == (0, 100)
