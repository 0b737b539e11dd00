"""Who answers: a checkpoint in transformers or a GGUF in llama.cpp, greedily, piece by piece."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal, Protocol

import torch

from bake.archs import find_arch
from bake.checkpoint import Checkpoint
from bake.errors import GGUFError
from bake.llama import LlamaModel
from bake.manifest import read_manifest
from bake.model import LiveModel
from bake.source import find_folder
from bake.talk.streamed import streamed

__all__ = ["RUNTIMES", "Runtime", "Speaker", "Turn", "find_gguf", "pieces", "speaker"]

Runtime = Literal["transformers", "llama.cpp"]
RUNTIMES: tuple[Runtime, ...] = ("transformers", "llama.cpp")
# A role, `system`, `user` or `assistant`, and its words.
Turn = tuple[str, str]


class Speaker(Protocol):
    """A model that answers a conversation."""

    def reply(self, turns: Sequence[Turn], tokens: int) -> Iterator[str]:
        """Pieces of the answer to the last turn, of at most so many tokens."""
        ...


def speaker(model: str, runtime: Runtime | None, context: int) -> AbstractContextManager[Speaker]:
    """Open a model by a folder, a Hub id, `demo`, or a GGUF.

    Without a runtime a .gguf is for llama.cpp and all else for transformers. In llama.cpp a
    baked folder stands for its GGUF, and the conversation has `context` tokens at most. Raises
    CheckpointError or GGUFError for a model that is not there or cannot be loaded.
    """
    of_gguf = model.endswith(".gguf")
    if runtime == "transformers" and of_gguf:
        raise GGUFError(f"{model}: transformers reads folders; take --runtime llama.cpp")
    if of_gguf or runtime == "llama.cpp":
        return _llama(find_gguf(model), context)
    return _transformers(find_folder(model))


def pieces(tokens: Iterator[int], text: Callable[[Sequence[int]], str]) -> Iterator[str]:
    """The text of a stream of tokens as it comes: what is said is never taken back.

    A character whose bytes are not complete waits for the next token.
    """
    ids: list[int] = []
    said = ""
    for token in tokens:
        ids.append(token)
        now = text(ids)
        if not now.endswith("\N{REPLACEMENT CHARACTER}"):
            yield now[len(said) :]
            said = now
    yield text(ids)[len(said) :]


@contextmanager
def _transformers(folder: Path) -> Iterator[Speaker]:
    base = Checkpoint.open(folder)
    arch = find_arch(base.config, str(folder / "config.json"), base.tensors)
    yield _Live(LiveModel.load(folder, arch))


class _Live:
    def __init__(self, model: LiveModel) -> None:
        self._model = model

    def reply(self, turns: Sequence[Turn], tokens: int) -> Iterator[str]:
        prompt = self._model.render_turns(turns)
        return pieces(streamed(self._model, prompt, tokens), self._model.text)


@contextmanager
def _llama(path: Path, context: int) -> Iterator[Speaker]:
    threads = torch.get_num_threads()
    with LlamaModel(path, context=context, parallel=1, threads=threads) as model:
        yield _Llama(model)


class _Llama:
    def __init__(self, model: LlamaModel) -> None:
        self._model = model

    def reply(self, turns: Sequence[Turn], tokens: int) -> Iterator[str]:
        prompt = self._model.render(turns)
        return pieces(self._model.stream(prompt, tokens), self._model.detokenize)


def find_gguf(model: str) -> Path:
    """A GGUF by its own name, the demo's, or the one of a baked folder."""
    if model == "demo":
        from bake.demo import materialise

        return materialise().gguf
    path = Path(model)
    if not path.is_dir():
        if not path.is_file():
            raise GGUFError(f"{model}: no such file; llama.cpp takes a .gguf or a baked folder")
        return path
    manifest = read_manifest(path)
    parts = rf"{re.escape(str(manifest.get('name')))}(-00001-of-\d{{5}})?\.gguf"
    names: list[str] = [name for name in manifest["outputs"] if re.fullmatch(parts, name)]
    if not names:
        raise GGUFError(f"{path}: has no GGUF; take --runtime transformers")
    return path / names[0]
