"""A .pt file of torch.save: a tensor [width] or [layers, width], or a dictionary by layer.

It is a pickle inside a zip. torch.load runs no code under `weights_only`, but it allocates
what the pickle asks for; so before it, the pickle's own list of names must hold nothing but
what a float tensor needs, and no member of the zip may grow when it is read.
"""

import pickletools
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from bake.directions.numpy_file import check_array
from bake.directions.value import (
    FLOATS,
    Directions,
    Origin,
    Unplaced,
    check_vector,
    layer_of,
    shown,
    stacked,
)
from bake.errors import DirectionsError

__all__ = ["read_torch"]

MAX_FILE, MAX_PICKLE = 1 << 30, 1 << 20
NEEDED = frozenset(
    {
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
        "torch BFloat16Storage",
        "torch DoubleStorage",
        "torch FloatStorage",
        "torch HalfStorage",
    }
)
_AGAIN = "save it again with torch.save, as a tensor or a dictionary of layer to tensor"


def read_torch(path: Path) -> Directions | Unplaced:
    """Read a tensor or a dictionary of tensors, and nothing else."""
    _check(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged pickle fails in every way there is.
    except Exception as error:
        raise DirectionsError(f"torch cannot load it; {_AGAIN}") from error
    if isinstance(found, Tensor):
        _check_tensor("the tensor", found)
        check_array(tuple(found.shape))
        return stacked(found.detach(), Origin())
    if not isinstance(found, dict):
        raise DirectionsError(f"holds a {type(found).__name__}; {_AGAIN}")
    vectors: dict[int, Tensor] = {}
    for key, one in found.items():
        layer = layer_of(key, bare=True)
        if layer in vectors:
            raise DirectionsError(f"layer {layer} is there twice, once as {shown(key)}; keep one")
        if not isinstance(one, Tensor):
            raise DirectionsError(f"{shown(key)} is a {type(one).__name__}; {_AGAIN}")
        _check_tensor(shown(key), one)
        check_vector(shown(key), one.shape)
        vectors[layer] = one
    return Directions(vectors)


def _check_tensor(what: str, tensor: Tensor) -> None:
    """Refuse what is not a dense float tensor in memory."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        raise DirectionsError(f"{what} is not a dense tensor; {_AGAIN}")
    if tensor.dtype not in FLOATS:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise DirectionsError(f"{what} is of type {kind}; save it as float32")


def _check(path: Path) -> None:
    """Refuse an archive that asks for more than tensors, or for more bytes than it has."""
    size = path.stat().st_size
    if size > MAX_FILE:
        raise DirectionsError(
            f"has {size} bytes; directions have at most {MAX_FILE} (a slice keeps its whole "
            "tensor: save a .clone())"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            pickles = [one for one in members if one.filename.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise DirectionsError(f"is a zip file that torch.save did not write; {_AGAIN}")
            stored = all(one.compress_type == zipfile.ZIP_STORED for one in members)
            if not stored or sum(one.file_size for one in members) > size:
                raise DirectionsError(f"its zip members would grow when they are read; {_AGAIN}")
            if pickles[0].file_size > MAX_PICKLE:
                raise DirectionsError(f"its pickle has {pickles[0].file_size} bytes; {_AGAIN}")
            names = {
                str(argument)
                for code, argument, _ in pickletools.genops(archive.read(pickles[0]))
                if code.name in ("GLOBAL", "STACK_GLOBAL", "INST") or code.name.startswith("EXT")
            }
    except DirectionsError:
        raise
    # zipfile and pickletools raise whatever a damaged file leads them to.
    except Exception as error:
        raise DirectionsError(f"its zip or pickle is damaged; {_AGAIN}") from error
    for name in sorted(names - NEEDED):
        raise DirectionsError(f"its pickle names {shown(name)}, which no tensor needs; {_AGAIN}")
