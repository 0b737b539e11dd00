"""What every carrier answers: where the weights hold an added vector."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from bake.arch import Axis, PostNorm
from bake.edits import CreatedTensor

__all__ = ["Carried", "Site"]

Site = Literal["in", "mid", "out"]


@dataclass(frozen=True)
class Carried:
    """The tensor that takes the vector over `multiplier`, and what must exist for it.

    `multiplier` is what the class multiplies the tensor's contribution by; `branch` the
    module, in memory, whose output it joins (empty for the embedding); `axis` the written
    axis of a weight; `norm` what stands between the writer and the stream, if anything does:
    the vector then joins the stream nearly, and only behind that norm. Of a matrix in an
    inserted block, `neurons` is the number of inputs, of which the multiplier is the sum.
    `inserted` are the layers behind which there is a new block.
    """

    carrier: Literal["bias", "block", "ridge", "embedding"]
    tensor: str
    shape: tuple[int, ...]
    dtype: str
    multiplier: float
    branch: str = ""
    axis: Axis = -1
    neurons: int = 0
    norm: PostNorm | None = None
    created: tuple[CreatedTensor, ...] = ()
    config: Mapping[str, object] = field(default_factory=dict)
    inserted: tuple[int, ...] = ()
