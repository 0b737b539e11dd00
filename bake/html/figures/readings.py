"""Where the prompts of every set lie along the direction of a layer: histograms."""

from collections.abc import Mapping

from bake.evidence import Shown
from bake.html.svg import Figure, Scale, ticks

__all__ = ["readings"]

WIDTH, TOP, ROW, FOOT = 330, 22, 38, 32
LEFT, RIGHT = 74, 320


def readings(shown: Shown) -> Mapping[str, Figure]:
    """A picture a layer, a row a set; heights are shares of the set's prompts."""
    found = shown.manifest.fit.readings
    if found is None:
        return {}
    ends = found.low, found.high
    return {
        f"layer {layer}": _picture(layer, ends, by_role)
        for layer, by_role in sorted(found.layers.items())
    }


def _picture(layer: int, ends: tuple[float, float], by_role: Mapping[str, list[int]]) -> Figure:
    bottom = TOP + ROW * len(by_role)
    figure = Figure(WIDTH, bottom + FOOT, f"Prompts along the direction of layer {layer}")
    figure.text(0, 12, f"layer {layer}", "heading")
    across = Scale(*ends, LEFT, RIGHT)
    figure.across(across, bottom, ticks(*ends), TOP)
    words = "0 is the answered mean, 1 the refused one"
    figure.text((LEFT + RIGHT) / 2, bottom + 27, words, "note", "middle")
    shares = {
        role: [one / max(sum(counts), 1) for one in counts] for role, counts in by_role.items()
    }
    highest = max((one for found in shares.values() for one in found), default=0.0) or 1.0
    for row, (role, found) in enumerate(shares.items()):
        ground = TOP + ROW * (row + 1)
        figure.text(0, ground - 12, role)
        figure.text(0, ground - 1, f"n = {sum(by_role[role])}", "note")
        up = Scale(0, highest, ground, ground - ROW + 5)
        width = (RIGHT - LEFT) / max(len(found), 1)
        for place, share in enumerate(found):
            if share:
                corner = (LEFT + width * place, up(share))
                tip = f"{role}: {by_role[role][place]}"
                figure.box(corner, (width - 0.6, ground - up(share)), "bar", tip=tip)
        figure.line([(LEFT, ground), (RIGHT, ground)], "grid")
    return figure
