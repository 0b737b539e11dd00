"""Prompt sets: reading, mistakes by line, and splits that no topic crosses."""

import datetime
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bake.errors import PromptError
from bake.prompts import (
    Place,
    Prompt,
    Splits,
    builtin_sets,
    fingerprint,
    load_prompts,
    load_splits,
    split,
    united,
)
from bake.prompts.near import repeated


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


def test_a_table_with_a_header(tmp_path: Path) -> None:
    source = write(
        tmp_path,
        'topic,prompt,language,level\r\na,"One, two?\nThree?",en,5\n\n,Four?,,\n',
        "mine.csv",
    )
    one, two = load_prompts(source, place=Place(column="prompt"))
    assert one == Prompt("One, two?\nThree?", "a", "en", {"level": "5"})
    assert one.origin == f"{source}:3"  # where the row ends
    assert (two.text, two.language, two.extra) == ("Four?", "en", {})
    by_level = load_prompts(source, place=Place(column="prompt", topic="level"))
    assert (by_level[0].topic, by_level[0].extra) == ("5", {})
    with pytest.raises(PromptError, match=r"mine\.csv:3: the key 'text' is missing; .*topic, pro"):
        load_prompts(source)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("text\n", ": expected prompts, found none", id="header"),
        pytest.param("", ": expected prompts, found none", id="empty"),
        pytest.param("text,text\na,b\n", ":1: two columns have one name", id="twice"),
        pytest.param("text,x\na\n", ":2: found 1 cells, the header has 2", id="short"),
        pytest.param('text\n"a\n', ":2: not valid CSV: unexpected end", id="quote"),
        pytest.param("text,x\n,b\n", ":2: the key 'text' is missing", id="blank"),
        pytest.param(b"text\n\xff\n", ":2: this is not UTF-8 text", id="latin-1"),
    ],
)
def test_a_malformed_table(tmp_path: Path, text: str | bytes, expected: str) -> None:
    source = write(tmp_path, text, "mine.csv")
    with pytest.raises(PromptError) as caught:
        load_prompts(source)
    assert str(caught.value).startswith(f"{source}{expected}")


ROWS = {
    "question": ["One?", "Two?", "Three?"],
    "topic": ["a", None, "c"],
    "number": [1, 2, None],
    "when": [datetime.date(2024, 1, 2)] * 3,
}


def test_a_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.parquet"
    pyarrow.parquet.write_table(pyarrow.table(ROWS), path)
    one, two, three = load_prompts(str(path), place=Place(column="question"))
    assert one == Prompt("One?", "a", "en", {"number": 1, "when": "2024-01-02"})
    assert (two.topic != three.topic, three.extra) == (True, {"when": "2024-01-02"})
    assert three.origin == f"{path}:3"
    fingerprint([one, two, three])
    with pytest.raises(PromptError, match=r"mine\.parquet:1: the key 'text' is missing"):
        load_prompts(str(path))
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(PromptError, match=r"mine\.parquet: not valid parquet: "):
        load_prompts(str(path))
    with pytest.raises(PromptError, match=r"gone\.parquet: cannot be read"):
        load_prompts(str(tmp_path / "gone.parquet"))


@pytest.mark.parametrize(("name", "module"), [("x.parquet", "pyarrow"), ("hub:a/b", "datasets")])
def test_tables_without_their_extra(
    name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(PromptError, match=r"extra `data`: pip install .*\[data\]"):
        load_prompts(name)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path) -> dict[str, str]:
    """The Hub's own cache with a dataset of two subsets at one commit; there is no network."""
    folder = tmp_path / "hub" / "datasets--somebody--questions" / "snapshots" / COMMIT
    (folder / "hard").mkdir(parents=True)
    header = "---\nconfigs:\n- config_name: easy\n  data_files: easy.parquet\n"
    header += "- config_name: hard\n  data_files:\n  - split: eval\n    path: hard/*.parquet\n---\n"
    (folder / "README.md").write_text(header)
    easy = {"text": [f"Easy {n}?" for n in range(4)], "topic": [f"t{n}" for n in range(4)]}
    pyarrow.parquet.write_table(pyarrow.table(easy), folder / "easy.parquet")
    pyarrow.parquet.write_table(pyarrow.table(ROWS), folder / "hard" / "part.parquet")
    refs = tmp_path / "hub" / "datasets--somebody--questions" / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    return {
        **os.environ,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "BAKE_CACHE": str(tmp_path / "bake"),
    }


def hub_rows(environment: dict[str, str], *place: str) -> tuple[str, str]:
    """What a process of its own reads: the Hub's client takes its folder when it is imported."""
    code = (
        "import sys, json\n"
        "from bake.errors import PromptError\n"
        "from bake.prompts import Place, load_prompts\n"
        "place = Place(**json.loads(sys.argv[1]))\n"
        "try:\n"
        "    found = load_prompts('hub:somebody/questions', place=place)\n"
        "    print(json.dumps([[p.text, p.topic, p.origin] for p in found]))\n"
        "except PromptError as error:\n"
        "    print(error, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *place], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_a_dataset_of_the_hub_at_its_commit(hub: dict[str, str]) -> None:
    easy = {"revision": COMMIT, "subset": "easy"}
    out, err = hub_rows(hub, json.dumps(easy))
    assert err == ""
    assert json.loads(out)[1] == ["Easy 1?", "t1", "hub:somebody/questions:2"]
    hard = {"revision": COMMIT, "subset": "hard", "split": "eval", "column": "question"}
    out, err = hub_rows(hub, json.dumps(hard))
    assert err == ""
    assert [row[0] for row in json.loads(out)] == ROWS["question"]
    for change, words in (
        ({"split": "train"}, "subset hard, split train: datasets cannot read it: "),
        ({"subset": "odd"}, "subset odd, split eval: datasets cannot read it: "),
        ({"column": "text"}, "hub:somebody/questions:1: the key 'text' is missing; the columns"),
        ({"revision": "f" * 40}, f"the Hub gave no such dataset at revision {'f' * 40}"),
    ):
        out, err = hub_rows(hub, json.dumps(hard | change))
        assert (out, len(err.splitlines())) == ("", 1), err
        assert words in err


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


LONG = "Explain in plain words how the tides come about, and why there are two of them in a day"


@pytest.mark.parametrize(
    ("twin", "removed"),
    [
        (LONG, 1),
        (LONG.upper() + "?!", 1),
        (LONG + " now", 1),
        (LONG + " 2", 0),
        (LONG.replace("tides", "seasons"), 0),
        ("What is the answer?", 0),
    ],
)
def test_a_near_duplicate_is_left_out_of_the_later_split(twin: str, removed: int) -> None:
    # By their hashes topic c is for the fit, b for selection and a for the test.
    prompts = [Prompt(LONG, "c", "en"), Prompt(twin, "a", "en"), Prompt("Else?", "a", "en")]
    prompts.append(Prompt("Third?", "b", "en"))
    parts = split(prompts)
    assert parts.removed == removed
    assert [one.text for one in parts.fit] == [LONG]
    assert [one.text for one in parts.test] == ([twin] if not removed else []) + ["Else?"]


WORDS = st.lists(st.sampled_from(["tide", "moon", "sun", "day", "ten"]), min_size=1, max_size=9)


@given(st.lists(WORDS, max_size=8), st.lists(WORDS, max_size=8), st.sampled_from([0.5, 0.9]))
def test_near_duplicates_are_those_of_a_comparison_of_all_pairs(
    first: list[list[str]], second: list[list[str]], alike: float
) -> None:
    def pieces(text: str) -> set[str]:
        return {text[at : at + 5] for at in range(max(1, len(text) - 4))}

    parts = [[" ".join(words) for words in part] for part in (first, second)]
    wanted = set()
    for place, text in enumerate(parts[1]):
        for other in parts[0]:
            one, two = pieces(text), pieces(other)
            if len(one & two) >= alike * len(one | two):
                wanted.add(place)
    assert repeated(parts, alike) == [set(), wanted]


def test_the_same_prompt_twice_in_one_topic_is_no_mistake(tmp_path: Path) -> None:
    source = write(tmp_path, "One?\nTwo?\nThree?\none\n", "mine.txt")
    assert len(everything(load_splits(source))) == 4


def test_several_sets_are_one_class_and_share_no_topic() -> None:
    def of(name: str, *topics: str) -> tuple[Prompt, ...]:
        return tuple(Prompt(f"{name} asks about {one}?", one, "en") for one in topics)

    first = Splits(of("red", "a", "b"), of("red", "c"), of("red", "d", "e"))
    second = Splits(of("blue", "f", "d"), of("blue", "a", "g"), of("blue", "c", "h"), removed=1)
    found = united([first, second])
    assert [one.topic for one in found.fit] == ["a", "f", "b", "d"]
    # What one set fits on is neither chosen by nor reported where another set has it too.
    assert [one.topic for one in found.select] == ["c", "g"]
    assert [one.topic for one in found.test] == ["e", "h"]
    assert found.removed == 1 + 3
    assert united([first]) == first


def test_a_set_to_fit_on_alone_gives_way_to_what_is_reported_on() -> None:
    def of(name: str, *topics: str) -> tuple[Prompt, ...]:
        return tuple(Prompt(f"{name} asks about {one}?", one, "en") for one in topics)

    own = Splits(of("red", "a"), of("red", "b"), of("red", "c"))
    twin = Prompt("RED asks about c!", "z", "en")
    found = united([own], [(*of("blue", "b", "d"), twin, *of("blue", "a"))])
    assert [(one.text, one.topic) for one in found.fit] == [
        ("red asks about a?", "a"),
        ("blue asks about d?", "d"),
        ("blue asks about a?", "a"),
    ]
    assert (found.select, found.test, found.removed) == (own.select, own.test, 2)


def test_a_set_to_choose_by_alone_gives_way_to_what_is_fitted_and_reported_on() -> None:
    def of(name: str, *topics: str) -> tuple[Prompt, ...]:
        return tuple(Prompt(f"{name} asks about {one}?", one, "en") for one in topics)

    own = Splits(of("red", "a"), of("red", "b"), of("red", "c"))
    fitted, twin = of("green", "e"), Prompt("RED asks about c!", "z", "en")
    found = united([own], [fitted], [(*of("blue", "b", "d", "a", "e"), twin)])
    assert [(one.text, one.topic) for one in found.select] == [
        ("red asks about b?", "b"),
        ("blue asks about b?", "b"),
        ("blue asks about d?", "d"),
    ]
    assert (found.fit, found.test, found.removed) == ((*own.fit, *fitted), own.test, 3)


def test_sets_that_leave_no_prompt_to_a_split() -> None:
    first = Splits(*((Prompt(f"say {one}", one, "en", origin="a:1"),) for one in "abc"))
    second = replace(first, fit=first.test, test=first.fit)
    with pytest.raises(PromptError, match="a: its topics are those of the sets before it"):
        united([first, second])


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
