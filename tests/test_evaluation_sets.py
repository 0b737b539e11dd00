"""The sets that `bake eval` asks: of topics that nothing was fitted on, and with known answers."""

import re
from collections import Counter
from pathlib import Path

import pytest

from bake.errors import ManifestError, PromptError
from bake.evaluation.disjoint import check_splits, proved
from bake.evaluation.facts import known, says
from bake.evaluation.sets import HARMFUL, STANDING, Asked, chosen_sets, role_splits
from bake.prompts import Prompt, fingerprint, load_prompts, load_splits
from bake.prompts.near import repeated
from bake.recipe import load_recipe

TRAINED = Path(__file__).parent.parent / "bake/demo/prompts"
RECIPE = load_recipe("political-open").recipe
SPLITS = role_splits(RECIPE)
FITTED = SPLITS["target"].fit[0]
SIZES = {
    "political-others": 60,
    "political-dressed": 60,
    "political-lookalikes": 40,
    "political-languages": 100,
    "political-facts": 60,
}


def test_no_topic_was_fitted_chosen_or_trained_on() -> None:
    found = [one for name in STANDING for one in load_prompts(name, language="any")]
    assert Counter(name for name in STANDING for _ in load_prompts(name, language="any")) == SIZES
    sets = [load_splits(one, language="any") for one in ("political", "harmful", "lookalikes")]
    seen = [one for parts in sets for one in (*parts.fit, *parts.select)]
    seen += [
        one
        for path in sorted(TRAINED.glob("*.jsonl"))
        for one in load_prompts(str(path), language="any")
    ]
    assert {one.topic for one in found}.isdisjoint(one.topic for one in seen)
    # Nor do they ask what the test splits ask.
    asked = [*seen, *(one for parts in sets for one in parts.test)]
    assert not repeated([[one.text for one in asked], [one.text for one in found]])[1]


def test_the_same_questions_in_five_languages() -> None:
    found = load_prompts("political-languages", language="any")
    topics: dict[str, list[str]] = {}
    for one in found:
        topics.setdefault(one.language, []).append(one.topic)
    assert list(topics) == ["en", "de", "fr", "es", "zh"]
    assert all(len(one) == 20 and one == topics["en"] for one in topics.values())


def test_no_question_holds_its_answer() -> None:
    for one in load_prompts("political-facts"):
        assert not says(one.text, known(one)), one.text


def test_the_shipped_recipe_is_asked_everything_and_harm_is_hidden() -> None:
    asked = {one.name: one for one in chosen_sets(RECIPE, SPLITS, limit=7)}
    assert list(asked) == ["target", "protected", "lookalike", "general", *STANDING]
    assert {name for name, one in asked.items() if one.hidden} == {"protected", "political-dressed"}
    assert {name for name, one in asked.items() if one.opened} == {
        *("target", "political-others", "political-languages", "political-facts")
    }
    assert [name for name, one in asked.items() if one.facts] == ["political-facts"]
    assert len(asked["political-languages"].prompts) == 5 * 7
    assert len({one.topic for one in asked["political-facts"].prompts}) == 7
    proof = proved(list(asked.values()), SPLITS, manifest=False)
    assert not {one for _, found in proof.seen.values() for one in found} & {
        one for _, found in proof.asked.values() for one in found
    }
    assert set(proof.as_json()["asked"]["target"]["prompts"]).isdisjoint(
        proof.as_json()["seen"]["target, fit"]["prompts"]
    )
    assert "harmful" in HARMFUL


def test_a_recipe_about_something_else_is_asked_its_roles() -> None:
    recipe = load_recipe("refuse-topic").recipe
    names = [one.name for one in chosen_sets(recipe, role_splits(recipe))]
    assert names == ["target", "protected", "lookalike", "refused", "general"]


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        pytest.param(
            (FITTED,), f"^mine: the prompt {re.escape(repr(FITTED.text))} is among", id="equal"
        ),
        pytest.param(
            (Prompt(f" {FITTED.text.upper()}!", "mine", "en"),),
            "mine: the prompt .* is among",
            id="nearly",
        ),
        pytest.param(
            (Prompt("Something else entirely", FITTED.topic, "en"),),
            f"mine: the topic '{FITTED.topic}' is among .*leave the set out with --sets",
            id="topic",
        ),
    ],
)
def test_a_set_that_overlaps_the_fit_is_refused(prompts: tuple[Prompt, ...], said: str) -> None:
    with pytest.raises(PromptError, match=said):
        proved([Asked("mine", prompts)], SPLITS, manifest=True)


def test_sets_that_are_not_the_manifests_any_more() -> None:
    prompts = {
        role: {part: fingerprint(getattr(parts, part)) for part in ("fit", "select", "test")}
        for role, parts in SPLITS.items()
    }
    check_splits(SPLITS, {"prompts": prompts}, "out/bake.json")
    prompts["target"]["fit"] = prompts["general"]["fit"]
    for manifest in ({"prompts": prompts}, {"prompts": {}}, {}):
        with pytest.raises(ManifestError, match=r"^out/bake\.json: prompts\.target\.fit: the set"):
            check_splits(SPLITS, manifest, "out/bake.json")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("refused", "--sets refused: the recipe has no such role; it has target, protected"),
        ("politics", "--sets politics: no role of the recipe and no built-in set; a file ends in"),
        ("hub:a/b", "--sets hub:a/b: a Hub dataset needs its commit"),
        ("none.jsonl", "none.jsonl: cannot be read"),
    ],
)
def test_sets_that_are_not_there(name: str, said: str) -> None:
    with pytest.raises(PromptError, match=said):
        chosen_sets(RECIPE, SPLITS, [name])


def test_known_answers_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    for answers in ('"Paris"', "[]", '["?!"]', "[3]"):
        file.write_text(f'{{"text": "Where?", "answers": {answers}}}\n')
        with pytest.raises(PromptError, match=r"mine\.jsonl:1: 'answers' must be a list of texts"):
            chosen_sets(RECIPE, SPLITS, [str(file)])
