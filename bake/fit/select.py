"""Choose where a direction is measured, by figures for which no text is written."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Final, Literal

__all__ = ["DEPTH", "DIVERGENCE", "Candidate", "best"]

# No layer of the last fifth, and this much divergence in nats without the direction: the limits of
# Arditi et al. 2024 (andyrdt/refusal_direction at 9d852fa), which COSMIC took over.
DEPTH: Final = 0.8
DIVERGENCE: Final = 0.1


@dataclass(frozen=True)
class Candidate:
    """A direction by where it was measured; `token` counts from the prompt's end."""

    site: Literal["mid", "out"]
    token: int
    layer: int
    figures: Mapping[str, float]

    def as_json(self) -> dict[str, object]:
        """The fields by name."""
        return asdict(self)

    @property
    def overrides(self) -> str:
        """What makes a recipe take this direction for all of its edits."""
        return (
            f"--set fit.site={self.site} --set fit.positions.direction={self.token} "
            f"--set fit.layer={self.layer}"
        )


def best(candidates: Iterable[Candidate], depth: int) -> Candidate | None:
    """The candidate without which refused prompts are refused least, in a model of `depth` blocks.

    Only those count that lie in the first four fifths of the blocks, leave answered prompts alone
    (`kl` at most 0.1) and bring about refusal (`induce` above 0); None where there is none, or
    where refusals have no opening of their own to be known by. Source: Arditi et al. 2024
    (arXiv:2406.11717), its selection.
    """
    allowed = [
        one
        for one in candidates
        if one.layer < DEPTH * depth
        and "bypass" in one.figures
        and one.figures["kl"] <= DIVERGENCE
        and one.figures["induce"] > 0
    ]
    return min(allowed, key=lambda one: one.figures["bypass"], default=None)
