"""What steering along each direction trades: refusals of a set by divergence, a picture a set."""

from collections.abc import Mapping, Sequence
from math import copysign, sqrt

from bake.evidence import Geometry, Point, Shown
from bake.html.svg import Figure, Scale, line_kinds, ticks

__all__ = ["kinds_of", "trades"]

WIDTH, HEIGHT = 330, 230
LEFT, RIGHT, TOP, BOTTOM = 34, 320, 24, 184
CONTROLS = ("generic", "random")


def kinds_of(geometry: Geometry) -> dict[str, str]:
    """The class of every curve; the controls have lines of their own."""
    coloured = line_kinds(name for name in geometry.trades.curves if name not in CONTROLS)
    return coloured | {name: name for name in CONTROLS if name in geometry.trades.curves}


def trades(shown: Shown) -> Mapping[str, Figure]:
    """Percent refused against KL(clean ‖ steered), to the left with a negative strength.

    The divergence is drawn at its square root, which is about proportional to the strength.
    """
    geometry = shown.geometry
    if geometry is None:
        return {}
    return {role: _picture(geometry, role) for role in geometry.trades.base.refused}


def _picture(geometry: Geometry, role: str) -> Figure:
    count = geometry.trades.prompts.get(role, 0)
    kinds = kinds_of(geometry)
    figure = Figure(WIDTH, HEIGHT, f"What each direction trades: {role}", kinds)
    figure.text(0, 12, f"{role}: refused, % of {count}", "heading")
    every = [point for curve in geometry.trades.curves.values() for point in curve]
    furthest = sqrt(max((point.divergence for point in every), default=0.0)) or 1.0
    across, up = Scale(-furthest, furthest, LEFT, RIGHT), Scale(0, 100, BOTTOM, TOP)
    figure.up(up, LEFT, ticks(0, 100), RIGHT)
    marks = [(value, words) for value, words in ticks(0, furthest**2, 4) if value > 0]
    places = [(side * sqrt(value), words) for value, words in marks for side in (-1.0, 1.0)]
    figure.across(across, BOTTOM, [(0.0, "0"), *_apart(places, across)], TOP)
    figure.text(LEFT, BOTTOM + 28, "← away from refusal", "note")
    figure.text(RIGHT, BOTTOM + 28, "towards it →", "note", "end")
    figure.text((LEFT + RIGHT) / 2, BOTTOM + 41, "KL(clean ‖ steered), nats", "note", "middle")
    base = geometry.trades.base.refused[role]
    figure.line([(LEFT, up(base)), (RIGHT, up(base))], "limit", f"unsteered: {base:.1f} %")
    for name, kind in kinds.items():
        curve = geometry.trades.curves[name]
        drawn = [*((_signed(one), one.refused[role]) for one in curve), (0.0, base)]
        points = [(across(x), up(y)) for x, y in sorted(drawn)]
        figure.line(points, kind, name)
        for one in curve:
            tip = (
                f"{name}, strength {one.strength:g}: {one.refused[role]:.1f} %, "
                f"KL {one.divergence:.3f}"
            )
            figure.dot(across(_signed(one)), up(one.refused[role]), kind, 2.6, tip)
    return figure


def _signed(point: Point) -> float:
    return copysign(sqrt(max(point.divergence, 0.0)), point.strength)


def _apart(marks: Sequence[tuple[float, str]], scale: Scale) -> list[tuple[float, str]]:
    """The marks that leave room for each other's words, from the outer ones inwards."""
    kept: list[tuple[float, str]] = []
    for value, words in sorted(marks, key=lambda one: -abs(one[0])):
        taken = [*(scale(other) for other, _ in kept), scale(0.0)]
        if all(abs(scale(value) - place) >= 26 for place in taken):
            kept.append((value, words))
    return kept
