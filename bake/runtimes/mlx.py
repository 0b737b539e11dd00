"""MLX: the baked checkpoint through mlx-lm, in float32, on the CPU outside of Apple's machines."""

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bake.errors import InputError, VerificationError
from bake.runtimes import heard
from bake.runtimes.template import Conversation
from bake.runtimes.torch_model import PROBE, apply_template

__all__ = ["MLX"]


class MLX:
    """A checkpoint in mlx-lm, which refuses tensors that its class does not have.

    Raises InputError without the extra `mlx`, VerificationError where mlx-lm cannot load it.
    """

    name = "mlx"

    def __init__(self, folder: Path) -> None:
        try:
            import mlx.core as mx
            import mlx.utils
            from mlx_lm import load
        except ImportError as error:
            raise InputError(
                f"--runtime mlx: {error}; install it: pip install -c constraints.txt 'bake[mlx]'"
            ) from error
        self.version = f"mlx-lm {version('mlx-lm')}"
        self._mx, self._utils = mx, mlx.utils
        try:
            self._model, self._tokenizer = load(str(folder))[:2]
        except (OSError, ValueError, TypeError, KeyError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise VerificationError(f"{folder}: mlx-lm cannot load it: {reason[:240]}") from error
        self._model.set_dtype(mx.float32)

    def logits(self, ids: Sequence[int]) -> Tensor:  # noqa: D102 (see Runtime)
        found = self._model(self._mx.array([list(ids)]))[0]
        return torch.from_numpy(np.array(found.astype(self._mx.float32)))

    def generate(self, prompt: Sequence[int], tokens: int) -> list[int]:  # noqa: D102
        from mlx_lm.generate import generate_step

        answer: list[int] = []
        for token, _ in generate_step(self._mx.array(list(prompt)), self._model, max_tokens=tokens):
            if int(token) in self._tokenizer.eos_token_ids:
                break
            answer.append(int(token))
        return answer

    def render(self, conversation: Conversation) -> str:  # noqa: D102
        return apply_template(self._tokenizer, conversation)

    def tokenize(self, text: str) -> list[int]:  # noqa: D102
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def tensors(self) -> int:  # noqa: D102
        return len(self._parameters())

    def without_effect(
        self, names: Iterable[str], shown: Sequence[Sequence[int]] = ()
    ) -> list[str]:
        """Those whose zeroing leaves the logits as they are; renamed ones are passed."""
        sequences, parameters = [self.tokenize(PROBE), *shown], self._parameters()
        before = list(heard(self.logits, sequences))
        found = []
        for name in names:
            if name not in parameters:
                continue
            kept = parameters[name]
            self._put(name, self._mx.zeros_like(kept))
            now = heard(self.logits, sequences)
            if all(one == was for one, was in zip(now, before, strict=True)):
                found.append(name)
            self._put(name, kept)
        return found

    def close(self) -> None:  # noqa: D102
        del self._model

    def _parameters(self) -> dict[str, Any]:
        return dict(self._utils.tree_flatten(self._model.parameters()))

    def _put(self, name: str, value: Any) -> None:
        self._model.update(self._utils.tree_unflatten([(name, value)]))
