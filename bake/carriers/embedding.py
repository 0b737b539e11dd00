"""The `embedding` carrier: the vector on every row of the token embedding.

It is steering at the input of block 0, exact in every runtime. Where the embedding is
the unembedding too, every logit of a position moves alike, so the probabilities stay
(logit softcaps aside).
"""

from bake.arch import Arch
from bake.carriers.carried import Carried
from bake.checkpoint import Checkpoint
from bake.errors import ArchitectureError

__all__ = ["embedding_carrier"]


def embedding_carrier(base: Checkpoint, arch: Arch) -> Carried:
    """The token embedding, over the number that the class multiplies it by.

    Raises ArchitectureError for a tied embedding under a logit softcap.
    """
    if arch.tied(base.tensors) and arch.numbers(base.config).get("final_logit_softcapping"):
        raise ArchitectureError(
            f"model_type '{arch.model_type}': the embedding is tied and the logits are capped, so "
            "a vector on its rows would change the probabilities"
        )
    info = base.find(f"{arch.embeddings[0]}.weight")
    return Carried(
        "embedding",
        info.name,
        info.shape,
        info.dtype,
        arch.embedding_multiplier(base.config),
    )
