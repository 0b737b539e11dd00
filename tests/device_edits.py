"""Every kind of edit, written on the processor and on the device `other`: the same bytes.

    python -m tests.device_edits FOLDER

Shards of each type in FOLDER. Each case is printed with where its blocks were.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from bake import blocks
from bake.checkpoint import Checkpoint
from bake.edits import AddVector, Change, Edit, Rows
from bake.stream import write_checkpoint
from tests.other_device import register
from tests.test_blocks import CASES, drawn

FP8 = {"quant_method": "fp8", "weight_block_size": [8, 8]}
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn)
DEVICES = ("cpu", "other")


@dataclass(frozen=True, eq=False)
class Watched(AddVector):
    """Adds a vector, and says where."""

    def by_rows(self, matrix: Rows) -> Change:
        add = super().by_rows(matrix)
        return lambda rows, block: (seen.add(block.device.type), add(rows, block))[1]


seen: set[str] = set()


def write_base(folder: Path, shape: Sequence[int], dtype: torch.dtype) -> Checkpoint:
    """A checkpoint in two shards, the first of which has `w.weight`."""
    shards = {"a": {"w.weight": drawn(3, *shape).to(dtype)}, "b": {"z": drawn(4, 5)}}
    config: dict[str, object] = {"model_type": "llama"}
    if dtype == torch.float8_e4m3fn:
        config["quantization_config"] = FP8
        shards["a"]["w.weight_scale_inv"] = drawn(5, *(length // 8 for length in shape)).abs()
    folder.mkdir(parents=True)
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors")
    places = {one: f"{name}.safetensors" for name, tensors in shards.items() for one in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(folder)


def compare(folder: Path, shape: Sequence[int], edits: Sequence[Edit], dtype: torch.dtype) -> str:
    """Write one case on each device; where its blocks were."""
    base = write_base(folder / "base", shape, dtype)
    watched = [*edits, Watched("w.weight", drawn(9, shape[-1]))]
    written, places = [], []
    for device in DEVICES:
        output = folder / device
        output.mkdir()
        seen.clear()
        write_checkpoint(base, {"w.weight": watched}, (), {}, output, device=device)
        written.append([path.read_bytes() for path in sorted(output.iterdir())])
        places.append(",".join(seen))
    assert written[0] == written[1], folder
    assert written[0] != [path.read_bytes() for path in sorted((folder / "base").iterdir())]
    return " ".join(places)


def main() -> None:
    """Compare all of them, in blocks of a few rows, on a device that has no float64, as mps."""
    main.device = register(lacking=torch.float64)  # type: ignore[attr-defined]
    blocks.BLOCK = 7 * 24  # type: ignore[misc]
    for name, (shape, edits) in CASES.items():
        for dtype in TYPES:
            kind = str(dtype).removeprefix("torch.")
            if kind != "float8_e4m3fn" or len(shape) == 2:
                folder = Path(sys.argv[1], name, kind)
                print(f"{name}, {kind}:", compare(folder, shape, edits, dtype))  # noqa: T201


if __name__ == "__main__":
    main()
