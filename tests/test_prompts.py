"""Prompt sets: reading, mistakes by line, and splits that no topic crosses."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bake.errors import PromptError
from bake.prompts import Prompt, Splits, builtin_sets, fingerprint, load_prompts, load_splits, split


def write(folder: Path, text: str | bytes, name: str = "mine.jsonl") -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def everything(parts: Splits) -> tuple[Prompt, ...]:
    return parts.fit + parts.select + parts.test


# --- reading


def test_a_jsonl_file_in_one_language_or_in_any(tmp_path: Path) -> None:
    source = write(
        tmp_path,
        '{"text": "Hello?", "topic": "a", "language": "en", "country": "Peru"}\r\n'
        "\n"
        '{"text": "\\u00bfHola?", "topic": "a", "language": "es"}\n'
        '{"text": "No language\u2028here"}\n',
    )
    english = load_prompts(source)
    assert english[0] == Prompt("Hello?", "a", "en", {"country": "Peru"})
    assert english[0].origin == f"{source}:1"
    assert [prompt.text for prompt in english] == ["Hello?", "No language\u2028here"]
    assert [prompt.text for prompt in load_prompts(source, language="es")] == [
        "\u00bfHola?",
        "No language\u2028here",
    ]
    assert len(load_prompts(source, language="any")) == 3


def test_each_line_of_a_text_file_is_a_topic(tmp_path: Path) -> None:
    source = write(tmp_path, "\ufeffOne?\n\n  Two?  \nONE\n", "mine.txt")
    one, two, again = load_prompts(source)
    assert (one.text, two.text, two.origin) == ("One?", "Two?", f"{source}:3")
    assert one.topic == again.topic != two.topic


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param('{"text": "a"}\n{"text": \n', ":2: not valid JSON: ", id="json"),
        pytest.param('["a"]\n', ":1: expected an object like", id="list"),
        pytest.param('{"txt": "a"}\n', ":1: the key 'text' is missing", id="missing"),
        pytest.param('{"text": " "}\n', ":1: 'text' must be text that is not empty", id="blank"),
        pytest.param('{"text": 3}\n', ":1: 'text' must be text", id="number"),
        pytest.param('{"text": "a", "topic": null}\n', ":1: 'topic' must be text", id="null"),
        pytest.param('{"text": "\\ud800"}\n', ":1: 'text' holds half", id="surrogate"),
        pytest.param('{"text": "a", "x": NaN}\n', ":1: not valid JSON: NaN", id="nan"),
        pytest.param("[" * 100_000, ":1: not valid JSON", id="deep"),
        pytest.param(b'{"text": "a"}\n\xff\n', ":2: this is not UTF-8 text", id="latin-1"),
        pytest.param("\n", ": expected prompts, found none", id="empty"),
        pytest.param(
            '{"text": "a", "language": "zh"}\n',
            ": expected prompts, found none in language 'en', only in zh",
            id="language",
        ),
    ],
)
def test_a_malformed_file(tmp_path: Path, text: str | bytes, expected: str) -> None:
    source = write(tmp_path, text)
    with pytest.raises(PromptError) as caught:
        load_prompts(source)
    assert str(caught.value).startswith(f"{source}{expected}")


def test_sets_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"politcal: .*did you mean 'political'"):
        load_prompts("politcal")
    with pytest.raises(PromptError, match=r"none\.jsonl: cannot be read: No such file"):
        load_prompts(str(tmp_path / "none.jsonl"))


# --- splits


def numbered(topics: int, each: int = 3) -> list[Prompt]:
    return [
        Prompt(f"prompt {number} on {topic}", f"topic {topic}", "en")
        for topic in range(topics)
        for number in range(each)
    ]


@pytest.mark.parametrize(
    ("topics", "shares"),
    [(3, (1, 1, 1)), (4, (2, 1, 1)), (10, (5, 1, 4)), (60, (33, 6, 21)), (100, (55, 10, 35))],
)
def test_shares_of_topics(topics: int, shares: tuple[int, int, int]) -> None:
    parts = split(numbered(topics, each=1))
    assert (len(parts.fit), len(parts.select), len(parts.test)) == shares


def test_the_ranking_is_by_sha256_of_the_topic() -> None:
    # sha256: "c" 2e7d..., "b" 3e23..., "a" ca97...
    parts = split([Prompt(text, text, "en") for text in "abc"])
    assert [p.text for p in everything(parts)] == ["c", "b", "a"]


COUNTS = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), st.integers(1, 5), min_size=3)


def of(counts: dict[str, int]) -> list[Prompt]:
    return [
        Prompt(f"{topic} {number}", topic, "en")
        for topic, count in counts.items()
        for number in range(count)
    ]


@given(COUNTS)
def test_splits_keep_every_prompt_and_share_no_topic(counts: dict[str, int]) -> None:
    prompts = of(counts)
    parts = split(prompts)
    assert sorted(p.text for p in everything(parts)) == sorted(p.text for p in prompts)
    topics = [{p.topic for p in part} for part in (parts.fit, parts.select, parts.test)]
    assert all(topics)
    assert sum(map(len, topics)) == len(set().union(*topics))


@given(COUNTS, st.randoms(use_true_random=False))
def test_the_order_of_topics_does_not_matter(counts: dict[str, int], random) -> None:  # type: ignore[no-untyped-def]
    shuffled = dict(random.sample(sorted(counts.items()), len(counts)))
    assert split(of(counts)) == split(of(shuffled))


@given(COUNTS, st.data())
def test_more_prompts_on_a_topic_move_nothing(counts: dict[str, int], data: st.DataObject) -> None:
    topic = data.draw(st.sampled_from(sorted(counts)))
    before = split(of(counts))
    after = split(of({**counts, topic: counts[topic] + 2}))
    for old, new in zip(
        (before.fit, before.select, before.test), (after.fit, after.select, after.test), strict=True
    ):
        assert set(old) <= set(new)


@given(COUNTS, st.integers(1, 30))
def test_a_limit_takes_a_beginning_that_is_balanced(counts: dict[str, int], limit: int) -> None:
    whole, limited = split(of(counts)), split(of(counts), limit)
    for all_of_it, some in (
        (whole.fit, limited.fit),
        (whole.select, limited.select),
        (whole.test, limited.test),
    ):
        assert some == all_of_it[:limit]
        taken = {p.topic: sum(q.topic == p.topic for q in some) for p in all_of_it}
        # A topic lags behind the fullest by more than one only when it has no more to give.
        assert all(
            count >= max(taken.values()) - 1 or count == counts[topic]
            for topic, count in taken.items()
        )


def test_the_same_prompt_in_two_splits_names_both_lines(tmp_path: Path) -> None:
    lines = [{"text": f"prompt {topic}", "topic": topic} for topic in "abc"]
    lines[0]["text"] = "What is  THE answer"
    lines[2]["text"] = "what is the answer?!"
    source = write(tmp_path, "\n".join(map(json.dumps, lines)))
    with pytest.raises(PromptError) as caught:
        load_splits(source)
    assert f"{source}:1 " in str(caught.value)
    assert f"{source}:3 " in str(caught.value)


def test_the_same_prompt_twice_in_one_topic_is_no_mistake(tmp_path: Path) -> None:
    source = write(tmp_path, "One?\nTwo?\nThree?\none\n", "mine.txt")
    assert len(everything(load_splits(source))) == 4


def test_too_few_topics(tmp_path: Path) -> None:
    source = write(tmp_path, "One?\nTwo?\n", "mine.txt")
    with pytest.raises(PromptError, match=r"mine\.txt: three splits need .* 3 topics, found 2"):
        load_splits(source)


def test_a_topic_is_in_the_same_split_in_every_language() -> None:
    whole = load_splits("political", language="any")
    for language in ("en", "zh", "es", "ar"):
        parts = load_splits("political", language=language)
        assert set(parts.fit) <= set(whole.fit)
        assert set(parts.select) <= set(whole.select)
        assert set(parts.test) <= set(whole.test)


# --- built-in sets


@pytest.mark.parametrize("name", sorted(builtin_sets()))
def test_a_built_in_set_splits(name: str) -> None:
    parts = load_splits(name, language="any")
    assert len(everything(parts)) == len(load_prompts(name, language="any"))
    assert parts == load_splits(name, language="any")


def test_the_built_in_sets() -> None:
    assert {"political", "harmful", "lookalikes", "general", "medical", "text"} <= set(
        builtin_sets()
    )


# --- fingerprint


def test_a_fingerprint_is_of_the_content_in_order() -> None:
    one, two = Prompt("a", "t", "en", {"x": 1, "y": 2}), Prompt("b", "t", "en")
    assert fingerprint([one, two]) != fingerprint([two, one])
    assert fingerprint([one]) == fingerprint([Prompt("a", "t", "en", {"y": 2, "x": 1}, "f:9")])
    assert fingerprint([]) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@given(st.text(min_size=1), st.text(min_size=1))
def test_different_texts_have_different_fingerprints(first: str, second: str) -> None:
    same = fingerprint([Prompt(first, "t", "en")]) == fingerprint([Prompt(second, "t", "en")])
    assert same == (first == second)
