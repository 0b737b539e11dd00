"""A round trip as a client of OpenAI's API makes it, through `python -m llama_cpp.server`."""

import http.client
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from bake.errors import VerificationError

__all__ = ["chat", "served_at"]

WAIT: Final = 120.0  # seconds until the server listens
TIMEOUT: Final = 300.0  # seconds for one answer


@contextmanager
def served_at(gguf: Path, context: int) -> Iterator[str]:
    """The base URL of a server of a GGUF, which ends with the body.

    Raises VerificationError, with its last words, where it does not come up.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "llama_cpp.server", "--model", str(gguf)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--n_ctx", str(context)]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        url = f"http://127.0.0.1:{port}/v1"
        try:
            deadline = time.monotonic() + WAIT
            while not _listens(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    words = [line.strip() for line in log if line.strip()] or ["it said nothing"]
                    raise VerificationError(
                        f"python -m llama_cpp.server does not serve {gguf}: {words[-1][:200]}; "
                        "install it: pip install -c constraints.txt 'llama-cpp-python[server]'"
                    )
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def chat(url: str, turns: list[dict[str, str]], tokens: int) -> str:
    """The greedy answer of a server; VerificationError for whatever is no chat completion."""
    body = {"model": "baked", "messages": turns, "temperature": 0, "max_tokens": tokens}
    request = urllib.request.Request(
        f"{url}/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            found: Any = json.loads(response.read(1 << 20))
        content = found["choices"][0]["message"]["content"]
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
        raise VerificationError(f"{request.full_url}: no chat completion: {error}") from error
    return str(content)


def _listens(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/models", timeout=5):
            return True
    except (OSError, http.client.HTTPException):
        return False
