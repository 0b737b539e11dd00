"""Refusals before and after by set, with their intervals; a picture for each runtime."""

from collections.abc import Mapping

from bake.evidence import Shown
from bake.html.svg import Figure, Scale, ticks

__all__ = ["refusals"]

WIDTH, TOP, ROW, FOOT = 330, 38, 34, 22


def refusals(shown: Shown) -> Mapping[str, Figure]:
    """Percent refused with 95 % intervals: hollow before, filled after."""
    return {runtime: _picture(shown, runtime) for runtime in shown.manifest.after}


def _picture(shown: Shown, runtime: str) -> Figure:
    bake = shown.manifest
    roles = list(bake.after[runtime])
    bottom = TOP + ROW * len(roles)
    figure = Figure(WIDTH, bottom + FOOT, f"Refusals before and after, {runtime}")
    figure.text(0, 12, f"refused, %, {runtime}", "heading")
    figure.dot(6, 25, "before", 4)
    figure.text(15, 29, "before", "note")
    figure.dot(66, 25, "after", 4)
    figure.text(75, 29, "after; lines are 95 % intervals", "note")
    scale = Scale(0, 100, 74, WIDTH - 12)
    figure.across(scale, bottom, ticks(0, 100), TOP)
    for row, role in enumerate(roles):
        middle = TOP + ROW * (row + 0.5)
        figure.text(0, middle + 4, role)
        for when, found, y in (
            ("before", bake.before, middle - 6),
            ("after", bake.after, middle + 6),
        ):
            rate = found[runtime][role]
            if not rate.total:
                continue
            low, high = rate.interval
            tip = f"{role}, {when}: {rate}, 95 % from {low:.1f} to {high:.1f} %"
            figure.line([(scale(low), y), (scale(high), y)], when, tip)
            figure.dot(scale(rate.percent), y, when, 4, tip)
    return figure
