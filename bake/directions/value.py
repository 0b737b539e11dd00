"""The value: one direction or several behind each of some blocks, and where they come from."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from types import MappingProxyType

import torch
from torch import Tensor

from bake.errors import DirectionsError
from bake.recipe.values import HIGHEST_BASIS, HIGHEST_LAYER

__all__ = [
    "FIGURES",
    "FLOATS",
    "MAX_WIDTH",
    "Directions",
    "Origin",
    "Unplaced",
    "check_basis",
    "check_vector",
    "in_words",
    "key_of",
    "layer_of",
    "shown",
    "stacked",
]

MAX_WIDTH = 1 << 17
"""Beyond the width of every known model, so that no claim in a header sets an allocation."""
FIGURES: Mapping[str, str] = MappingProxyType(
    {
        "spread": "the mean cosine of directions from resampled topics with this one",
        "auc": "the share of pairs, on held-out topics, in which the refused prompt reads higher",
        "r": "Pearson's r of the reading on held-out topics with the refusal confidence",
        "cosmic": "how far it moves either class's states to the other's, from -2 to 2",
        "bypass": "the log odds of refusing refused prompts in the first token, with it taken out",
        "induce": "the log odds of refusing answered prompts in the first token, with it added",
        "kl": "what answered prompts' first token loses without it, KL(clean ‖ without) in nats",
    }
)
"""What is known of how good an estimate is, in the order in which it is shown."""
DIGITS = 6
# Of the smallest singular value of rows of length 1: below it, float32 cannot tell their span.
DEPENDENT = 1e-4
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Origin:
    """Where directions come from; a field is empty where the file does not say.

    `site` is the place in the stream that they were measured at: `out`, behind the whole block,
    or `mid`, between its attention and its MLP.
    """

    model: str = ""
    estimator: str = ""
    site: str = "out"
    source: str = ""

    def __post_init__(self) -> None:
        if self.site not in ("mid", "out"):
            raise DirectionsError(
                f"site: directions lie behind blocks (out) or in them (mid), not at "
                f"{shown(self.site)}; measure them there, or upgrade bake"
            )

    def as_json(self) -> dict[str, str]:
        """The fields by name."""
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, object]) -> "Origin":
        """The fields that `values` has as text, without what would steer a terminal."""
        known = {one.name for one in fields(cls)}
        return cls(
            **{
                key: text if text.isprintable() else ascii(text)
                for key, text in values.items()
                if key in known and isinstance(text, str)
            }
        )


@dataclass(frozen=True, eq=False)
class Directions:
    """By layer a vector [d], or several [k, d], float32, behind that block, counted from 0.

    The vectors are not of length 1: each is as long as the gap between the two classes
    that it separates, so that a strength counts in gaps; several of one layer are all as long
    as the gap within their span. They must be linearly independent, and need not be orthogonal.
    `figures` by layer say how good an estimate it is, by the names of FIGURES; `readings` by
    layer and role, of directions that were just fitted, where prompts lie along it
    (`bake.fit.readings`). Raises
    DirectionsError where a vector is not finite, zero, or of another width, or lies in the
    span of its layer's others.

    >>> Directions({3: torch.ones(4)}).width
    4
    >>> Directions({3: torch.eye(4)[:2]}).basis(3).shape
    torch.Size([2, 4])
    """

    vectors: Mapping[int, Tensor]
    origin: Origin = Origin()
    figures: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    readings: Mapping[int, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.vectors:
            raise DirectionsError("there is no direction; give at least one direction.LAYER")
        found = {
            layer_of(layer, bare=True): _float(key_of(layer), vector)
            for layer, vector in sorted(self.vectors.items())
        }
        first = next(iter(found))
        for layer, vector in found.items():
            if vector.shape[-1] != found[first].shape[-1]:
                raise DirectionsError(
                    f"{key_of(layer)} has width {vector.shape[-1]} and {key_of(first)} "
                    f"{found[first].shape[-1]}; all must be of one model's stream"
                )
        object.__setattr__(self, "vectors", MappingProxyType(found))
        kept = {
            layer: {name: round(figures[name], DIGITS) for name in FIGURES if name in figures}
            for layer in found
            if (figures := self.figures.get(layer))
        }
        object.__setattr__(self, "figures", MappingProxyType(kept))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers, ascending."""
        return tuple(self.vectors)

    @property
    def width(self) -> int:
        """The width d of the stream."""
        return next(iter(self.vectors.values())).shape[-1]

    @property
    def several(self) -> tuple[int, ...]:
        """The layers that have more than one direction."""
        return tuple(layer for layer, vector in self.vectors.items() if vector.ndim > 1)

    def basis(self, layer: int) -> Tensor:
        """The directions [k, d] of a layer."""
        vector = self.vectors[layer]
        return vector if vector.ndim > 1 else vector[None]

    def at(self, layers: Iterable[int]) -> "Directions":
        """Those of some layers."""
        return replace(self, vectors={layer: self.vectors[layer] for layer in layers})

    def first(self) -> "Directions":
        """The first direction of every layer; figures are of all of them, and so left out."""
        figures = {
            layer: found for layer, found in self.figures.items() if layer not in self.several
        }
        return Directions(
            {layer: self.basis(layer)[0] for layer in self.layers}, self.origin, figures
        )

    def table(self) -> str:
        """Origin, width, the length of every vector, and its figures, as plain text."""
        rows = [(str(layer), vector) for layer, vector in self.vectors.items()]
        return _table(self.origin, self.width, rows, self.figures)


@dataclass(frozen=True, eq=False)
class Unplaced:
    """A single vector [d] whose file does not say which layer it is of."""

    vector: Tensor
    origin: Origin = Origin()

    def __post_init__(self) -> None:
        check_vector("the vector", self.vector.shape)
        object.__setattr__(self, "vector", _float("the vector", self.vector))

    def at(self, layer: int) -> Directions:
        """The same vector behind a block."""
        return Directions({layer: self.vector}, self.origin)

    def table(self) -> str:
        """As of Directions."""
        return _table(self.origin, len(self.vector), [("not named", self.vector)])


def stacked(array: Tensor, origin: Origin) -> Directions | Unplaced:
    """An array [d], or [layers, d] with row L behind block L, where rows of zeros are none."""
    if array.ndim == 1:
        return Unplaced(array, origin)
    return Directions({row: one for row, one in enumerate(array) if one.count_nonzero()}, origin)


def key_of(layer: int | str) -> str:
    """The name of a layer's tensor in a file."""
    return f"direction.{layer}"


def layer_of(key: object, bare: bool = False) -> int:
    """The layer that a key names: `direction.15`, and where `bare` is right also `15` and 15."""
    if bare and type(key) is int and 0 <= key <= HIGHEST_LAYER:
        return key
    if isinstance(key, str):
        text = key_of(key) if bare and key.isdecimal() else key
        match = re.fullmatch(r"direction\.(0|[1-9]\d{0,2})", text, re.ASCII)
        if match:
            return int(match[1])
    raise DirectionsError(
        f"{shown(key)} is no name of a direction; expected direction.LAYER, "
        f"a layer from 0 to {HIGHEST_LAYER}"
    )


def check_vector(what: str, shape: Sequence[int]) -> None:
    """Refuse a shape that is not that of one vector."""
    if len(shape) != 1 or not 1 <= shape[0] <= MAX_WIDTH:
        raise DirectionsError(
            f"{what} has shape {shown(list(shape))}; expected one vector [width], "
            f"of 1 to {MAX_WIDTH} numbers"
        )


def check_basis(what: str, shape: Sequence[int]) -> None:
    """Refuse a shape that is neither that of one vector nor that of several."""
    if len(shape) == 2:
        if not 1 <= shape[0] <= min(HIGHEST_BASIS, shape[1]):
            raise DirectionsError(
                f"{what} has shape {shown(list(shape))}; expected one vector [width], or several "
                f"[k, width] with k up to {HIGHEST_BASIS} and the width"
            )
        shape = shape[1:]
    check_vector(what, shape)


def shown(value: object) -> str:
    """A stranger's value in an error message: on one line, printable, and short."""
    if not isinstance(value, str | int | float | list | None):
        return f"a {type(value).__name__}"
    try:
        text = ascii(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "a huge number"
    return text if len(text) <= 60 else f"{text[:59]}…"


def in_words(layers: Iterable[int]) -> str:
    """Layers as a person writes them: `1, 5-8`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if run[1:] else str(run[0]) for run in runs)


def _float(what: str, vector: Tensor) -> Tensor:
    """The vectors in float32, detached from what they came from; refuses what is no direction.

    A basis of one vector is that vector.
    """
    check_basis(what, vector.shape)
    if vector.dtype not in FLOATS:
        kind = str(vector.dtype).removeprefix("torch.")
        raise DirectionsError(f"{what} is of type {kind}; save it as float32")
    found = vector.detach().to(torch.float32, copy=True).contiguous()
    if not torch.isfinite(found).all():
        raise DirectionsError(f"{what} is not finite (NaN or infinity); measure it again")
    rows = found.double().reshape(-1, found.shape[-1])
    lengths = rows.norm(dim=1, keepdim=True)
    if not lengths.all():
        raise DirectionsError(f"{what} is all zeros, which is no direction; leave it out")
    if torch.linalg.svdvals(rows / lengths)[-1] < DEPENDENT:
        raise DirectionsError(
            f"{what}: of its {len(rows)} vectors one lies in the span of the others; leave it out"
        )
    return found if len(rows) > 1 else found.flatten()


def _table(
    origin: Origin,
    width: int,
    rows: Sequence[tuple[str, Tensor]],
    figures: Mapping[int, Mapping[str, float]] | None = None,
) -> str:
    facts = {**origin.as_json(), "width": str(width), "layers": str(len(rows))}
    lines = [f"{name:<10} {text}" for name, text in facts.items() if text]
    by_row = {str(layer): found for layer, found in (figures or {}).items()}
    names = [name for name in FIGURES if any(name in found for found in by_row.values())]
    # Of several directions of a layer: how near each is to the first.
    cosine = ["cosine"] if any(vector.ndim > 1 for _, vector in rows) else []
    cells = [["layer", "norm", *cosine, *names]]
    for name, several in rows:
        found = by_row.get(name, {})
        written = [f"{found[figure]:.3f}" if figure in found else "" for figure in names]
        first, *others = several.reshape(-1, width)
        cells.append([name, f"{float(first.norm()):.6g}", *("" for _ in cosine), *written])
        for vector in others:
            near = f"{float(torch.cosine_similarity(vector, first, dim=0)):.3f}"
            cells.append([name, f"{float(vector.norm()):.6g}", near])
    return "\n".join(
        [*lines, "", *(" ".join(f"{cell:<10}" for cell in row).rstrip() for row in cells)]
    )
