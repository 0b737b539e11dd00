"""Everything that runs a model, on whatever device BAKE_DEVICE names: figures to be compared.

    python -m tests.device_figures FOLDER FILE

A tiny llama in FOLDER, the figures as safetensors. The device `other` is made here, without
float64 where LACKING is set.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bake.checkpoint import Checkpoint
from bake.evaluation.drift import of_models
from bake.hooks import Intervention, edits_by_tensor, steered
from bake.model import LiveModel
from bake.recipe import Recipe
from bake.sampling import sampled_answers
from bake.search.behind import Behind
from bake.talk.streamed import streamed
from tests.other_device import register
from tests.through_disk import BATCH, interventions
from tests.word_fit import word_fit

ADD = {"op": "add", "layer": 1, "strength": -0.5}
FITS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "add": (ADD, {**ADD, "layer": 2, "site": "mid", "carrier": "ridge", "constant_error": 9}),
    "ablate": ({"op": "ablate", "layers": [1, 2]},),
    "norms": ({"op": "ablate", "layers": [1, 2], "variant": "norm-preserving"},),
    "gate": ({"op": "gate", "layers": [1, 2], "strength": -1},),
    "ordered": ({"op": "gate", "layers": [1, 2], "strength": -1, "ordered": True},),
}
BLOCK = {"op": "gate", "layers": [1, 2], "strength": -1, "form": "block", "protected": 1}
LEARNED = ("cone", "low-rank-mix")
ROLES = {"evaluate": {"runtimes": ["transformers"]}, "runtimes": ["transformers"]}
PROMPTS = ([1, 7, 30, 11, 52], [1, 7, 30, 2], [1, 7, 9, 10, 11, 12, 13])


def recipe(edits: tuple[Mapping[str, Any], ...], **fit: Any) -> Recipe:
    """A recipe of some edits."""
    values = {"name": "test", "edits": list(edits), "fit": {"ridge": 0.1, **fit}, **ROLES}
    return Recipe.model_validate(values)


def figures(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """By name."""
    for name, edits in FITS.items():
        model, fitted = word_fit(folder, recipe(edits))
        yield from _of_fit(name, model, fitted.interventions)
    base = Checkpoint.open(folder)
    yield from _of_fit("block", model, interventions(base, model.arch, recipe((BLOCK,))))
    for name in LEARNED:
        _, fitted = word_fit(folder, recipe((ADD,), estimator=name, basis=1, steps=2, bootstrap=0))
        yield name, torch.stack(list(fitted.directions.vectors.values()))
    drawn = sampled_answers(model, PROMPTS, samples=2, tokens=4, temperature=1.0, seed=0)
    yield "drawn", torch.tensor([one.ids for each in drawn for one in each])
    yield "likelihood", torch.tensor([sum(one.log_probabilities) for each in drawn for one in each])
    yield "text", torch.tensor(model.sample(torch.tensor([[5], [9]]), 6))
    yield "streamed", torch.tensor(list(streamed(model, PROMPTS[0], 5)))


def _of_fit(
    name: str, model: LiveModel, hooks: Sequence[Intervention]
) -> Iterator[tuple[str, Tensor]]:
    """Edits, logits, answers, and what a search sees."""
    for tensor, edits in edits_by_tensor(hooks).items():
        for number, edit in enumerate(edits):
            for key, value in vars(edit).items():
                if isinstance(value, Tensor):
                    yield f"{name} {tensor} {number} {key}", value
    behind = Behind(model, [PROMPTS], [0])
    with steered(model, hooks):
        yield f"{name} logits", model.logits(BATCH)
        for rows, logits in behind.last(-1):
            yield f"{name} behind {rows}", logits
        yield f"{name} answers", torch.tensor(model.answer(PROMPTS, 3))
    drift = of_models(model, model, hooks, PROMPTS, PROMPTS)
    assert drift.text and drift.first_token is not None
    yield f"{name} drift", torch.tensor([drift.first_token, drift.text.after])


def main() -> None:
    """Write the figures."""
    torch.set_num_threads(1)
    if os.environ.get("BAKE_DEVICE") == "other":
        lacking = torch.float64 if os.environ.get("LACKING") else None
        main.device = register(lacking)  # type: ignore[attr-defined]
    folder, file = map(Path, sys.argv[1:])
    save_file({name: value.detach().clone() for name, value in figures(folder)}, file)


if __name__ == "__main__":
    main()
