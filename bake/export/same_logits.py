"""Does a GGUF compute what its checkpoint does? Asked of logits and tokens, in llama.cpp.

A converter that drops a bias, or that finds no key where transformers 5 keeps it under another,
writes a file that loads and is another model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from bake.errors import VerificationError
from bake.llama import LlamaModel
from bake.model import LiveModel, batches

__all__ = ["MOST_APART", "check_same_logits", "logits_apart"]

MOST_APART: Final = 0.1
"""Of the logits' own root mean square: 16 bits make 0.002 to 0.03, a lost key more than 0.3."""
_LEAST_ALIKE: Final = 0.9
_TEXTS, _TOKENS = 8, 96


def check_same_logits(path: Path, model: LiveModel, texts: Sequence[str]) -> float:
    """Return how far apart the logits are, as `logits_apart` does, of a GGUF in floating point.

    Raises VerificationError beyond `MOST_APART`, and where llama.cpp makes other tokens of more
    than a tenth of the texts.
    """
    tokens = _tokens(model, texts)
    with _loaded(path) as converted:
        alike = sum(
            converted.tokenize(text) == ids for text, ids in zip(texts, tokens, strict=True)
        )
    if alike < _LEAST_ALIKE * len(texts):
        raise VerificationError(
            "convert: llama.cpp makes other tokens than the checkpoint's tokenizer of "
            f"{len(texts) - alike} of {len(texts)} texts; its converter does not know this "
            "tokenizer: patch a GGUF of this model with export.gguf.base"
        )
    apart = logits_apart(path, model, texts)
    if not apart <= MOST_APART:
        raise VerificationError(
            f"convert: llama.cpp's logits are {apart:.0%} away from the checkpoint's, "
            f"{MOST_APART:.0%} is allowed; config.json may lack a key that the converter reads and "
            "transformers 5 drops when it saves (rope_theta, scoring_func): take config.json from "
            "the model's first repository, or patch a GGUF of this model with export.gguf.base"
        )
    return apart


def logits_apart(path: Path, model: LiveModel, texts: Sequence[str]) -> float:
    """The root mean square of Δ logits, of centred logits, in units of the checkpoint's own.

    At the first tokens of the first texts.
    """
    shown = [ids[:_TOKENS] for ids in _tokens(model, texts) if ids][:_TEXTS]
    power = error = 0.0
    with _loaded(path) as converted:
        for batch in batches(shown, 0, 1):
            wanted = model.logits(batch)[0]
            found = torch.from_numpy(converted.logits(batch.ids[0].tolist()))
            wanted = wanted[:, : found.shape[1]]
            wanted, found = (one - one.mean(-1, keepdim=True) for one in (wanted, found))
            power += float(wanted.square().sum())
            error += float((found - wanted).square().sum())
    return float((error / power) ** 0.5) if power else 0.0


def _tokens(model: LiveModel, texts: Sequence[str]) -> list[list[int]]:
    return [model.tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def _loaded(path: Path) -> LlamaModel:
    return LlamaModel(path, context=_TOKENS, parallel=1, threads=torch.get_num_threads())
