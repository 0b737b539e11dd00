"""How good the directions of the layers are, by every figure that is known of them."""

from collections.abc import Mapping

from bake.evidence import Shown, named_figures
from bake.html.svg import Figure, Scale, line_kinds, ticks

__all__ = ["scores", "series_of"]

WIDTH, HEIGHT = 330, 190
LEFT, RIGHT, TOP, BOTTOM = 42, 320, 24, 152


def series_of(shown: Shown) -> dict[str, str]:
    """The class of every series, which is one site and token."""
    return line_kinds(dict.fromkeys(one.series for one in shown.scores))


def scores(shown: Shown) -> Mapping[str, Figure]:
    """Each figure by layer; edited layers are shaded, what `bake select` chose is ringed."""
    return {name: _picture(shown, name) for name in named_figures(shown.scores)}


def _picture(shown: Shown, name: str) -> Figure:
    found = [one for one in shown.scores if name in one.figures]
    layers = [one.layer for one in shown.scores]
    values = [one.figures[name] for one in found]
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or max(abs(high) * 0.06, 0.01)
    every = series_of(shown)
    figure = Figure(WIDTH, HEIGHT, f"{name} by layer", every if len(every) > 1 else None)
    figure.text(0, 12, name, "heading")
    across = Scale(min(layers) - 0.5, max(layers) + 0.5, LEFT, RIGHT)
    up = Scale(low - room, high + room, BOTTOM, TOP)
    for layer in shown.layers:
        if across.low < layer < across.high:
            left, right = across(layer - 0.5), across(layer + 0.5)
            figure.box((left, TOP), (right - left, BOTTOM - TOP), "band")
    figure.up(up, LEFT, ticks(up.low, up.high), RIGHT)
    marks = [(value, words) for value, words in ticks(*_ends(across), 8) if value == int(value)]
    figure.across(across, BOTTOM, marks, BOTTOM)
    figure.text((LEFT + RIGHT) / 2, BOTTOM + 28, "layer", "note", "middle")
    for series, kind in every.items():
        own = sorted((one for one in found if one.series == series), key=lambda one: one.layer)
        figure.line([(across(one.layer), up(one.figures[name])) for one in own], kind, series)
        for one in own:
            x, y = across(one.layer), up(one.figures[name])
            figure.dot(x, y, kind, 2.6, f"{series}, layer {one.layer}: {one.figures[name]:.3f}")
            if one.chosen:
                figure.dot(x, y, "chosen", 6, f"chosen: {series}, layer {one.layer}")
    return figure


def _ends(scale: Scale) -> tuple[float, float]:
    return scale.low + 0.5, scale.high - 0.5
