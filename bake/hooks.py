"""Interventions on a live model: the reference that every bake is compared with."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bake.edits import Edit
from bake.model import LiveModel

__all__ = ["Intervention", "edits_by_tensor", "on_output", "steered"]


class Intervention(Protocol):
    """What a hook does to the residual stream, and the edits that do the same."""

    def attach(self, model: LiveModel) -> Iterable[RemovableHandle]:
        """Register the hooks on a live model."""
        ...

    def edits(self) -> Sequence[Edit]:
        """The edits of tensors that make the weights do what the hooks do."""
        ...


@contextmanager
def steered(model: LiveModel, interventions: Sequence[Intervention]) -> Iterator[LiveModel]:
    """The model with the interventions in force, in the order given."""
    handles: list[RemovableHandle] = []
    try:
        for intervention in interventions:
            handles.extend(intervention.attach(model))
        yield model
    finally:
        for handle in handles:
            handle.remove()


def edits_by_tensor(interventions: Iterable[Intervention]) -> dict[str, list[Edit]]:
    """The edits of all interventions in their order, by the tensor that each changes."""
    found: dict[str, list[Edit]] = {}
    for intervention in interventions:
        for edit in intervention.edits():
            found.setdefault(edit.tensor, []).append(edit)
    return found


def on_output(module: nn.Module, change: Any) -> RemovableHandle:
    """Hook `change(output, input) -> output` onto a module.

    `output` is the hidden state also where a module returns a tuple around it.
    """

    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0], _first(inputs)), *output[1:])
        return change(output, _first(inputs))

    return module.register_forward_hook(hook)


def _first(inputs: tuple[Any, ...]) -> Tensor | None:
    return inputs[0] if inputs else None
