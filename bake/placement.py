"""Where the weights of a model lie while it runs: in memory, on a device, or else on disk."""

import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bake.cache import cache_folder
from bake.checkpoint import Checkpoint
from bake.device import AUTO, CPU, chosen_device
from bake.errors import CheckpointError
from bake.progress import note

__all__ = ["check_shapes", "free_memory", "placement", "removed_with"]

# Of the memory that is free the weights may take this; the rest is for activations.
SHARE = 0.8


def free_memory() -> int:
    """The bytes that models may take: $BAKE_MEMORY ("24GiB"), or what the system has free.

    Raises CheckpointError where the variable holds no size.
    """
    from accelerate.utils import convert_file_size_to_int, get_max_memory

    chosen = os.environ.get("BAKE_MEMORY")
    if not chosen:
        return int(get_max_memory()["cpu"])
    try:
        return int(convert_file_size_to_int(chosen))
    except ValueError as error:
        raise CheckpointError(
            f"BAKE_MEMORY: {chosen!r} is no size; give a number with its unit, such as 24GiB"
        ) from error


def placement(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` needs so that a checkpoint's weights fit, by their headers.

    Nothing where memory holds them. Otherwise accelerate's device map keeps as many blocks there
    as the share allows and reads the others from disk in every pass. Only the folder for what
    transformers cannot read from the checkpoint as it is lies in the cache folder. A device that
    is named has all of them, `auto` begins with every accelerator. Raises as `chosen_device`.
    """
    device = chosen_device()
    if device not in (CPU, AUTO):
        return {"device_map": {"": device}}
    room = int(SHARE * free_memory())
    if device == AUTO:
        from accelerate.utils import get_max_memory

        return _mapped({**get_max_memory(), "cpu": room})
    sizes = [math.prod(one.shape) for one in Checkpoint.open(folder).tensors.values()]
    needed = sum(sizes) * dtype.itemsize
    if needed <= room:
        return {}
    note(
        f"{folder}: the weights take {needed / 2**30:.1f} GiB and have {room / 2**30:.1f} GiB: "
        "what is beyond that is read from disk in every pass (BAKE_MEMORY sets the memory)"
    )
    return _mapped({"cpu": room})


def _mapped(room: Mapping[int | str, int]) -> dict[str, Any]:
    """accelerate's device map for the room on each device, and on disk what has none."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    return {
        "device_map": "auto",
        "max_memory": dict(room),
        "offload_folder": tempfile.mkdtemp(prefix="offload-", dir=cache_folder()),
    }


def check_shapes(model: torch.nn.Module, folder: Path) -> None:
    """Refuse a checkpoint that its config.json does not describe.

    transformers compares shapes in memory alone. Raises CheckpointError, naming the tensor;
    one that is put together from several on loading has another name, and is compared when it
    is read.
    """
    stored = Checkpoint.open(folder).tensors
    for name, parameter in model.named_parameters():
        if name in stored and stored[name].shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{folder}: {name} has shape {list(stored[name].shape)}, and config.json means "
                f"{list(parameter.shape)}; give the config.json of these weights"
            )


def removed_with(model: object, placed: dict[str, Any]) -> None:
    """Remove the folder of a placement when its model is gone, or now where there is none."""
    folder = placed.get("offload_folder")
    if folder and model is None:
        shutil.rmtree(folder, ignore_errors=True)
    elif folder:
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
