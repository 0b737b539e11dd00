"""Refusals before and after by set, with their intervals; a picture for each runtime."""

from collections.abc import Mapping

from bake.html.evidence import Evidence
from bake.html.svg import Figure, Scale, ticks

__all__ = ["refusals"]

WIDTH, TOP, ROW, FOOT = 330, 38, 34, 22


def refusals(evidence: Evidence) -> Mapping[str, Figure]:
    """Percent refused with 95 % intervals: hollow before, filled after."""
    return {
        runtime: _picture(evidence, runtime)
        for runtime in evidence.manifest.measured.refusals.after
    }


def _picture(evidence: Evidence, runtime: str) -> Figure:
    roles = list(evidence.manifest.measured.refusals.after[runtime])
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
        for when, y in (("before", middle - 6), ("after", middle + 6)):
            rate = evidence.manifest.rate("before" if when == "before" else "after", runtime, role)
            if not rate.total:
                continue
            low, high = rate.interval
            tip = f"{role}, {when}: {rate}, 95 % from {low:.1f} to {high:.1f} %"
            figure.line([(scale(low), y), (scale(high), y)], when, tip)
            figure.dot(scale(rate.percent), y, when, 4, tip)
    return figure
