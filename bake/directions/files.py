"""Reading and writing by format: what a file is, its first bytes say, never its name."""

import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from bake.directions.control_vector import read_control_vector, write_control_vector
from bake.directions.native import read_native, write_native
from bake.directions.numpy_file import read_numpy
from bake.directions.torch_file import read_torch
from bake.directions.value import Directions, Unplaced
from bake.errors import DirectionsError
from bake.staging import staged_file

__all__ = ["load_directions", "placed", "read_directions", "save_directions"]

Found = TypeVar("Found")
Read = Callable[[Path], Directions | Unplaced]
WRITERS = {".safetensors": write_native, ".gguf": write_control_vector}


def load_directions(path: Path, layer: int | None = None) -> Directions:
    """Read directions of any format; `layer` is that of a file with one vector and no name.

    Raises DirectionsError or GGUFError, in one line, for everything that a file can have
    wrong, and for a bare vector without a layer.
    """
    return placed(path, read_directions(path), layer)


def placed(path: Path, found: Directions | Unplaced, layer: int | None) -> Directions:
    """What was read of a file, with the layer that a bare vector needs."""
    if isinstance(found, Directions):
        return found
    if layer is None:
        raise DirectionsError(
            f"{path}: holds one vector and does not say of which layer; name it with "
            f"`bake directions {path} --layer N --output NAME.safetensors`"
        )
    return _in_file(path, lambda _: found.at(layer))


def read_directions(path: Path) -> Directions | Unplaced:
    """As `load_directions`, but a bare vector stays one."""
    found = _in_file(path, lambda path: _reader(path)(path))
    if not found.origin.source:
        found = replace(found, origin=replace(found.origin, source=path.name))
    return found


def save_directions(directions: Directions, path: Path, overwrite: bool = False) -> None:
    """Write directions as the name asks: .safetensors, or .gguf for llama.cpp.

    The file appears when it is complete. Raises OutputError where it exists.
    """
    write = WRITERS.get(path.suffix)
    if write is None:
        raise DirectionsError(f"{path}: directions are written to .safetensors or .gguf")
    with staged_file(path, overwrite) as staging:
        _in_file(path, lambda _: write(directions, staging))


def _reader(path: Path) -> Read:
    try:
        # A pipe would block on opening, so what the path is comes first.
        if "\0" in str(path) or not stat.S_ISREG(path.stat().st_mode):
            raise DirectionsError("is not a file; give a file of directions")
        with path.open("rb") as stream:
            start = stream.read(9)
    except OSError as error:
        raise DirectionsError(f"cannot be read: {error.strerror}; check the path") from error
    readers: tuple[tuple[bytes, Read], ...] = (
        (b"GGUF", read_control_vector),
        (b"\x93NUMPY", read_numpy),
        (b"PK\x03\x04", read_torch),
    )
    for magic, read in readers:
        if start.startswith(magic):
            return read
    # A header may well be of 0x..80 bytes, so this comes before the opcode of a pickle.
    if start[8:] == b"{":
        return read_native
    if start.startswith(b"\x80"):
        raise DirectionsError(
            "is a bare pickle, which bake never loads; save it with today's torch.save"
        )
    raise DirectionsError(
        "is no safetensors file, GGUF, .npy or .pt by its first bytes; it may be cut, so save it "
        "again"
    )


def _in_file(path: Path, act: Callable[[Path], Found]) -> Found:
    """Say in front of every error which file it is about."""
    try:
        return act(path)
    except DirectionsError as error:
        raise DirectionsError(f"{path}: {error}") from error
