"""Probes in the null space of what is not steered."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bake.activations import Conversation
from bake.fit.protect import busiest, in_null_space, unread
from bake.fit.readout import ridge_solutions
from bake.model import LiveModel
from tests.test_fit import drawn
from tests.through_disk import recipe_of
from tests.word_fit import WORDS, word_fit, word_prompts

SHARE = 0.25
PASSAGE = "w40 w41 w42"  # of `word_fit`


def test_unread_axes_are_those_along_which_the_samples_are_largest() -> None:
    samples = drawn(1, 200, 12) * torch.arange(1.0, 13)
    gram = samples.T @ samples / len(samples)
    axes, wanted = unread(gram, SHARE), busiest(samples, SHARE)
    assert axes.shape == wanted.shape == (9, 12)
    torch.testing.assert_close(axes.T @ axes, wanted.T @ wanted)
    # One axis stays to be read, and a probe with it.
    least = unread(gram, 1e-6)
    assert least.shape == (11, 12)
    assert float(ridge_solutions(gram, drawn(5, 1, 12), 0.05, least).norm()) > 0


def test_a_solution_across_unseen_axes_is_the_best_that_reads_nothing_along_them() -> None:
    rows, wanted, ridge = drawn(2, 60, 10), drawn(3, 3, 10), 0.05
    gram = rows.T @ rows / len(rows)
    unseen = torch.linalg.qr(drawn(4, 10, 4)).Q.T
    found = ridge_solutions(gram, wanted, ridge, unseen)
    # In coordinates of what is orthogonal to them, by hand.
    inner = torch.linalg.svd(unseen).Vh[4:]
    seen = in_null_space(torch.eye(10).double(), unseen)
    size = ridge * (seen @ gram @ seen).diagonal().mean()
    small = torch.linalg.solve(inner @ gram @ inner.T + size * torch.eye(6).double(), inner)
    torch.testing.assert_close(found, wanted @ inner.T @ small)
    assert float((found @ unseen.T).abs().max()) < 1e-12
    assert not torch.allclose(found, ridge_solutions(gram, wanted, ridge), rtol=0.1)


def still_inputs(model: LiveModel, module: str) -> Tensor:
    """E a aᵀ of general prompts and of text, each alike, at the tokens where a gate decides."""
    kinds: list[list[Conversation]] = [[], []]
    for one in word_prompts(WORDS["general"]):
        start = model.render(one.text)
        (answer,) = model.answer([start], 32, 1)
        ids = (*start, *answer[:10])
        first = max(0, len(start) - 6)
        kinds[0].append(Conversation(ids, len(start) - 1, tuple(range(first, len(ids)))))
    ids = tuple(model.tokenizer(PASSAGE, add_special_tokens=False).input_ids)
    kinds[1].append(Conversation(ids, len(ids) - 1, tuple(range(len(ids)))))
    grams = []
    for kind in kinds:
        seen: list[Tensor] = []
        handle = model.module(module).register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0][0])
        )
        rows = []
        for one in kind:
            with torch.inference_mode():
                model.model(torch.tensor([one.ids]))
            rows.append(seen.pop()[list(one.decision)])
        handle.remove()
        samples = torch.cat(rows).double()
        grams.append(samples.T @ samples / len(samples))
    return grams[0] + grams[1]


@pytest.mark.parametrize("ordered", [False, True])
def test_a_fitted_probe_reads_along_the_quietest_axes_alone(
    tiny_llama: Path, ordered: bool
) -> None:
    gate = {"op": "gate", "layers": [1], "sites": ["mlp"], "strength": -1.0, "ordered": ordered}
    model, found = word_fit(tiny_llama, recipe_of({**gate, "null_space": SHARE}))
    _, plain = word_fit(tiny_llama, recipe_of(gate))
    (probe,), (free,) = found.kept.values(), plain.kept.values()
    values, axes = torch.linalg.eigh(still_inputs(model, "model.layers.1.mlp.down_proj"))
    quiet = round(SHARE * len(values))
    loud = axes[:, quiet:]
    assert values[quiet] > 1.03 * values[quiet - 1]  # so the two spaces are told apart
    assert float((probe.double() @ loud).norm()) < 1e-3 * float(probe.norm())
    assert float((free.double() @ loud).norm()) > 0.1 * float(free.norm())
    reads = {role: one for each in found.openings.values() for role, one in each.items()}
    assert reads["target"] > 5 * abs(reads["general"])
