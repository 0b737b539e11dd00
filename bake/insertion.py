"""Blocks that a plan inserts: what every block is called then, and what config.json says of it.

While a plan is made, tensors have the names of the base, and the block behind block L is
number `layers` + L, which the base does not have. What is written gets its name last.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from bake.arch import Arch, Block
from bake.errors import ArchitectureError
from bake.wrappers import stock_config

__all__ = ["GGUF_LAYER", "Insertion", "completed", "inserted_config", "with_copies"]

GGUF_LAYER = "blk.{layer}"


@dataclass(frozen=True)
class Insertion:
    """One block behind each of the blocks `after`, ascending, of a base with `layers` blocks.

    `layer` is the pattern of a block's name.
    """

    layer: str
    layers: int
    after: tuple[int, ...] = ()

    def behind(self, layer: int) -> int:
        """The number that the block inserted behind a layer has before it is written."""
        return self.layers + layer

    def number(self, block: int) -> int:
        """The number that a block is written under."""
        inserted = block >= self.layers
        base = block - self.layers if inserted else block
        return base + inserted + sum(layer < base for layer in self.after)

    def renamed(self, names: Iterable[str]) -> dict[str, str]:
        """The names that change, with what they become."""
        changed = {}
        for name in names:
            found = self._pattern.match(name)
            if found and self.number(int(found[1])) != int(found[1]):
                changed[name] = self._named(found, self.number(int(found[1])), name)
        return changed

    def listed(self, blocks: Iterable[int], inserted: Iterable[int]) -> list[int]:
        """The numbers that some blocks, and those inserted behind others, are written under."""
        found = (*blocks, *(self.behind(layer) for layer in inserted))
        return sorted(self.number(block) for block in found)

    def copies(self, name: str) -> tuple[str, ...]:
        """The name that a tensor of a base's block has in the block inserted behind it."""
        found = self._pattern.match(name)
        if not found or int(found[1]) not in self.after:
            return ()
        return (self._named(found, self.behind(int(found[1])), name),)

    def original(self, name: str) -> str | None:
        """The name that a tensor of an inserted block has in the block of the base before it."""
        found = self._pattern.match(name)
        if not found or int(found[1]) < self.layers:
            return None
        return self._named(found, int(found[1]) - self.layers, name)

    def of_gguf(self) -> "Insertion":
        """The same for the names in a GGUF."""
        return replace(self, layer=GGUF_LAYER)

    @property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.layer).replace(r"\{layer\}", r"(\d+)") + r"(?=\.)")

    def _named(self, found: re.Match[str], number: int, name: str) -> str:
        return self.layer.format(layer=number) + name[found.end() :]


def with_copies(entries: Sequence[object], after: Sequence[int]) -> list[object]:
    """A list with an entry for every block, an inserted block having that of the one before it."""
    return [
        each for number, entry in enumerate(entries) for each in [entry] * (1 + (number in after))
    ]


def completed(arch: Arch, config: Mapping[str, object]) -> Mapping[str, object]:
    """What config.json says of the text model, as the stock class completes it."""
    if arch.inner:
        return arch.inner.numbers
    numbers: dict[str, object] = stock_config(config, "config.json").to_dict()
    return numbers


def inserted_config(
    arch: Arch, block: Block, config: Mapping[str, object], after: Sequence[int]
) -> dict[str, object]:
    """What changes in config.json, by path, when blocks are inserted behind those `after`.

    Files that give a pattern by its period get the list that the stock class makes of it,
    since the period no longer holds. Raises ArchitectureError where a value has an entry
    for every layer, as it seems, and the row does not know it, and where blocks are dense by
    their number.
    """
    numbers, count = completed(arch, config), arch.layer_count(config)
    changes: dict[str, object] = {arch.switch(arch.layers_key): count + len(after)}
    insertion, dense = Insertion(arch.layer, count, tuple(after)), block.dense
    known = {*block.per_layer, *block.indices, *([dense.listed] if dense else [])}
    for key, value in numbers.items():
        if isinstance(value, list) and len(value) == count and key not in known:
            raise ArchitectureError(
                f"config.json: {arch.switch(key)}: has {count} entries as the model has layers, "
                f"and bake does not know what a block inserted into model_type "
                f"'{arch.model_type}' needs there; use carrier: ridge"
            )
    for key in block.per_layer:
        value = numbers.get(key)
        if isinstance(value, list):
            changes[arch.switch(key)] = with_copies(value, after)
    for key in block.leading:
        value = numbers.get(key)
        if isinstance(value, int):
            changes[arch.switch(key)] = value + sum(layer < value for layer in after)
    for key in block.indices:
        value = numbers.get(key)
        if isinstance(value, list):
            inserted = [layer for layer in after if layer in value]
            changes[arch.switch(key)] = insertion.listed(value, inserted)
    if dense:
        if numbers.get(dense.step) != 1:
            raise ArchitectureError(
                f"config.json: {arch.switch(dense.step)}: is {numbers.get(dense.step)!r}, so which "
                "blocks are dense goes by their number, which an inserted block would move"
            )
        value = numbers.get(dense.listed)
        dense_ones = value if isinstance(value, list) else []
        changes[arch.switch(dense.listed)] = insertion.listed(dense_ones, after)
    return changes
