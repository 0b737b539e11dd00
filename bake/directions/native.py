"""bake's own file of directions: safetensors, so nothing in it can run.

The tensors are `direction.{layer}`, F32 [width], or [k, width] where a layer has k
directions. `__metadata__` has text under `format`
(`bake.directions`), `version` (`1`), `bake` (the version that wrote it), `width`, `layers`
(`15,16`), `model`, `estimator`, `site` and `source`, and where figures are known `figures`,
a JSON object by layer. A file without that `format` is read too, by its tensors alone.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from bake import __version__
from bake.checkpoint import EDITABLE, read_shard, read_tensor
from bake.directions.value import Directions, Origin, check_basis, key_of, layer_of, shown
from bake.errors import CheckpointError, DirectionsError

__all__ = ["read_native", "write_native"]

FORMAT, VERSION = "bake.directions", "1"


def read_native(path: Path) -> Directions:
    """Read directions; the header is checked in full before a tensor is read."""
    try:
        shard = read_shard(path)
        placed = {}
        for info in shard.tensors:
            check_basis(shown(info.name), info.shape)
            if info.dtype not in EDITABLE:
                raise DirectionsError(
                    f"{shown(info.name)} is of type {info.dtype}; save it as float32"
                )
            placed[layer_of(info.name)] = info
        ours = shard.metadata if _is_ours(shard.metadata) else {}
        vectors = {layer: read_tensor(info) for layer, info in placed.items()}
    except CheckpointError as error:
        # A name in a foreign header may hold line breaks.
        reason = " ".join(str(error).removeprefix(f"{path}: ").split())
        raise DirectionsError(reason[:240]) from error
    figures = _read_figures(ours["figures"]) if ours and "figures" in ours else {}
    found = Directions(vectors, Origin.of(ours or {}), figures)
    for key, text in _described(found).items():
        if ours and ours.get(key) != text:
            raise DirectionsError(
                f"__metadata__.{key} is {shown(ours.get(key))}, its tensors say {text!r}; "
                "save the directions again"
            )
    return found


def write_native(directions: Directions, path: Path) -> None:
    """Write directions; the same ones give the same bytes."""
    header: dict[str, object] = {
        "__metadata__": {
            "format": FORMAT,
            "version": VERSION,
            "bake": __version__,
            **_described(directions),
            **directions.origin.as_json(),
            **_written_figures(directions),
        }
    }
    end = 0
    for layer, vector in directions.vectors.items():
        start, end = end, end + 4 * vector.numel()
        entry = {"dtype": "F32", "shape": list(vector.shape), "data_offsets": [start, end]}
        header[key_of(layer)] = entry
    # safetensors' own writer orders the metadata at random; the padding is the format's.
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = [vector.numpy().astype("<f4").tobytes() for vector in directions.vectors.values()]
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data))


def _described(directions: Directions) -> dict[str, str]:
    """What the metadata repeats of the tensors, for readers that look at nothing else."""
    layers = ",".join(map(str, directions.layers))
    return {"width": str(directions.width), "layers": layers}


def _written_figures(directions: Directions) -> dict[str, str]:
    figures = {str(layer): dict(found) for layer, found in directions.figures.items()}
    return {"figures": json.dumps(figures, separators=(",", ":"))} if figures else {}


def _read_figures(text: str) -> dict[int, dict[str, float]]:
    """Figures by layer; refuses what is no finite number, passes over names from other versions."""
    try:
        found = json.loads(text)
        return {
            layer_of(layer, bare=True): {name: _number(figures[name]) for name in figures}
            for layer, figures in found.items()
        }
    except (ValueError, RecursionError, TypeError, AttributeError, DirectionsError) as error:
        raise DirectionsError(
            f"__metadata__.figures is {shown(text)}, no figures by layer; save the directions again"
        ) from error


def _number(value: object) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("not a finite number")
    return float(value)


def _is_ours(metadata: Mapping[str, str] | None) -> bool:
    if metadata is None or metadata.get("format") != FORMAT:
        return False
    if metadata.get("version") != VERSION:
        raise DirectionsError(
            f"__metadata__.version is {shown(metadata.get('version'))}; this bake reads "
            f"{VERSION!r}, so upgrade bake"
        )
    return True
