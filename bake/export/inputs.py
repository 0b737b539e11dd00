"""What the edited matrices of a GGUF read: the second moments that roundings are weighed by."""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from bake.activations import Conversation, Tap, collect
from bake.edits import Edit
from bake.export.layout import tiled_columns
from bake.export.requantise import FLOATS
from bake.gguf_file import GGUFFile
from bake.hooks import Intervention, steered
from bake.model import LiveModel

__all__ = ["input_moments"]

_AT_A_TIME = 2 << 30
"""Bytes of moments in float64 that are gathered in one pass, and of those kept in float32."""
_WIDEST = 8192
"""Columns beyond which feedback, four such matrices in float64, takes more than that."""


def input_moments(
    model: LiveModel,
    interventions: Sequence[Intervention],
    base: GGUFFile,
    config: Mapping[str, object],
    edits: Mapping[str, Sequence[Edit]],
    prompts: Sequence[Sequence[int]],
) -> dict[str, Tensor]:
    """Return E aaᵀ [columns, columns], float32, by GGUF name, of every quantised writer edited.

    Its columns have the GGUF's order. `config` is the checkpoint's, `edits` are by its names,
    `prompts` token ids. The inputs a are gathered with the
    interventions in force, at every token but the first, whose few huge activations would
    count for more than all the rest. Experts do not see every token, and embeddings read none:
    they are left out, and their noise is that of inputs in all directions alike. So are matrices
    wider than `_WIDEST`, and the widest ones where the moments of all take too much memory.
    """
    widths = {}
    for written in model.arch.written(edits).values():
        for one in written:
            # An inserted block's writers are not in the base.
            tensor = base.tensors.get(model.arch.gguf_name(one.weight))
            if tensor and tensor.type not in FLOATS and "expert" not in one.writer.module:
                widths[one.module] = tensor.shape[-1]
    conversations = [
        Conversation(tuple(ids), len(ids) - 1, tuple(range(1, len(ids)))) for ids in prompts
    ]
    found = {}
    for modules in _groups(_affordable(widths)):
        taps = {name: Tap(model.module(name), "input", "decision", "second") for name in modules}
        with steered(model, interventions):
            moments = collect(model, conversations, taps)
        for name, moment in moments.items():
            heads = model.arch.tiled_heads(f"{name}.weight", config)
            gram = tiled_columns(tiled_columns(moment.gram.float(), heads).T, heads)
            found[model.arch.gguf_name(f"{name}.weight")] = gram
    return found


def _affordable(widths: Mapping[str, int]) -> dict[str, int]:
    """The modules whose moments fit into memory, the narrowest first."""
    found, size = {}, 0
    for name, width in sorted(widths.items(), key=lambda one: one[1]):
        size += 4 * width**2
        if width <= _WIDEST and size <= _AT_A_TIME:
            found[name] = width
    return found


def _groups(widths: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield the modules in groups whose moments fit into memory together."""
    group: list[str] = []
    size = 0
    for name, width in widths.items():
        if group and size + 8 * width**2 > _AT_A_TIME:
            yield group
            group, size = [], 0
        group.append(name)
        size += 8 * width**2
    if group:
        yield group
