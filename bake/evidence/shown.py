"""Everything that is known of a bake: its folder, and files of other commands beside it."""

from dataclasses import dataclass, replace
from pathlib import Path

from bake.evidence.answers import ANSWERS, Answer, read_answers
from bake.evidence.baked import Evidence
from bake.evidence.evaluation import Evaluation, read_evaluation
from bake.evidence.geometry import Geometry, read_geometry
from bake.evidence.manifest import Manifest
from bake.evidence.reading import check_model
from bake.evidence.scores import Score, read_scores

__all__ = ["Beside", "Shown", "read_shown"]


@dataclass(frozen=True)
class Beside:
    """Files of other commands that are shown with a bake.

    `geometry` is a map of `bake geometry`, `scores` a choice of `bake select` or directions of
    `bake fit`, `evaluation` what `bake eval` wrote of the folder.
    """

    geometry: Path | None = None
    scores: Path | None = None
    evaluation: Path | None = None

    @property
    def files(self) -> dict[str, Path]:
        """Those that are there, by a name for each."""
        named = {"geometry": self.geometry, "selection": self.scores, "evaluation": self.evaluation}
        return {f"{name}{path.suffix}": path for name, path in named.items() if path}


@dataclass(frozen=True)
class Shown:
    """Everything that a report shows.

    `scores` are of every layer that was looked at, those of the edits alone where no other file
    was given.
    """

    evidence: Evidence
    answers: tuple[Answer, ...]
    scores: tuple[Score, ...] = ()
    geometry: Geometry | None = None
    evaluation: Evaluation | None = None

    @classmethod
    def of(cls, evidence: Evidence, answers: tuple[Answer, ...]) -> "Shown":
        """A bake alone."""
        found = evidence.manifest.fit.figures.items()
        scores = (Score("the bake's", layer, figures) for layer, figures in found)
        return cls(evidence, answers, tuple(scores))

    @property
    def manifest(self) -> Manifest:
        """The values of `bake.json`."""
        return self.evidence.manifest

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of the edits."""
        edits = self.manifest.plan.edits
        return tuple(sorted({one.layer for one in edits if one.layer is not None}))


def read_shown(folder: Path, beside: Beside) -> Shown:
    """Read a baked folder, and files beside it.

    Raises ManifestError where the folder has no manifest and answers of a bake, InputError or
    DirectionsError for a file that is not what it should be, or of another model.
    """
    evidence = Evidence.read(folder)
    model = evidence.manifest.model
    found = Shown.of(evidence, read_answers(folder / ANSWERS))
    if beside.geometry:
        mapped = read_geometry(beside.geometry)
        check_model(beside.geometry, mapped.model, model)
        found = replace(found, geometry=mapped)
    if beside.scores:
        found = replace(found, scores=tuple(read_scores(beside.scores, model)))
    if beside.evaluation:
        found = replace(found, evaluation=read_evaluation(beside.evaluation, folder))
    return found
