"""transformers: the baked checkpoint through stock classes, in float32."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from bake.arch import Arch
from bake.model import LiveModel, batches
from bake.runtimes import heard
from bake.runtimes.template import Conversation

__all__ = ["Transformers", "apply_template"]

# Any short text does: what is asked is whether logits move at all.
PROBE = "Hello, world! 1 2 3"


def apply_template(tokenizer: Any, conversation: Conversation) -> str:
    """A conversation by transformers' own rendering, up to the assistant's answer."""
    return str(
        tokenizer.apply_chat_template(
            [dict(turn) for turn in conversation.turns],
            tools=list(conversation.tools) or None,
            add_generation_prompt=True,
            tokenize=False,
        )
    )


class Transformers:
    """A checkpoint in transformers; loading refuses tensors that find no place in the class."""

    name = "transformers"
    version = transformers.__version__

    def __init__(self, folder: Path, arch: Arch) -> None:
        self._model = LiveModel.load(folder, arch, torch.float32)

    def logits(self, ids: Sequence[int]) -> Tensor:  # noqa: D102 (see Runtime)
        (batch,) = batches([ids], 0, 1)
        return self._model.logits(batch)[0]

    def generate(self, prompt: Sequence[int], tokens: int) -> list[int]:  # noqa: D102
        return self._model.answer([prompt], tokens)[0]

    def render(self, conversation: Conversation) -> str:  # noqa: D102
        return apply_template(self._model.tokenizer, conversation)

    def tokenize(self, text: str) -> list[int]:  # noqa: D102
        return list(self._model.tokenizer(text, add_special_tokens=False).input_ids)

    def tensors(self) -> int:  # noqa: D102
        return len(self._model.model.state_dict())

    def without_effect(
        self, names: Iterable[str], shown: Sequence[Sequence[int]] = ()
    ) -> list[str]:
        """Those whose zeroing leaves the logits as they are; experts fused in memory are passed."""
        sequences = [self.tokenize(PROBE), *shown]
        before = list(heard(self.logits, sequences))
        found = []
        for name in names:
            module, _, leaf = name.rpartition(".")
            try:
                parameter = self._model.module(module).get_parameter(leaf)
            except AttributeError:
                continue
            if parameter.is_meta:  # read from disk in every pass
                continue
            kept = parameter.detach().clone()
            parameter.data.zero_()
            now = heard(self.logits, sequences)
            if all(one == was for one, was in zip(now, before, strict=True)):
                found.append(name)
            parameter.data.copy_(kept)
        return found

    def close(self) -> None:  # noqa: D102
        del self._model
