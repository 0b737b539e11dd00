"""The chat judge: a model behind any server that speaks OpenAI's chat completions."""

import email.utils
import http.client
import json
import os
import queue
import random
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from bake.errors import JudgeError
from bake.judge import UNREAD, Exchange, Question, Verdict
from bake.judge.cache import Replies
from bake.judge.instruction import messages, read_verdict
from bake.judge.thinking import THINK_TAGS, Thinking
from bake.progress import note, progress

__all__ = ["ChatJudge", "Server", "Usage"]

LONGEST = 8 << 20  # bytes of one response
LONGEST_WAIT = 60.0  # seconds between two attempts
PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}
# What a server says of one request, such as a prompt beyond its context, and not of all.
OF_ONE = {400, 413, 422}
JUDGE: Mapping[str, str] = {
    "who": "judge",
    **{name: f"judge.{name}" for name in ("url", "model", "key", "timeout", "attempts")},
}
T = TypeVar("T")


@dataclass(frozen=True)
class Server:
    """Where a judge is served, or a model that is evaluated, and how patient to be with it.

    `url` is the base URL, `key` the name of the environment variable with the API key;
    `tokens` bounds a reply, `timeout` is in seconds a request, `attempts` counts requests
    for one reply, `concurrent` those at a time; the first pause between attempts is of
    `pause` seconds, and each is twice the one before. `names` is what the user calls
    these fields, and who asks; `extra` are further fields of every request.
    """

    url: str
    model: str
    key: str | None = None
    tokens: int = 512
    timeout: float = 120.0
    attempts: int = 6
    concurrent: int = 8
    pause: float = 1.0
    names: Mapping[str, str] = field(default_factory=lambda: JUDGE)
    extra: Mapping[str, object] = field(default_factory=dict)


@dataclass
class Usage:
    """What a judge has cost so far: verdicts, those that were cached, tokens in and out."""

    verdicts: int = 0
    cached: int = 0
    unread: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def __str__(self) -> str:
        return (
            f"{self.verdicts} verdicts ({self.cached} from the cache, {self.unread} not readable), "
            f"{self.tokens_in} tokens in, {self.tokens_out} out"
        )


class _PassingError(Exception):
    """A failure that may pass: its reason, and how long the server asks to wait."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _RefusedError(Exception):
    """The server does not take this one request; its words."""


@dataclass
class ChatJudge:
    """Ask a server for every verdict, several at a time; equal questions are asked once."""

    server: Server
    replies: Replies
    thinking: Thinking = THINK_TAGS
    usage: Usage = field(default_factory=Usage)
    name: ClassVar[str] = "chat"

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """One verdict an exchange, unread where the reply states none or there is none.

        There is none to a request that the server does not take, such as a prompt beyond its
        context: what it says is noted. Raises JudgeError when the server does not answer in the
        attempts that it is given, refuses us, or sends what is no chat completion. Replies that
        came before stay in the cache.
        """
        replies = self.ask(exchanges, messages)
        verdicts = [
            Verdict(UNREAD, "request not taken") if one is None else read_verdict(one)
            for one in replies
        ]
        self.usage.verdicts += len(verdicts)
        self.usage.unread += sum(one.label == UNREAD for one in verdicts)
        if exchanges:
            note(f"judge: {self.usage}")
        return verdicts

    def ask(self, exchanges: Sequence[Exchange], question: Question) -> list[str | None]:
        """What the server says to a question about each; as `judge` raises.

        Without its thinking; None where it does not take the request.
        """
        said = self.said(exchanges, question)
        return [None if one is None else self.thinking.answer(one) or "" for one in said]

    def said(self, exchanges: Sequence[Exchange], question: Question) -> list[str | None]:
        """As `ask`, with the thinking."""
        requests = {one: self._request(one, question) for one in dict.fromkeys(exchanges)}
        # A reply of nothing is none: the next run may have more luck.
        replies = {one: self.replies.get(request) or None for one, request in requests.items()}
        missing = [one for one, reply in replies.items() if reply is None]
        self.usage.cached += len(exchanges) - len(missing)
        refused: Counter[str] = Counter()
        if missing:
            headers = self._headers()

            def ask(one: Exchange, stop: threading.Event) -> str | _RefusedError:
                try:
                    return self._ask(requests[one], headers, stop)
                except _RefusedError as error:
                    return error

            with progress("judge", len(missing)) as update:
                for one, reply in _at_once(missing, ask, self.server.concurrent):
                    if isinstance(reply, str):
                        replies[one] = reply
                    else:
                        refused[str(reply)] += 1
                    update(1)
        for reason, count in refused.items():
            who = self.server.names["who"]
            note(f"{who}: {count} of {len(missing)} requests were not taken: {reason}")
        return [replies[one] for one in exchanges]

    def _request(self, exchange: Exchange, question: Question) -> dict[str, object]:
        """What is asked; the cache goes by all of it."""
        return {
            "url": self.server.url,
            "body": {
                "model": self.server.model,
                "messages": question(exchange),
                "temperature": 0,
                "max_tokens": self.server.tokens,
                **self.server.extra,
            },
        }

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.server.key:
            key = os.environ.get(self.server.key, "").strip()
            if not key:
                raise JudgeError(
                    f"{self.server.names['key']}: the environment variable {self.server.key} is "
                    "not set; put the server's API key there"
                )
            headers["Authorization"] = f"Bearer {key}"
        return headers

    def _ask(
        self, request: Mapping[str, object], headers: Mapping[str, str], stop: threading.Event
    ) -> str:
        """One reply, in as many attempts as it may take; kept in the cache."""
        url = f"{self.server.url.rstrip('/')}/chat/completions"
        sent = urllib.request.Request(url, json.dumps(request["body"]).encode(), dict(headers))
        for attempt in range(1, self.server.attempts + 1):
            try:
                reply = self._reply(_send(sent, self.server.timeout, self.server.names))
            except _PassingError as error:
                wait = max(error.wait, _backoff(attempt, self.server.pause))
                if attempt == self.server.attempts or stop.wait(wait):
                    tries = f"{attempt} attempts" if attempt > 1 else "1 attempt"
                    names = self.server.names
                    patience = [names[one] for one in ("timeout", "attempts") if one in names]
                    more = f", or raise {' or '.join(patience)}" if patience else ""
                    raise JudgeError(
                        f"{names['url']}: {url}: {error}, after {tries}; check that the server "
                        f"runs and serves this path{more}"
                    ) from error
            else:
                if reply:
                    self.replies.put(request, reply)
                return reply
        raise AssertionError("attempts is at least 1")

    def _reply(self, body: bytes) -> str:
        """The text of a chat completion; raises _PassingError for anything else."""
        try:
            found = json.loads(body)
            content = found["choices"][0]["message"].get("content")
            usage = found.get("usage") or {}
            tokens = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
            start = " ".join(body[:60].decode("utf-8", "replace").split())
            raise _PassingError(f"what came is no chat completion: {start!a}") from error
        with _COUNTING:
            self.usage.tokens_in += tokens[0] if isinstance(tokens[0], int) else 0
            self.usage.tokens_out += tokens[1] if isinstance(tokens[1], int) else 0
        # A reasoning model that ran out of tokens says nothing at all: that is no verdict.
        return content if isinstance(content, str) else ""


_COUNTING = threading.Lock()


def _send(request: urllib.request.Request, timeout: float, names: Mapping[str, str]) -> bytes:
    """The body of the response, within `timeout` seconds in all.

    Raises _PassingError for what may pass, _RefusedError where it is about this request alone,
    JudgeError for what will not pass.
    """
    started = time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            parts: list[bytes] = []
            while part := response.read1(1 << 16):
                parts.append(part)
                if time.monotonic() - started > timeout:
                    raise _PassingError(f"no whole answer within {timeout:g} s")
                if sum(map(len, parts)) > LONGEST:
                    raise _PassingError(f"the answer is longer than {LONGEST >> 20} MiB")
            return b"".join(parts)
    except urllib.error.HTTPError as error:
        reason = f"HTTP {error.code}{_said(error)}"
        if error.code in OF_ONE:
            raise _RefusedError(reason) from error
        if error.code not in PASSING:
            raise JudgeError(
                f"{names['url']}: {request.full_url}: {reason}; check {names['url']}, "
                f"{names['model']} and {names['key']}"
            ) from error
        raise _PassingError(reason, _asked_wait(error.headers.get("Retry-After"))) from error
    except TimeoutError as error:
        raise _PassingError(f"no answer within {timeout:g} s") from error
    except urllib.error.URLError as error:
        late = isinstance(error.reason, TimeoutError)
        reason = f"no answer within {timeout:g} s" if late else str(error.reason)
        raise _PassingError(reason) from error
    except (OSError, http.client.HTTPException) as error:
        raise _PassingError(f"the connection broke: {error or type(error).__name__}") from error


def _said(error: urllib.error.HTTPError) -> str:
    """The server's own words, where its answer has them as OpenAI's does; else nothing."""
    try:
        found: Any = json.loads(error.read(1 << 16))
        message = found["error"]["message"] if isinstance(found["error"], dict) else found["error"]
        return f" ({' '.join(str(message).split())[:200]})"
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return ""


def _asked_wait(header: str | None) -> float:
    """Seconds of a Retry-After header, which has a number or a date; 0 where there is none."""
    if not header:
        return 0.0
    try:
        wait = float(header)
    except ValueError:
        try:
            wait = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(wait, 0.0), LONGEST_WAIT)


def _backoff(attempt: int, pause: float) -> float:
    """Seconds before the next attempt, more or less, so that not all come at once."""
    return min(LONGEST_WAIT, pause * 2.0 ** (attempt - 1)) * random.uniform(0.75, 1.25)


def _at_once(
    items: Sequence[Exchange], ask: Callable[[Exchange, threading.Event], T], size: int
) -> Iterator[tuple[Exchange, T]]:
    """Every item with what `ask` says to it, `size` of them at a time, as they come.

    The first exception is raised, and nothing new begins once the caller has left. Nobody waits
    for requests in flight then, as an executor's threads would make the whole process do.
    """
    waiting: queue.SimpleQueue[Exchange] = queue.SimpleQueue()
    found: queue.SimpleQueue[tuple[Exchange, T | None, BaseException | None]] = queue.SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                item = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                found.put((item, ask(item, stop), None))
            except BaseException as error:
                found.put((item, None, error))

    for item in items:
        waiting.put(item)
    for _ in range(min(size, len(items))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in items:
            item, result, error = found.get()
            if error:
                raise error
            yield item, result  # type: ignore[misc]
    finally:
        stop.set()
