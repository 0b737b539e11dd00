"""What a post-norm does to a vector that is written in front of it."""

import torch
from torch import Tensor

from bake.arch import PostNorm
from bake.checkpoint import Checkpoint
from bake.errors import ArchitectureError

__all__ = ["in_front_of", "read_gain"]

# Of the gain's root mean square. What such a channel should receive would be written a
# thousand times as large, and the norm would scale all the rest down.
CLOSED = 1e-3


def read_gain(base: Checkpoint, norm: PostNorm) -> Tensor:
    """The gain g [d] of a post-norm, float32."""
    return norm.offset + base.read(norm.weight).float()


def in_front_of(vector: Tensor, base: Checkpoint, norm: PostNorm) -> Tensor:
    """u = v / g [d]: what must join y / rms(y) so that v joins g ⊙ y / rms(y).

    Raises ArchitectureError for a gain with an entry at or near zero, behind which no
    write arrives.
    """
    gain = read_gain(base, norm)
    closed = torch.nonzero(gain.abs() <= CLOSED * gain.square().mean().sqrt()).flatten()
    if len(closed):
        raise ArchitectureError(
            f"{norm.weight}: lets next to nothing of channel {int(closed[0])} through"
            + (f", nor of {len(closed) - 1} more" if len(closed) > 1 else "")
            + ", so no vector can be written in front of it; use op: ablate, or another layer"
        )
    return vector / gain
