"""Tiny models that every test can build, and the demo, made once."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch and llama.cpp start their threads: more threads than cores crawl, those of
# all of xdist's workers together.
os.environ.setdefault(
    "OMP_NUM_THREADS", "1" if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1 else "2"
)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
from hypothesis import settings
from transformers.utils import logging

from bake.commands import main
from bake.demo import Demo, materialise
from tests.chat_server import Answer, Script, Serve
from tests.tiny import TINY, write_tiny

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
logging.disable_progress_bar()
# The first example of a property also pays for torch's start, on a busy machine dearly.
settings.register_profile("bake", deadline=None, derandomize=True)
# Other examples every time: pytest --hypothesis-profile=explore.
settings.register_profile("explore", deadline=None)
settings.load_profile("bake")


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bake(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `bake` in this process; returns the exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bake", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        code = caught.value.code
        return (code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


@pytest.fixture(scope="session", params=sorted(TINY))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint of every model type of the table, through the disk."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    write_tiny(request.param, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random llama checkpoint."""
    folder: Path = tmp_path_factory.mktemp("llama")
    write_tiny("llama", folder)
    return folder


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """The materialised demo, in a cache folder of the tests' own unless one is set."""
    with pytest.MonkeyPatch.context() as patched:
        if "BAKE_CACHE" not in os.environ:
            patched.setenv("BAKE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield materialise()


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Servers that answer as a test says."""
    running: list[Script] = []

    def start(answer: Callable[[int, dict[str, object]], Answer]) -> Script:
        script = Script(answer)
        threading.Thread(target=script.serve_forever, args=(0.01,), daemon=True).start()
        running.append(script)
        return script

    yield start
    for script in running:
        script.shutdown()
        script.server_close()
