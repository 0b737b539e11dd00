"""The model card of a bake: front matter as the Hub reads it, then what people read.

Everything in it comes from the manifest, so a card says nothing that was not measured. `front` has
what the Hub reads, `text` what people read, `evaluation` what `bake eval` adds to both.
"""

from collections.abc import Sequence

from huggingface_hub import ModelCard

from bake.card.front import front_matter
from bake.card.place import Kind, Place
from bake.card.text import sections
from bake.card.words import JUDGES
from bake.evidence import Evaluation, Evidence

__all__ = ["JUDGES", "Kind", "Place", "card", "check_card"]


def card(
    evidence: Evidence,
    place: Place | None = None,
    figures: Sequence[str] = (),
    evaluation: Evaluation | None = None,
) -> str:
    """The card of a bake, for its own folder or for a repository of the Hub.

    `figures` are the paths beside it of SVG files of a report, `evaluation` is what `bake eval`
    found of the bake.
    """
    front = front_matter(evidence, place, evaluation).to_yaml()
    parts = [f"---\n{front}\n---", *sections(evidence, place, figures, evaluation)]
    return "\n\n".join(part for part in parts if part) + "\n"


def check_card(text: str) -> None:
    """Read a card as `huggingface_hub` does, without a network.

    Raises ValueError where its metadata are not what the client understands.
    """
    data = ModelCard(text).data
    if not data.pipeline_tag or not data.eval_results or data.to_yaml() not in text:
        raise ValueError("its metadata do not read back as they were written")
