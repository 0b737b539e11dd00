"""How the directions of refusal lie to each other: a map of cosines."""

from collections.abc import Mapping

from bake.evidence import Shown
from bake.html.svg import Figure

__all__ = ["cosines"]

CELL, LETTER = 27, 6


def cosines(shown: Shown) -> Mapping[str, Figure]:
    """One picture: the stronger the colour, the further from 0; numbers in every cell."""
    if shown.geometry is None:
        return {}
    found = shown.geometry.cosines
    left = LETTER * max(map(len, found.names), default=0) + 22
    side = CELL * len(found.names)
    figure = Figure(left + side + 1, side + 30, "Cosines between the directions")
    for row, (name, values) in enumerate(zip(found.names, found.values, strict=True)):
        y = 24 + CELL * row
        figure.text(left - 6, y + CELL / 2 + 4, f"{name} {row + 1}", anchor="end")
        figure.text(left + CELL * (row + 0.5), 16, str(row + 1), "tick", "middle")
        for column, value in enumerate(values):
            corner = (left + CELL * column, y)
            tip = f"{name}, {found.names[column]}: {value:.3f}"
            kind = "plus" if value > 0 else "minus"
            figure.box(corner, (CELL - 1, CELL - 1), kind, min(abs(value), 1.0) * 0.6, tip)
            words = f"{round(value, 2) + 0.0:.2f}".replace("0.", ".", 1)
            figure.text(corner[0] + CELL / 2, y + CELL / 2 + 3, words, "cell", "middle")
    return {"map": figure}
