"""Prompt sets of the Hub, from a local server that speaks its endpoints, pinned by commit."""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.test_prompts import COMMIT, hub_rows

OLD, API = "a" * 40, "/api/datasets/somebody/questions/tree/"
RESOLVE = "/datasets/somebody/questions/resolve/"
HEADER = """\
---
configs:
- config_name: easy
  data_files: easy.jsonl
- config_name: hard
  data_files:
  - split: eval
    path: hard/*.jsonl
---
"""


def rows(words: str) -> bytes:
    lines = [json.dumps({"text": f"{words} {n}?", "topic": f"t{n}"}) for n in range(3)]
    return "\n".join(lines).encode()


class Hub(ThreadingHTTPServer):
    """Two commits of one dataset; `cut` files break off in the middle."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits = {
            OLD: {"easy.jsonl": rows("Old")},
            COMMIT: {
                "README.md": HEADER.encode(),
                "easy.jsonl": rows("Easy"),
                "hard/part.jsonl": rows("Hard"),
                "weights.bin": b"\0" * 1000,
                "script.py": b"raise SystemExit('code of a repository was run')",
            },
        }
        self.asked: list[str] = []
        self.cut = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.respond(body=False)

    def do_GET(self) -> None:
        self.respond(body=True)

    def respond(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        for start in (API, RESOLVE):
            commit, _, name = path.removeprefix(start).partition("/")
            if not path.startswith(start):
                continue
            if commit not in self.server.commits:
                return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
            files = self.server.commits[commit]
            if start == API:
                listed = [
                    {"type": "file", "path": one, "size": len(text), "oid": digest(text)}
                    for one, text in files.items()
                ]
                return self.send(200, json.dumps(listed).encode(), {}, body)
            if name in files:
                headers = {"X-Repo-Commit": commit, "ETag": f'"{digest(files[name])}"'}
                return self.send(200, files[name], headers, body)
        return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

    def send(self, status: int, text: bytes, headers: dict[str, str], body: bool) -> None:
        begun = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        if begun:
            headers |= {"Content-Range": f"bytes {begun}-{len(text) - 1}/{len(text)}"}
            status, text = 206, text[begun:]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if body:
            cut = self.server.cut and "ETag" in headers
            self.wfile.write(text[: len(text) // 2] if cut else text)

    def log_message(self, *_: object) -> None:
        pass


def digest(text: bytes) -> str:
    return hashlib.sha1(text).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "BAKE_CACHE": str(tmp_path / "bake"),
    }


def read(environment: dict[str, str], **place: str) -> tuple[list[str], str]:
    out, err = hub_rows(environment, json.dumps(place))
    return [row[0] for row in json.loads(out)] if out else [], err


def test_a_dataset_is_fetched_at_its_commit_once(hub: Hub, environment: dict[str, str]) -> None:
    hard = {"revision": COMMIT, "subset": "hard", "split": "eval"}
    assert read(environment, **hard) == ([f"Hard {n}?" for n in range(3)], "")
    assert read(environment, revision=OLD) == ([f"Old {n}?" for n in range(3)], "")
    fetched = [one for one in hub.asked if one.startswith("GET /datasets")]
    # Rows and the README that names the subsets; no weights, no code.
    names = ("README.md", "easy.jsonl", "hard/part.jsonl")
    assert sorted(fetched) == [
        *(f"GET {RESOLVE}{COMMIT}/{name}" for name in names),
        f"GET {RESOLVE}{OLD}/easy.jsonl",
    ]
    hub.asked.clear()
    assert read(environment, **hard)[0] == [f"Hard {n}?" for n in range(3)]
    assert not [one for one in hub.asked if one.startswith("GET /datasets")]


def test_what_the_hub_does_not_have_or_breaks_off_is_one_line(
    hub: Hub, environment: dict[str, str]
) -> None:
    found, err = read(environment, revision="f" * 40)
    assert (found, len(err.splitlines())) == ([], 1), err
    assert f"the Hub gave no such dataset at revision {'f' * 40}" in err
    hub.cut = True
    found, err = read(environment, revision=OLD)
    # Above it stand the client's own warnings, one an attempt.
    assert (found, "Traceback" in err) == ([], False), err
    assert err.splitlines()[-1].startswith("hub:somebody/questions: the Hub gave no such dataset")
    # Nothing of the broken file is taken for the set.
    hub.cut = False
    assert read(environment, revision=OLD)[0] == [f"Old {n}?" for n in range(3)]
