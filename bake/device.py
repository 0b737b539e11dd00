"""The device that models run on and weights are edited on: what BAKE_DEVICE names."""

import os

from bake.errors import InputError

__all__ = ["AUTO", "CPU", "chosen_device", "edit_device"]

CPU = "cpu"
AUTO = "auto"


def chosen_device() -> str:
    """$BAKE_DEVICE: a device of torch such as cuda, cuda:1 or mps; the processor if unset.

    "auto" is every accelerator that accelerate finds, then memory, then disk. Of several processes
    on a machine each has an accelerator of its own, where none is named by number. Raises
    InputError for what torch does not know, or not have here.
    """
    name = os.environ.get("BAKE_DEVICE") or CPU
    return name if name in (CPU, AUTO) else _own(name)


def edit_device() -> str:
    """Where blocks of rows are edited: `chosen_device`, of which "auto" is one accelerator here.

    That is the first, or of several processes each has its own; the processor where there is none.
    """
    name = chosen_device()
    if name != AUTO:
        return name
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return _own(found.type) if found else CPU


def _own(name: str) -> str:
    """A device that is here, with this process's number where it has none; raises as above."""
    import torch

    try:
        device = torch.device(name)
        module = torch.get_device_module(device)
    except RuntimeError as error:
        raise InputError(
            f"BAKE_DEVICE: torch knows no device {name!r}; give cpu, cuda, cuda:1, mps or auto"
        ) from error
    if not module.is_available():
        raise InputError(f"BAKE_DEVICE: torch finds no {device.type} device here; give cpu")
    count = module.device_count()
    if device.index is None and "LOCAL_RANK" in os.environ:
        return f"{device.type}:{int(os.environ['LOCAL_RANK']) % count}"
    if (device.index or 0) >= count:
        raise InputError(f"BAKE_DEVICE: there is no {name}; {device.type} has {count} here")
    return name
