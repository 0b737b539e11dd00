"""Real runtimes behind one interface: what each makes of a baked folder."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from torch import Tensor

from bake.runtimes.template import Conversation

__all__ = ["Runtime", "heard"]


class Runtime(Protocol):
    """A baked model in the runtime that serves it. Logits are float32, answers greedy."""

    name: str
    version: str

    def logits(self, ids: Sequence[int]) -> Tensor:
        """The logits [n, vocabulary] behind each of n tokens."""
        ...

    def generate(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """The greedy answer to a prompt, of at most so many tokens, without the ending one."""
        ...

    def render(self, conversation: Conversation) -> str:
        """A conversation as the runtime's chat template writes it; ValueError where it refuses."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a rendered conversation."""
        ...

    def tensors(self) -> int:
        """How many tensors the runtime has loaded."""
        ...

    def without_effect(
        self, names: Iterable[str], shown: Sequence[Sequence[int]] = ()
    ) -> list[str]:
        """Those of the tensors with these names of the checkpoint that change no logit.

        On a short text, nor on the token ids `shown`: a gate may be shut on the text.
        """
        ...

    def close(self) -> None:
        """Free the model."""
        ...


def heard(
    logits: Callable[[Sequence[int]], Tensor], shown: Iterable[Sequence[int]]
) -> Iterator[bytes]:
    """A hash of the logits of each of some sequences, which a tensor without effect leaves."""
    for ids in shown:
        yield hashlib.sha256(logits(ids).contiguous().numpy().tobytes()).digest()
