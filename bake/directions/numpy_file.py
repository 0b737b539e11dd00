"""A .npy file: an array [width], or [layers, width] with row L behind block L.

Python objects in it are never unpickled.
"""

import math
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy

from bake.directions.value import MAX_WIDTH, Directions, Origin, Unplaced, shown, stacked
from bake.errors import DirectionsError
from bake.recipe.values import HIGHEST_LAYER

__all__ = ["check_array", "read_numpy"]

READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_numpy(path: Path) -> Directions | Unplaced:
    """Read an array; its header is compared with the size of the file first."""
    shape, dtype, size = _header(path)
    if dtype.hasobject:
        raise DirectionsError(
            "holds Python objects, which bake never unpickles; save a float array"
        )
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise DirectionsError(f"is of type {shown(str(dtype))}; save it as float32")
    check_array(shape)
    if math.prod(shape) * dtype.itemsize != size:
        raise DirectionsError(
            f"holds {size} bytes where its header says {math.prod(shape) * dtype.itemsize}; "
            "it was cut or changed, so save it again"
        )
    with np.errstate(over="ignore"):
        array = np.load(path, allow_pickle=False).astype(np.float32)
    return stacked(torch.from_numpy(np.ascontiguousarray(array)), Origin())


def check_array(shape: tuple[int, ...]) -> None:
    """Refuse a shape that is not [width] or [layers, width]."""
    rows, width = (1, *shape) if len(shape) == 1 else shape if len(shape) == 2 else (0, 0)
    if not (1 <= rows <= HIGHEST_LAYER + 1 and 1 <= width <= MAX_WIDTH):
        raise DirectionsError(
            f"is an array of shape {shown(list(shape))}; expected [width] or [layers, width], with "
            f"up to {HIGHEST_LAYER + 1} layers and a width of 1 to {MAX_WIDTH}"
        )


def _header(path: Path) -> tuple[tuple[int, ...], np.dtype, int]:
    """The shape and type that the header claims, and the number of bytes behind it."""
    try:
        with path.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            version = npy.read_magic(stream)
            if version not in READERS:
                raise DirectionsError(f"is .npy version {version}; save a plain float array")
            shape, _, dtype = READERS[version](stream)
            return shape, dtype, path.stat().st_size - stream.tell()
    except OSError as error:
        raise DirectionsError(f"cannot be read: {error.strerror}; check the path") from error
    except DirectionsError:
        raise
    # The header is a Python literal, and a damaged one fails in every way there is.
    except Exception as error:
        raise DirectionsError("its .npy header is damaged; save the array again") from error
