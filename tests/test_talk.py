"""Talking: what is streamed is what the model says, in both runtimes, and in two columns."""

import io
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from bake.archs import find_arch
from bake.checkpoint import Checkpoint
from bake.demo import Demo
from bake.errors import CheckpointError, GGUFError, PromptError
from bake.llama import LlamaModel
from bake.model import LiveModel
from bake.talk.chat import chat
from bake.talk.columns import beside, printable, side_by_side, width_of, wrapped
from bake.talk.speaker import Turn, pieces, speaker
from bake.talk.streamed import THREAD, streamed
from tests.conftest import Run
from tests.tiny import write_tiny

WORDS = st.text(st.sampled_from("ab 長\u0301\n\t-"), max_size=60)


def load(folder: Path) -> LiveModel:
    base = Checkpoint.open(folder)
    return LiveModel.load(folder, find_arch(base.config, "config.json", base.tensors))


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "falcon_h1", "qwen3_next"])
def test_a_stream_is_the_greedy_answer(kind: str, tmp_path: Path) -> None:
    """Of models with several kinds of cache: that decides how a text goes on."""
    write_tiny(kind, tmp_path)
    model = load(tmp_path)
    for text in ("w1 w2", "w3"):
        prompt = model.render(text)
        assert list(streamed(model, prompt, 8)) == model.answer([prompt], 8)[0]


def test_a_stream_that_is_left_ends_its_thread(tiny_llama: Path) -> None:
    def running() -> bool:
        return any(one.name == THREAD for one in threading.enumerate())

    model = load(tiny_llama)
    stream = streamed(model, model.render("w1"), 10_000)
    next(stream)
    assert running()
    stream.close()
    assert not running()


def test_what_the_model_raises_is_raised(tiny_llama: Path) -> None:
    with pytest.raises(IndexError):
        list(streamed(load(tiny_llama), [10_000], 2))


def test_llama_cpp_streams_what_it_generates(demo: Demo) -> None:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "2 + 2?")]
    with LlamaModel(demo.gguf, context=256, parallel=1, threads=1) as model:
        prompt = model.render(turns)
        messages = [{"role": role, "content": text} for role, text in turns]
        tokenizer = AutoTokenizer.from_pretrained(demo.model)
        templated = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert prompt == templated.input_ids
        for question in (prompt, model.render([("user", "Who wrote Hamlet?")])):
            assert list(model.stream(question, 12)) == model.generate([question], 12)[0]
        with pytest.raises(PromptError, match="raise the context"):
            next(model.stream(prompt, 250))


def test_a_conversation_is_remembered_and_forgotten() -> None:
    heard: list[Sequence[Turn]] = []

    class Echo:
        def reply(self, turns: Sequence[Turn], tokens: int) -> Iterator[str]:
            heard.append(turns)
            if turns[-1][1] == "long":
                raise PromptError("the conversation: too many tokens")
            yield from ("\x1b[2J", turns[-1][1])

    written: list[str] = []
    chat(Echo(), ["one", "", "long", "two", "/new", "three"], written.append, 9, "S")
    system, one, two = ("system", "S"), ("user", "one"), ("user", "two")
    assert heard == [
        [system, one],
        [system, one, ("assistant", "\x1b[2Jone"), ("user", "long")],
        [system, one, ("assistant", "\x1b[2Jone"), two],
        [system, ("user", "three")],
    ]
    assert "".join(written) == (
        "\N{REPLACEMENT CHARACTER}[2Jone\nthe conversation: too many tokens; /new begins anew\n"
        "\N{REPLACEMENT CHARACTER}[2Jtwo\n\N{REPLACEMENT CHARACTER}[2Jthree\n"
    )


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("w1 w2\nw3\n"))


@pytest.mark.usefixtures("typed")
def test_chat_answers_every_line(bake: Run, tiny_llama: Path) -> None:
    code, out, _ = bake("chat", str(tiny_llama), "--tokens", "6")
    model = load(tiny_llama)
    one = model.text(model.answer([model.render("w1 w2")], 6)[0])
    turns = [("user", "w1 w2"), ("assistant", one), ("user", "w3")]
    two = model.text(model.answer([model.render_turns(turns)], 6)[0])
    assert (code, out) == (0, f"{one}\n{two}\n")


def test_compare_shows_both_answers(
    bake: Run, demo: Demo, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint on the left and a GGUF on the right, each in its own runtime."""
    monkeypatch.setenv("COLUMNS", "83")
    prompt = "Is abortion legal in Poland?"
    arguments = ("compare", str(tiny_llama), str(demo.gguf), "--prompt", prompt)
    code, out, err = bake(*arguments, "--tokens", "16")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == prompt
    model = load(tiny_llama)
    left = wrapped(model.text(model.answer([model.render(prompt)], 16)[0]), 40)
    with LlamaModel(demo.gguf, context=64, parallel=1, threads=1) as llama:
        said = llama.detokenize(llama.generate([llama.render([("user", prompt)])], 16)[0])
    right = wrapped(said, 40)
    rows = lines[lines.index("─" * 40 + "─┼─" + "─" * 40) + 1 :]
    assert rows == list(beside([left, right], 40))
    assert len(" ".join(right)) > 40


@pytest.mark.parametrize(
    ("model", "runtime", "error", "words"),
    [
        ("no.gguf", None, GGUFError, r"no\.gguf: no such file"),
        ("no.gguf", "transformers", GGUFError, r"take --runtime llama\.cpp"),
        ("empty", "llama.cpp", GGUFError, "empty: has no GGUF"),
        ("empty", None, CheckpointError, "empty"),
    ],
)
def test_what_cannot_speak_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    runtime: str | None,
    error: type[Exception],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    manifest = '{"name": "a", "outputs": {"a.lora.gguf": "", "config.json": ""}}'
    Path("empty", "bake.json").write_text(manifest)
    with pytest.raises(error, match=words), speaker(model, runtime, 64):  # type: ignore[arg-type]
        pass


# --- columns


@given(st.binary(max_size=24))
def test_pieces_are_the_text(data: bytes) -> None:
    """Bytes for tokens: what is not yet a character waits."""
    found = list(pieces(iter(data), lambda ids: bytes(ids).decode("utf-8", "replace")))
    assert "".join(found) == data.decode("utf-8", "replace")


def test_a_character_is_said_once_it_is_whole() -> None:
    data = "né長".encode()
    found = pieces(iter(data), lambda ids: bytes(ids).decode("utf-8", "replace"))
    assert [one for one in found if one] == ["n", "é", "長"]


@given(WORDS, WORDS, st.integers(2, 20))
def test_a_longer_text_keeps_its_lines(first: str, second: str, width: int) -> None:
    lines = wrapped(first, width)
    assert wrapped(first + second, width)[: len(lines) - 1] == lines[:-1]
    assert all(width_of(line) <= width for line in lines)
    kept = "".join(lines).replace(" ", "")
    assert kept == first.replace(" ", "").replace("\n", "").replace("\t", "")


@given(st.lists(WORDS, max_size=6), st.lists(WORDS, max_size=6), st.integers(4, 16))
def test_columns_are_both_texts(left: list[str], right: list[str], width: int) -> None:
    lines = list(side_by_side(left, right, width))
    for place, text in enumerate(("".join(left), "".join(right))):
        wanted = [line.rstrip() for line in wrapped(text, width)]
        found = [_column(line, place, width) for line in lines]
        assert found[: len(wanted)] == wanted
        assert not any(found[len(wanted) :])


def _column(line: str, place: int, width: int) -> str:
    """One column of a line, by its columns on the terminal."""
    parts = line.partition(" │") if " │" in line else (line, "", "")
    return parts[0].rstrip() if place == 0 else parts[2][1:]


def test_lines_come_while_the_texts_grow() -> None:
    asked: list[str] = []

    def said(name: str, *found: str) -> Iterator[str]:
        for piece in found:
            asked.append(name)
            yield piece

    lines = side_by_side(said("left", "one\n", "two\n", "."), said("right", "1\n", "2\n", "3"), 5)
    assert next(lines) == "one   │ 1"
    assert asked == ["left", "right"]


def test_nothing_that_is_said_steers_the_terminal() -> None:
    assert printable("a\x1b[31m\x07\u202eb\n\t長") == "a�[31m��b\n\t長"
