"""llama.cpp: the baked GGUF through llama-cpp-python."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import llama_cpp
import torch
from torch import Tensor

from bake.arch import Arch
from bake.errors import VerificationError
from bake.export.provenance import CHAT_TEMPLATE
from bake.gguf_file import GGUFFile
from bake.llama import LlamaModel
from bake.runtimes.template import Conversation

__all__ = ["LlamaCpp"]


class LlamaCpp:
    """A GGUF in llama.cpp, on the CPU; `arch` says what tensors are called there.

    Conversations are rendered by llama-cpp-python's own formatter from the template in the file,
    as its server does. llama-server renders the same template by an engine in C++, which is no
    part of the library.
    """

    name = "llama.cpp"
    version = f"llama-cpp-python {llama_cpp.__version__}"

    def __init__(self, path: Path, arch: Arch, context: int) -> None:
        self._file = GGUFFile.open(path)
        self._arch = arch
        self._model = LlamaModel(path, context=context, parallel=1, threads=torch.get_num_threads())

    def logits(self, ids: Sequence[int]) -> Tensor:  # noqa: D102 (see Runtime)
        return torch.from_numpy(self._model.logits(ids))

    def generate(self, prompt: Sequence[int], tokens: int) -> list[int]:  # noqa: D102
        return self._model.generate([prompt], tokens)[0]

    def render(self, conversation: Conversation) -> str:
        """As above; VerificationError where the file has no template."""
        if not isinstance(self._file.metadata.get(CHAT_TEMPLATE), str):
            raise VerificationError(
                f"{self._file.path}: has no {CHAT_TEMPLATE}, so every runtime guesses one; give a "
                "base GGUF that was converted with the checkpoint's tokenizer"
            )
        return self._model.templated(conversation.turns, conversation.tools)

    def tokenize(self, text: str) -> list[int]:
        """As in the protocol; VerificationError where the file has no vocabulary.

        llama.cpp ends the process there.
        """
        if self._file.metadata.get("tokenizer.ggml.model") in (None, "none"):
            raise VerificationError(
                f"{self._file.path}: has no vocabulary; give a base GGUF that was converted with "
                "the checkpoint's tokenizer"
            )
        return self._model.tokenize(text)

    def tensors(self) -> int:  # noqa: D102
        return len(self._file.tensors)

    def without_effect(
        self, names: Iterable[str], shown: Sequence[Sequence[int]] = ()
    ) -> list[str]:
        """Those that no node of the graph reads (`bake.ggml_graph`)."""
        read = self._model.tensors_read()
        there = dict.fromkeys(self._arch.gguf_name(name) for name in names)
        return [name for name in there if name not in read]

    def close(self) -> None:  # noqa: D102
        self._model.close()
