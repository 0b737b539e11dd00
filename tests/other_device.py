"""A device of torch's own kind in Python, `other`: its tensors are the processor's, kept apart.

Whatever would fail on an accelerator because a tensor lies elsewhere fails here too; the
numbers are those of the processor. To be used in a process of its own: a device stays.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._device import _device_constructors
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

aten = torch.ops.aten
# These take a processor's tensor beside their own, on every accelerator.
ACROSS = (aten.copy_, aten._copy_from, aten._to_copy, aten.index, aten.index_put_)


class Other(Tensor):
    """A tensor of the device; `raw` has its numbers."""

    raw: Tensor
    lacking: torch.dtype | None = None
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor) -> "Other":
        assert raw.device.type == "cpu", raw.device
        if raw.dtype == cls.lacking:
            raise TypeError(f"the device has no {raw.dtype}")
        found = Tensor._make_wrapper_subclass(
            *(cls, raw.shape, raw.stride(), raw.storage_offset()),
            dtype=raw.dtype,
            device="other:0",
            requires_grad=raw.requires_grad,
        )
        found.raw = raw
        return found  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(
        cls, op: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] = {}
    ) -> Any:
        return _run(op, *args, **kwargs)


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    given, spec = pytree.tree_flatten((args, kwargs))
    own = [one for one in given if isinstance(one, Other)]
    foreign = [one for one in given if isinstance(one, Tensor) and not isinstance(one, Other)]
    if own and op.overloadpacket not in ACROSS and any(one.ndim for one in foreign):
        raise RuntimeError(f"{op}: expected all tensors on the same device")
    plain = [one.raw if isinstance(one, Other) else one for one in given]
    args, kwargs = pytree.tree_unflatten(plain, spec)
    # To the processor, or from or within the device.
    leaves = "device" in kwargs and torch.device(kwargs["device"] or "other").type == "cpu"
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    found = op(*args, **kwargs)
    same = {id(one.raw): one for one in own}

    def wrapped(one: Any) -> Any:
        if not isinstance(one, Tensor) or leaves:
            return one
        return same[id(one)] if id(one) in same else Other(one)

    into_cpu = op.overloadpacket is aten.copy_ and not isinstance(given[0], Other)
    return given[0] if into_cpu else pytree.tree_map(wrapped, found)


class _Module(_DummyBackendModule):  # type: ignore[misc]
    """`torch.other`: its random numbers are the processor's."""

    def get_rng_state(self, device: object) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: object) -> None:
        pass


def register(lacking: torch.dtype | None = None) -> torch.library.Library:
    """Make `other` a device, without a type; it is one as long as what is returned lives."""
    Other.lacking = lacking
    _setup_privateuseone_for_python_backend("other", _Module())
    # In inference mode operators come whole that are made of several, with devices anywhere.
    torch.inference_mode = torch.no_grad  # type: ignore[misc, assignment]
    # Python's numbers become a tensor of the processor first; `with torch.device()` sees to those.
    _device_constructors()
    made = torch.tensor
    torch.tensor = lambda *a, device=None, **k: made(*a, **k).to(device)  # type: ignore[assignment]
    library = torch.library.Library("_", "IMPL")
    library.fallback(_run, "PrivateUse1")
    return library
