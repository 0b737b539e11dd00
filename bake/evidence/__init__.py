"""What bake wrote, read back: by the card, a push, a reproduction, and the report.

`reading` is how a file becomes values. `manifest` are the values of `bake.json`, and `baked` has
them with the recipe in it. `answers`, `geometry`, `scores` and `evaluation` are the other files,
one each; `shown` is all of it together, as a report shows it.
"""

from bake.evidence.answers import ANSWERS, Answer, read_answers
from bake.evidence.baked import Evidence
from bake.evidence.evaluation import Evaluation, read_evaluation
from bake.evidence.geometry import Geometry, Point, read_geometry
from bake.evidence.manifest import MOVED, Converted, Manifest, Parity, Served
from bake.evidence.scores import Score, named_figures, read_scores
from bake.evidence.shown import Beside, Shown, read_shown

__all__ = [
    "ANSWERS",
    "MOVED",
    "Answer",
    "Beside",
    "Converted",
    "Evaluation",
    "Evidence",
    "Geometry",
    "Manifest",
    "Parity",
    "Point",
    "Score",
    "Served",
    "Shown",
    "named_figures",
    "read_answers",
    "read_evaluation",
    "read_geometry",
    "read_scores",
    "read_shown",
]
