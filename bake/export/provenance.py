"""What a patched GGUF says of where it comes from: keys that are added to its metadata.

`general.*` is the standard's (llama.cpp's gguf-py/gguf/constants.py, `Keys.General`), `bake.*`
is ours. Of the base's own keys two lists grow: `general.base_model.count`, since the base becomes
one parent more, and `general.tags`. `general.name` stays, though the model is another one:
llama.cpp reads from it how Phi-3's special tokens strip spaces (src/llama-vocab.cpp, "set
attributes by model/tokenizer/architecture name").
"""

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from gguf import GGUFValueType

from bake import __version__
from bake.errors import VerificationError
from bake.export.gguf_bytes import chunks, open_base, packed_pair, packed_string
from bake.gguf_file import SCALARS, GGUFArray, GGUFFile
from bake.recipe import LoadedRecipe
from bake.source import base_model
from bake.verify import Divergence

__all__ = ["CHAT_TEMPLATE", "PARITY", "provenance", "write_parity"]

CHAT_TEMPLATE: Final = "tokenizer.chat_template"
COUNT: Final = "general.base_model.count"
MOST_PARENTS: Final = 1 << 16  # no more than that is believed of a header
TAGS: Final = "general.tags"
PARITY: Final[Mapping[str, GGUFValueType]] = {
    "lost_share": GGUFValueType.FLOAT64,
    "largest": GGUFValueType.FLOAT64,
    "largest_effect": GGUFValueType.FLOAT64,
    "positions": GGUFValueType.UINT64,
}
"""Figures of `Divergence` under `bake.parity.`: of fixed width, filled in when they are known."""


def provenance(
    base: GGUFFile,
    loaded: LoadedRecipe,
    template: str | None = None,
    quantised: str | None = "bake (the edited tensors)",
) -> dict[str, bytes]:
    """Every key that is added or grows, with its value, as `patch` takes them.

    `template` is the checkpoint's chat template, for a file that has none, and `quantised` by
    whom it was quantised, for one that does not say. The figures of parity are not known yet and
    are no numbers.
    """
    recipe, text, parent = loaded.recipe, GGUFValueType.STRING, base_model(loaded.recipe)
    number = base.metadata.get(COUNT, 0)
    if not isinstance(number, int) or not 0 <= number <= MOST_PARENTS:
        number = 0
    start = f"general.base_model.{number}."
    said = {
        f"{start}name": parent.name,
        f"{start}organization": parent.organization,
        f"{start}version": parent.revision,
        f"{start}repo_url": parent.hub_id and f"https://huggingface.co/{parent.hub_id}",
        "bake.version": __version__,
        "bake.recipe": recipe.name,
        "bake.recipe.sha256": loaded.sha256,
    }
    if "general.quantized_by" not in base.metadata and quantised:
        said["general.quantized_by"] = quantised
    if CHAT_TEMPLATE not in base.metadata and template:
        said[CHAT_TEMPLATE] = template
    pairs = {key: packed_pair(key, text, value) for key, value in said.items() if value}
    pairs[COUNT] = packed_pair(COUNT, GGUFValueType.UINT32, number + 1)
    pairs[TAGS] = _with_tags(base, ["bake", "steering"])
    for name, kind in PARITY.items():
        unknown = math.nan if kind is GGUFValueType.FLOAT64 else 0
        pairs[f"bake.parity.{name}"] = packed_pair(f"bake.parity.{name}", kind, unknown)
    return pairs


def write_parity(path: Path, found: Divergence) -> None:
    """Fill in the figures of a file that `provenance` made room in; nothing moves.

    `path` is the first part of a split model. Raises VerificationError where they do not read
    back.
    """
    file = GGUFFile.open(path)
    with path.open("r+b") as stream:
        for name, kind in PARITY.items():
            span, scalar = file.pairs[f"bake.parity.{name}"], SCALARS[kind]
            # A number is the last bytes of its pair.
            stream.seek(span.start + span.nbytes - scalar.size)
            stream.write(scalar.pack(getattr(found, name)))
    after = GGUFFile.open(path)
    said = {name: after.metadata[f"bake.parity.{name}"] for name in PARITY}
    if said != {name: getattr(found, name) for name in PARITY} or after.tensors != file.tensors:
        raise VerificationError(f"{path}: its figures of parity are not as they were written")


def _with_tags(base: GGUFFile, tags: list[str]) -> bytes:
    """The base's tags with those of these behind them that it lacks."""
    found = base.metadata.get(TAGS)
    if not isinstance(found, GGUFArray) or found.element_type is not GGUFValueType.STRING:
        return packed_pair(TAGS, GGUFValueType.STRING, tags)
    with open_base(base.path) as stream:
        pair = b"".join(chunks(stream, base.path, base.pairs[TAGS]))
    # The number of elements ends the head of a list, and the elements follow.
    head, stored = pair[: len(_NO_TAGS) - 8], pair[len(_NO_TAGS) :]
    new = [packed for tag in tags if (packed := packed_string(tag)) not in _strings(stored)]
    return head + struct.pack("<Q", found.count + len(new)) + stored + b"".join(new)


_NO_TAGS = packed_pair(TAGS, GGUFValueType.STRING, [])


def _strings(stored: bytes) -> list[bytes]:
    """The elements of a list of strings, each with its length; the header was checked."""
    found, place = [], 0
    while place < len(stored):
        end = place + 8 + int.from_bytes(stored[place : place + 8], "little")
        found.append(stored[place:end])
        place = end
    return found
