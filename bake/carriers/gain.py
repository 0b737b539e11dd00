"""What a post-norm does to a vector that is written in front of it."""

import torch
from torch import Tensor

from bake.arch import PostNorm
from bake.checkpoint import Checkpoint
from bake.errors import ArchitectureError, FitError

__all__ = ["in_front_of", "read_gain"]

# Of the gain's root mean square. What such a channel should receive would be written a
# thousand times as large, and the norm would scale all the rest down.
CLOSED = 1e-3


def read_gain(base: Checkpoint, norm: PostNorm) -> Tensor:
    """The gain g [d] of a post-norm, float32."""
    return norm.offset + base.read(norm.weight).float()


def in_front_of(vector: Tensor, base: Checkpoint, norm: PostNorm) -> Tensor:
    """u = v / g [d]: what must join y / rms(y) so that v joins g ⊙ y / rms(y).

    What the norm writes is as long as g, whatever it reads, so a vector must be shorter in
    units of g: rms(u) < 1. Raises FitError where it is not, and ArchitectureError for a gain
    with an entry at or near zero, behind which no write arrives.
    """
    gain = read_gain(base, norm)
    closed = torch.nonzero(gain.abs() <= CLOSED * gain.square().mean().sqrt()).flatten()
    if len(closed):
        raise ArchitectureError(
            f"{norm.weight}: lets next to nothing of channel {int(closed[0])} through"
            + (f", nor of {len(closed) - 1} more" if len(closed) > 1 else "")
            + ", so no vector can be written in front of it; use op: ablate, or another layer"
        )
    written = vector / gain
    size = float(written.square().mean().sqrt())
    if not size < 1:
        raise FitError(
            f"{norm.weight}: what this norm writes has a fixed length, and the vector is "
            f"{size:.1f} times as long; lower the strength, or take another layer or carrier"
        )
    return written
