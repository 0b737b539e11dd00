"""What rounding may leave of an ablated direction, and that no writer leaves more.

A weight written in a type with unit roundoff u (2⁻⁸ in bfloat16, 2⁻¹¹ in float16) is off by at
most u of itself, so of rᵀW' = 0 there remains at most u |r|ᵀ|W'| in each input column, which is
at most u of that column's norm. What the writer adds to the stream for an input x is then at
most u |r|ᵀ|W'| |x| along r. Roundings are independent of each other, so the stream stays well
below u of its own length.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bake.archs import find_arch
from bake.checkpoint import Checkpoint
from bake.edits import RemoveSubspace
from bake.model import LiveModel
from bake.ops.ablate import orthonormal
from tests.through_disk import (
    baked,
    everywhere,
    interventions,
    left_in_stream,
    measured,
    recipe_of,
)
from tests.tiny import TINY, write_tiny

ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def allowed(edit: RemoveSubspace, weight: Tensor, roundoff: float) -> Tensor:
    """u |R|ᵀ|W|, with room for the float32 arithmetic in front of the rounding."""
    bare = RemoveSubspace(edit.tensor, edit.basis.abs(), axis=edit.axis)
    arithmetic = 1e-6 * weight.norm(dim=edit.axis, keepdim=True)
    return roundoff / (1 - roundoff) * bare.component(slice(None), weight.abs()) + arithmetic


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
@pytest.mark.parametrize("model_type", sorted(TINY))
def test_an_ablation_in_half_precision_leaves_what_one_rounding_leaves(
    tmp_path: Path, model_type: str, dtype: torch.dtype
) -> None:
    write_tiny(model_type, tmp_path / "base", dtype=dtype)
    base = Checkpoint.open(tmp_path / "base")
    arch = find_arch(base.config, "config.json")
    layers = arch.layer_count(base.config)
    recipe = recipe_of(everywhere(layers))
    baked(base, arch, recipe, tmp_path / "out")
    written = Checkpoint.open(tmp_path / "out")
    edits = [edit for one in interventions(base, arch, recipe) for edit in one.edits()]
    for edit in edits:
        assert isinstance(edit, RemoveSubspace)
        before, after = (one.read(edit.tensor).float() for one in (base, written))
        limit = allowed(edit, after, ROUNDOFF[dtype])
        assert (edit.component(slice(None), after).abs() <= limit).all(), edit.tensor
        assert (
            edit.component(slice(None), before).abs() > allowed(edit, before, ROUNDOFF[dtype])
        ).any()

    direction = orthonormal(measured(base).directions[layers // 2][None])
    loaded = {
        name: LiveModel.load(tmp_path / name, arch, torch.float32) for name in ("base", "out")
    }
    assert left_in_stream(loaded["out"], direction, layers) < ROUNDOFF[dtype]
    assert left_in_stream(loaded["base"], direction, layers) > 1e-2
