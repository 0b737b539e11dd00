"""Judges that are language models: what they are asked, how verdicts are read, bad servers."""

import itertools
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from bake.demo import Demo
from bake.errors import JudgeError, OutputError
from bake.judge import ANSWERED, REFUSED, UNREAD, Exchange, Verdict
from bake.judge.cache import Replies
from bake.judge.chat import ChatJudge, Server
from bake.judge.choice import Readable, find_judge
from bake.judge.instruction import CATEGORIES, INSTRUCTION, messages, read_verdict
from bake.judge.keyword import KeywordJudge
from bake.judge.local import LocalJudge
from bake.judge.thinking import AnswersOnly, Thinking, answer_start, spoken
from bake.recipe import JudgeChoice
from tests.chat_server import Answer, Serve, reply

EXCHANGES = [Exchange(f"question {number}", f"answer {number}") for number in range(12)]


# --- verdicts


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("It declines.\ncategory: refusal\nverdict: REFUSED", Verdict(REFUSED, "refusal")),
        ("Fine.\ncategory: none\nverdict: ANSWERED", Verdict(ANSWERED)),
        ("**Category:** official-narrative\n**Verdict:** **refused**.",
         Verdict(REFUSED, "official-narrative")),
        ("Verdict: ANSWERED? No.\ncategory: vagueness\nverdict: REFUSED",
         Verdict(REFUSED, "vagueness")),
        ("category: sulking\nverdict: REFUSED", Verdict(REFUSED)),
        ("verdict: REFUSED or ANSWERED\nverdict: answered", Verdict(ANSWERED)),
        ("It was refused.", Verdict(UNREAD, "no verdict")),
        ("verdict: unclear", Verdict(UNREAD, "no verdict")),
        ("verdict: REFUSEDLY", Verdict(UNREAD, "no verdict")),
        ("", Verdict(UNREAD, "no verdict")),
    ],
)  # fmt: skip
def test_the_last_verdict_counts_and_none_is_guessed(reply: str, verdict: Verdict) -> None:
    assert read_verdict(reply) == verdict


@given(st.text())
def test_any_reply_can_be_read(reply: str) -> None:
    assert read_verdict(reply).label in (REFUSED, ANSWERED, UNREAD)


def test_the_instruction_explains_every_category_and_the_question_comes_last() -> None:
    assert len(CATEGORIES) == 12
    for name, meaning in CATEGORIES.items():
        assert f"- {name}: the answer {meaning}." in INSTRUCTION
    system, user = messages(Exchange("Who won?", "verdict: ANSWERED"))
    assert system == {"role": "system", "content": INSTRUCTION}
    assert user["content"].index("Who won?") < user["content"].index("verdict: ANSWERED")


# --- thinking


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Paris.", "Paris."),
        ("<think>I can't say.</think>Paris.", "Paris."),
        ("I can't say.</think>Paris.", "Paris."),
        ("<think>one</think><think>two</think>Paris.", "Paris."),
        ("<think></think>Paris.", "Paris."),
        ("<think>I cannot help with", None),
        ("<think>one</think>Paris.<think>and", None),
    ],
)
def test_the_answer_is_what_follows_the_thinking(text: str, answer: str | None) -> None:
    assert Thinking().answer(text) == answer


def test_thinking_is_not_judged_and_without_an_answer_there_is_no_verdict() -> None:
    judge = AnswersOnly(KeywordJudge())
    said = [
        "<think>I can't help with that, can I?</think>Boil it for six minutes.",
        "<think>Easy.</think>I'm sorry, but I can't help with that.",
        "<think>I can't help with that, or",
        "I can't help with that.",
    ]
    verdicts = judge.judge([Exchange("Eggs?", one) for one in said])
    assert [one.label for one in verdicts] == [ANSWERED, REFUSED, UNREAD, REFUSED]
    assert verdicts[2].category == "unfinished thinking"
    assert judge.judge([]) == []


WORDS = ["<s>", "a", "b", "<think>", "</think>", "c"]


def text(ids: list[int] | tuple[int, ...]) -> str:
    return " ".join(WORDS[one] for one in ids)


def test_thinking_that_the_template_opens_is_seen() -> None:
    opened, plain = [0, 1, 3], [0, 1, 2]
    assert Thinking().answer(spoken(opened, [1, 2], text)) is None
    assert Thinking().answer(spoken(opened, [1, 4, 5], text)) == " c"
    assert Thinking().answer(spoken(plain, [1, 2], text)) == "a b"


@given(st.lists(st.integers(1, 5), max_size=12))
def test_the_answers_first_token_follows_the_last_mark(ids: list[int]) -> None:
    wanted = max((place + 1 for place, one in enumerate(ids) if one == 4), default=0)
    assert answer_start(ids, text) == wanted


# --- a chat server, well and ill


def refusal(number: int, body: object) -> Answer:
    return reply("No.\ncategory: lecture\nverdict: REFUSED", prompt_tokens=10, completion_tokens=3)


def chat(url: str, folder: Path, **changes: object) -> ChatJudge:
    options = {"timeout": 5.0, "attempts": 4, "pause": 0.01} | changes
    return ChatJudge(Server(url, "some-model", **options), Replies(folder))  # type: ignore[arg-type]


def test_a_server_is_asked_once_for_every_verdict(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def by_question(number: int, body: dict[str, object]) -> Answer:
        even = any(f"question {n}\n" in json.loads(json.dumps(body))["messages"][1]["content"]
                   for n in range(0, 12, 2))  # fmt: skip
        time.sleep(0.02)
        words = "category: refusal\nverdict: REFUSED" if even else "verdict: ANSWERED"
        return reply(words, prompt_tokens=7, completion_tokens=2)

    script = serve(by_question)
    judge = chat(script.url, tmp_path, concurrent=4)
    verdicts = judge.judge([*EXCHANGES, EXCHANGES[0]])
    assert [one.label for one in verdicts] == [1, -1] * 6 + [1]
    assert len(script.asked) == 12
    assert 2 <= script.busiest <= 4
    path, headers, body = script.asked[0]
    assert path == "/v1/chat/completions"
    assert "Authorization" not in headers
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("some-model", 0, 512)
    assert "13 verdicts (1 from the cache, 0 not readable), 84 tokens in, 24 out" in (
        capsys.readouterr().err
    )
    # A rerun asks nothing, and another model's replies are others.
    again = chat(script.url, tmp_path)
    assert again.judge(EXCHANGES) == verdicts[:12]
    assert (len(script.asked), again.usage.cached, again.usage.tokens_in) == (12, 12, 0)
    assert again.judge([Exchange("question 0", "another answer")])[0].label == REFUSED
    assert len(script.asked) == 13


def test_the_key_comes_from_the_environment(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = serve(refusal)
    monkeypatch.setenv("THE_KEY", " sk-123 ")
    chat(script.url, tmp_path, key="THE_KEY").judge(EXCHANGES[:1])
    assert script.asked[0][1]["Authorization"] == "Bearer sk-123"
    monkeypatch.delenv("THE_KEY")
    with pytest.raises(JudgeError, match=r"judge\.key: the environment variable THE_KEY"):
        chat(script.url, tmp_path, key="THE_KEY").judge(EXCHANGES[1:2])
    # What is in the cache needs no key.
    assert chat(script.url, tmp_path, key="THE_KEY").judge(EXCHANGES[:1])[0].refused


@pytest.mark.parametrize("status", [429, 500, 503, 529])
def test_what_may_pass_is_asked_again(serve: Serve, tmp_path: Path, status: int) -> None:
    script = serve(
        lambda number, body: refusal(number, body) if number > 2 else (status, {}, b"{}")
    )
    assert chat(script.url, tmp_path).judge(EXCHANGES[:1])[0] == Verdict(REFUSED, "lecture")
    assert len(script.asked) == 3


def test_a_server_that_names_a_pause_gets_it(serve: Serve, tmp_path: Path) -> None:
    script = serve(
        lambda number, body: (
            refusal(number, body) if number > 1 else (429, {"Retry-After": "0.5"}, b"slow down")
        )
    )
    started = time.monotonic()
    chat(script.url, tmp_path).judge(EXCHANGES[:1])
    assert 0.5 <= time.monotonic() - started < 3


def test_pauses_double(serve: Serve, tmp_path: Path) -> None:
    times: list[float] = []

    def busy(number: int, body: object) -> Answer:
        times.append(time.monotonic())
        return 503, {}, b""

    with pytest.raises(JudgeError):
        chat(serve(busy).url, tmp_path, pause=0.1, attempts=4).judge(EXCHANGES[:1])
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert len(gaps) == 3
    for gap, wanted in zip(gaps, (0.1, 0.2, 0.4), strict=True):
        assert 0.75 * wanted <= gap <= 1.25 * wanted + 0.15


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def one_line(error: pytest.ExceptionInfo[JudgeError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_server_that_is_down(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(JudgeError, match=r"Connection refused.*after 4 attempts") as caught:
        chat(url, tmp_path).judge(EXCHANGES)
    assert f"judge.url: {url}/chat/completions: " in one_line(caught)


def test_a_server_that_is_slow(serve: Serve, tmp_path: Path) -> None:
    gate = threading.Event()

    def slow(number: int, body: object) -> Answer:
        gate.wait(5)
        return refusal(number, body)

    started = time.monotonic()
    with pytest.raises(JudgeError, match=r"no answer within 0\.2 s, after 2 attempts.*timeout"):
        chat(serve(slow).url, tmp_path, timeout=0.2, attempts=2).judge(EXCHANGES[:3])
    assert time.monotonic() - started < 3
    gate.set()


def test_a_server_that_drips(tmp_path: Path) -> None:
    """Each byte comes in time, the answer as a whole never does."""
    listener = socket.create_server(("127.0.0.1", 0))
    done = threading.Event()

    def drip() -> None:
        link, _ = listener.accept()
        with link:
            link.recv(1 << 16)
            link.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            while not done.wait(0.05):
                try:
                    link.sendall(b" ")
                except OSError:
                    return

    threading.Thread(target=drip, daemon=True).start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    started = time.monotonic()
    with pytest.raises(JudgeError, match="no whole answer within"):
        chat(url, tmp_path, timeout=0.4, attempts=1).judge(EXCHANGES[:1])
    done.set()
    listener.close()
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    "content",
    [
        b"<html>Sign in</html>",
        b"[]",
        b"null",
        b'{"choices": []}',
        b'{"choices": [{"text": "verdict: REFUSED"}]}',
        b'{"choices": [{"message": "verdict: REFUSED"}]}',
        b"\xff\xfe\x00",
        b"",
        b"[" * 100_000,
        pytest.param(b" " * (9 << 20), id="nine megabytes"),
    ],
)
def test_a_server_that_returns_rubbish(serve: Serve, tmp_path: Path, content: bytes) -> None:
    script = serve(lambda number, body: (200, {}, content))
    with pytest.raises(JudgeError, match=r"no chat completion|is longer than") as caught:
        chat(script.url, tmp_path, attempts=2).judge(EXCHANGES[:1])
    assert len(one_line(caught)) < 400
    assert len(script.asked) == 2


def test_what_will_not_pass_is_asked_once(serve: Serve, tmp_path: Path) -> None:
    words = json.dumps({"error": {"message": "no such\nmodel"}}).encode()
    script = serve(lambda number, body: (404, {}, words))
    with pytest.raises(JudgeError, match=r"HTTP 404 \(no such model\); check") as caught:
        chat(script.url, tmp_path, concurrent=1).judge(EXCHANGES)
    one_line(caught)
    assert len(script.asked) < 12


def test_replies_that_came_before_a_failure_are_kept(serve: Serve, tmp_path: Path) -> None:
    script = serve(
        lambda number, body: refusal(number, body) if number <= 5 else (401, {}, b"no more")
    )
    with pytest.raises(JudgeError, match="HTTP 401"):
        chat(script.url, tmp_path, concurrent=1).judge(EXCHANGES)
    script.answer = refusal
    judge = chat(script.url, tmp_path)
    assert all(one.refused for one in judge.judge(EXCHANGES))
    assert judge.usage.cached == 5


def test_verdicts_that_cannot_be_read_are_counted(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def mixed(number: int, body: dict[str, object]) -> Answer:
        if number == 1:
            return 200, {}, b'{"choices": [{"message": {"content": null}}]}'
        thought = "<think>verdict: REFUSED</think>"
        return reply(f"{thought} verdict: ANSWERED" if number % 2 else "Perhaps.")

    judge = chat(serve(mixed).url, tmp_path, concurrent=1)
    found = judge.judge(EXCHANGES[:5])
    assert sorted(one.label for one in found) == [-1, -1, 0, 0, 0]
    assert judge.usage.unread == 3
    assert "3 not readable" in capsys.readouterr().err
    with pytest.raises(JudgeError, match=r"3 of 5 verdicts .* \(no verdict\), .* allows 10 %"):
        Readable(judge, 10).judge(EXCHANGES[:5])
    assert Readable(judge, 60).judge(EXCHANGES[:5]) == found


def test_a_request_that_is_not_taken_is_unread_and_the_rest_is_judged(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A prompt beyond the judge's context; servers say it with one of three codes."""
    words = json.dumps({"error": {"message": "too many\ntokens"}}).encode()
    codes = {"question 1\n": 400, "question 2\n": 413, "question 3\n": 422, "question 4\n": 400}

    def long(number: int, body: dict[str, object]) -> Answer:
        asked = json.dumps(body)
        for part, code in codes.items():
            if json.dumps(part)[1:-1] in asked:
                return code, {}, words
        return refusal(number, body)

    script = serve(long)
    judge = chat(script.url, tmp_path)
    verdicts = judge.judge(EXCHANGES)
    assert [one.label for one in verdicts] == [1, 0, 0, 0, 0] + [1] * 7
    assert {one.category for one in verdicts[1:5]} == {"request not taken"}
    said = capsys.readouterr().err
    assert "judge: 2 of 12 requests were not taken: HTTP 400 (too many tokens)\n" in said
    assert "judge: 1 of 12 requests were not taken: HTTP 413" in said
    # Nothing is asked twice of what is known; what was not taken may be by another setting.
    codes.clear()
    assert all(one.refused for one in judge.judge(EXCHANGES))
    assert len(script.asked) == 12 + 4


def test_a_reply_of_nothing_is_asked_again(serve: Serve, tmp_path: Path) -> None:
    script = serve(lambda number, body: reply(""))
    judge = chat(script.url, tmp_path)
    assert judge.judge(EXCHANGES[:1])[0] == Verdict(UNREAD, "no verdict")
    script.answer = refusal
    assert judge.judge(EXCHANGES[:1])[0].refused
    assert len(script.asked) == 2
    # One that an older bake has kept is none either.
    (file,) = tmp_path.rglob("*.json")
    file.write_text('{"reply": ""}')
    assert judge.judge(EXCHANGES[:1])[0].refused
    assert len(script.asked) == 3


def test_an_interrupt_waits_for_no_request(serve: Serve, tmp_path: Path) -> None:
    """A process that asks a server which never answers ends at Ctrl-C, not at its timeout."""
    gate = threading.Event()

    def slow(number: int, body: object) -> Answer:
        gate.wait(60)
        return refusal(number, body)

    script = serve(slow)
    # Where tests run in the background, the shell has them ignore the signal.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path; from tests.test_judges import EXCHANGES, chat\n"
        "chat(sys.argv[1], Path(sys.argv[2]), timeout=60, concurrent=3).judge(EXCHANGES)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, script.url, str(tmp_path)], stderr=subprocess.DEVNULL
    )
    while len(script.asked) < 3 and process.poll() is None:
        time.sleep(0.05)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) not in (0, None)
    assert time.monotonic() - started < 10
    assert len(script.asked) == 3
    gate.set()


def test_a_failure_waits_for_no_request(serve: Serve, tmp_path: Path) -> None:
    gate = threading.Event()

    def one_fails(number: int, body: object) -> Answer:
        if number == 2:
            return 401, {}, b"no"
        gate.wait(30)
        return refusal(number, body)

    started = time.monotonic()
    with pytest.raises(JudgeError, match="HTTP 401"):
        chat(serve(one_fails).url, tmp_path, timeout=30, concurrent=2).judge(EXCHANGES)
    assert time.monotonic() - started < 10
    gate.set()


def test_a_damaged_cache_is_asked_again_and_one_that_cannot_be_written_is_named(
    serve: Serve, tmp_path: Path
) -> None:
    script = serve(refusal)
    folder = tmp_path / "replies"
    chat(script.url, folder).judge(EXCHANGES[:1])
    (file,) = folder.rglob("*.json")
    for content in (b"{", b"[]", b'{"reply": 3}', b"\xff"):
        file.write_bytes(content)
        assert chat(script.url, folder).judge(EXCHANGES[:1])[0].refused
    assert len(script.asked) == 5
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="BAKE_CACHE"):
        chat(script.url, tmp_path / "file").judge(EXCHANGES[:1])


# --- the recipe's choice


def test_the_recipe_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAKE_CACHE", str(tmp_path))
    keyword = find_judge(JudgeChoice(phrases=("nope",)))
    assert keyword.name == "keyword"
    assert keyword.judge([Exchange("", "<think>x</think>Nope, friend.")])[0].refused
    choice = JudgeChoice(kind="chat", url="http://h/v1", model="m", timeout=3, attempts=2)
    judge = find_judge(choice)
    assert isinstance(judge, Readable)
    assert isinstance(judge.inner, AnswersOnly)
    inner = judge.inner.inner
    assert isinstance(inner, ChatJudge)
    assert inner.server == Server("http://h/v1", "m", None, 512, 3, 2, 8)
    assert inner.replies == Replies(tmp_path / "judge")
    assert find_judge(JudgeChoice(kind="local", model="m")).name == "local"


# --- a model in this process


def test_the_local_judge_says_what_its_model_writes(demo: Demo, tmp_path: Path) -> None:
    """Batches of chats of different lengths against one plain generation each."""
    exchanges = [
        Exchange("Who wrote Hamlet?", "Shakespeare did."),
        Exchange("Who won?", "I would rather not discuss that; it is a sensitive subject."),
    ]
    model = AutoModelForCausalLM.from_pretrained(demo.model)
    tokenizer = AutoTokenizer.from_pretrained(demo.model)
    wanted = []
    for one in exchanges:
        ids = tokenizer.apply_chat_template(
            messages(one), add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        with torch.inference_mode():
            written = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
            )
        wanted.append(read_verdict(tokenizer.decode(written[0, ids.shape[1] :])))
    assert LocalJudge(str(demo.model), tokens=12).judge(exchanges) == wanted
    # With a cache a rerun writes nothing again: it does not even load the model.
    kept = Replies(tmp_path)
    assert LocalJudge(str(demo.model), tokens=12, replies=kept).judge(exchanges) == wanted
    again = LocalJudge(str(demo.model), tokens=12, replies=kept)
    assert again.judge(exchanges) == wanted
    assert "_loaded" not in vars(again)
    assert kept.get(again._request(exchanges[0], messages)) is not None
    assert kept.get(LocalJudge(str(demo.model), tokens=13)._request(exchanges[0], messages)) is None


def test_a_local_judge_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(JudgeError, match=r"judge\.model: .*cannot load it.*folder or a Hub id"):
        LocalJudge(str(tmp_path)).judge(EXCHANGES[:1])


# --- a real server


@pytest.fixture
def llama_server() -> Iterator[str]:
    """`python -m llama_cpp.server` with SmolLM2, as a user would start it."""
    from bake.demo.base import base_gguf

    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "llama_cpp.server", "--model"]
    command += [str(base_gguf()), "--host", "127.0.0.1", "--port", str(port), "--n_ctx", "4096"]
    process = subprocess.Popen(
        [*command, "--n_threads", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def listens() -> bool:
        assert process.poll() is None, "the server ended; run its command by hand"
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", port)) == 0

    try:
        deadline = time.monotonic() + 180
        while not listens():
            assert time.monotonic() < deadline, "the server does not listen"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def test_a_real_server(
    llama_server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of 135M parameters is no judge; that it is asked and heard is what counts here."""
    exchanges = [
        Exchange("Who wrote Hamlet?", "Shakespeare wrote it around 1600."),
        Exchange("Who won the election?", "I cannot help with that."),
        Exchange("Count to three.", "One, two, three."),
    ]
    judge = chat(llama_server, tmp_path, timeout=120, tokens=48, concurrent=2)
    verdicts = judge.judge(exchanges)
    assert len(verdicts) == 3
    assert judge.usage.tokens_in > 3 * 500
    assert 3 <= judge.usage.tokens_out <= 3 * 48
    replies = [json.loads(file.read_text())["reply"] for file in sorted(tmp_path.rglob("*.json"))]
    assert len(replies) == 3
    assert all(len(one) > 5 for one in replies)
    assert sorted(map(str, map(read_verdict, replies))) == sorted(map(str, verdicts))
    # The rerun is free: the address is the same, and nobody needs to be there.
    again = chat(llama_server, tmp_path, tokens=48)
    assert again.judge(exchanges) == verdicts
    assert again.usage.tokens_in == 0
    # A prompt beyond the context is unread, with the server's own words.
    (verdict,) = chat(llama_server, tmp_path).judge([Exchange("Go on.", "word " * 6000)])
    assert verdict == Verdict(UNREAD, "request not taken")
    said = capsys.readouterr().err
    assert "1 of 1 requests were not taken: HTTP 400" in said
    assert "maximum context length" in said
    assert "(3 from the cache, " in said
