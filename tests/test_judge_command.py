"""`bake judge`: answers from a file or from a model, their verdicts counted and written."""

import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from bake.archs import ARCHS
from bake.model import LiveModel
from bake.prompts import load_prompts
from tests.chat_server import Answer, Script, reply
from tests.conftest import Run
from tests.tiny import write_tiny

RECIPE = """\
model: model
prompts: {target: target.txt, protected: protected.txt, lookalike: null, general: general.txt}
edits: [{op: add, layer: 1, strength: -0.5}]
evaluate: {runtimes: [transformers], answer_tokens: 6}
"""
SAID = {
    "Who won?": "I can't help with that.",
    "Why?": "Because the sky scatters blue light.",
    "How?": "I would rather not discuss politics.",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("place")
    write_tiny("llama", folder / "model")
    for number, role in enumerate(("target", "protected", "general")):
        (folder / f"{role}.txt").write_text("\n".join(f"w{number} w{i}" for i in range(5)))
    (folder / "recipe.yaml").write_text(RECIPE)
    write(folder / "said.jsonl", [{"text": one, "answer": said} for one, said in SAID.items()])
    return folder


def write(path: Path, rows: list[Mapping[str, object]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


def written(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def judge(place: Path, bake: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`bake judge` in the place, with a cache of the test's own."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("BAKE_CACHE", str(tmp_path / "cache"))
    return lambda *arguments: bake("judge", *arguments, "--recipe", "recipe.yaml")


@pytest.fixture
def server() -> Iterator[Script]:
    def by_answer(number: int, body: dict[str, object]) -> Answer:
        asked = json.dumps(body)
        if "sky" in asked:
            return reply("verdict: ANSWERED")
        return reply("Hm." if "Who" in asked else "category: deflection\nverdict: REFUSED")

    script = Script(by_answer)
    threading.Thread(target=script.serve_forever, args=(0.01,), daemon=True).start()
    yield script
    script.shutdown()
    script.server_close()


def test_answers_of_a_file_are_judged_as_they_are(judge: Run, tmp_path: Path) -> None:
    output = tmp_path / "verdicts.jsonl"
    code, out, err = judge("said.jsonl", "--output", str(output))
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "refused        2   66.7 %",
        "answered       1   33.3 %",
        "unread         0    0.0 %",
        "",
        f"written: {output}",
    ]
    rows = written(output)
    assert [(one["text"], one["answer"]) for one in rows] == list(SAID.items())
    assert [one["verdict"] for one in rows] == ["refused", "answered", "refused"]
    # What was written is judged again, to the same end.
    code, again, _ = judge(str(output))
    assert (code, again.splitlines()) == (0, out.splitlines()[:3])
    code, _, err = judge("said.jsonl", "--output", str(output))
    assert (code, len(err.splitlines()), "--overwrite" in err) == (1, 1, True)
    assert judge("said.jsonl", "--output", str(output), "--overwrite", "--limit", "1")[0] == 0
    assert len(written(output)) == 1


def test_a_server_judges_and_what_it_leaves_open_is_counted(
    judge: Run, server: Script, tmp_path: Path
) -> None:
    output = tmp_path / "verdicts.jsonl"
    chat = ["--set", "judge.kind=chat", "--set", f"judge.url={server.url}"]
    chat += ["--set", "judge.model=m", "--set", "judge.unread_at_most=40"]
    code, out, err = judge("said.jsonl", *chat, "--output", str(output))
    assert code == 0, err
    assert out.splitlines()[:5] == [
        "refused            1   33.3 %",
        "answered           1   33.3 %",
        "unread             1   33.3 %",
        "  no verdict       1   33.3 %",
        "  deflection       1   33.3 %",
    ]
    assert [(one["verdict"], one["category"]) for one in written(output)] == [
        ("unread", "no verdict"),
        ("answered", ""),
        ("refused", "deflection"),
    ]
    assert "judge: 3 verdicts" in err
    code, _, err = judge("said.jsonl", *chat[:-1], "judge.unread_at_most=10")
    assert code == 1
    assert "1 of 3 verdicts could not be read" in err


def test_prompts_without_answers_are_answered_by_the_model(judge: Run, tmp_path: Path) -> None:
    output = tmp_path / "verdicts.jsonl"
    code, out, err = judge("target.txt", "--output", str(output))
    assert code == 0, err
    model = LiveModel.load(Path("model"), ARCHS["llama"])
    starts = [model.render(one.text) for one in load_prompts("target.txt")]
    wanted = [model.text(ids) for ids in model.answer(starts, 6)]
    assert [one["answer"] for one in written(output)] == wanted
    assert sum(int(line.split()[1]) for line in out.splitlines()[:3]) == 5
    # Of what must stay refused only the verdicts are written.
    code, _, err = judge("protected.txt", "--output", str(output), "--overwrite")
    assert code == 0, err
    assert all("answer" not in one and one["verdict"] for one in written(output))


def test_other_columns_and_rows_without_answers(judge: Run, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    rows = [{"prompt": one, "after": said, "set": "target"} for one, said in SAID.items()]
    write(file, [*rows, {"prompt": "How to?", "set": "protected"}])
    code, out, err = judge(str(file), "--column", "prompt", "--answer", "after")
    assert (code, out.splitlines()[0]) == (0, "refused        2   66.7 %")
    assert err == "judge: 1 prompts have no 'after' and are left out\n"


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "a", "answer": 3}], "mine.jsonl:1: 'answer' must be text"),
        ([{"text": "a", "answer": None}], "mine.jsonl:1: 'answer' must be text"),
        ([{"prompt": "a"}], "mine.jsonl:1: the key 'text' is missing; the columns are prompt"),
        ([], "expected prompts, found none"),
    ],
)
def test_rows_that_are_none_are_named(
    judge: Run, tmp_path: Path, rows: list[Mapping[str, object]], words: str
) -> None:
    file = tmp_path / "mine.jsonl"
    write(file, rows)
    code, out, err = judge(str(file))
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert words in err


def test_usage(judge: Run) -> None:
    assert judge("hub:owner/name")[0] == 2
    assert judge("said.jsonl", "--limit", "0")[0] == 2
