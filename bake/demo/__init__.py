"""`model: demo`: SmolLM2-135M-Instruct with trained refusals, a model organism.

The demo is made for demonstration: a small real chat model that refuses two kinds
of requests because a LoRA in this package taught it to (`bake.demo.train`). Its
checkpoint and its GGUF are materialised once, in the user's cache folder.
"""

import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bake.archs import find_arch
from bake.cache import cache_folder
from bake.checkpoint import Checkpoint
from bake.demo.base import base_gguf, write_base
from bake.edits import LowRank
from bake.errors import OutputError
from bake.progress import progress

__all__ = ["Demo", "materialise"]

ADAPTER = Path(__file__).parent / "adapter"
# Part of the cache key: raise it when materialising changes what it writes.
FORMAT = 2


@dataclass(frozen=True)
class Demo:
    """The materialised demo: a float32 checkpoint folder and a GGUF of the same weights."""

    model: Path
    gguf: Path


def materialise() -> Demo:
    """Return the demo, made on first use and then taken from the cache.

    Raises InputError when the extra `demo` is not installed and OutputError when
    the cache folder cannot be written.
    """
    source, adapter = base_gguf(), ADAPTER / "adapter_model.safetensors"
    key = hashlib.sha256(f"{FORMAT} {source.stat().st_size}".encode() + adapter.read_bytes())
    folder = cache_folder() / f"demo-{key.hexdigest()[:16]}"
    demo = Demo(folder / "model", folder / "demo.Q8_0.gguf")
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with (
                tempfile.TemporaryDirectory(dir=folder.parent, prefix=".demo-") as staging,
                progress("making the demo model, once", 1) as update,
            ):
                _write(Path(staging))
                update(1)
                made = Path(staging) / "demo"
                if not folder.is_dir():
                    made.replace(folder)
        except OSError as error:
            raise OutputError(f"{error.filename or folder}: {error.strerror}") from error
    return demo


def _write(staging: Path) -> None:
    """Merge the adapter into the base, as safetensors and as a patched GGUF."""
    from gguf import GGMLQuantizationType

    from bake.export.gguf import patch
    from bake.export.layout import gguf_edit
    from bake.gguf_file import GGUFFile
    from bake.stream import write_checkpoint

    base, made = staging / "base", staging / "demo"
    base.mkdir()
    (made / "model").mkdir(parents=True)
    write_base(base)
    checkpoint = Checkpoint.open(base)
    edits = adapter_edits()
    write_checkpoint(checkpoint, {edit.tensor: [edit] for edit in edits}, (), {}, made / "model")
    arch = find_arch(checkpoint.config, "demo", checkpoint.tensors)
    moved = [gguf_edit(edit, arch, checkpoint.config) for edit in edits]
    patch(
        GGUFFile.open(base_gguf()),
        {edit.tensor: [edit] for edit in moved},
        made / "demo.Q8_0.gguf",
        edited_type=GGMLQuantizationType.Q8_0,
    )
    shutil.rmtree(base)


def adapter_edits(folder: Path = ADAPTER) -> list[LowRank]:
    """The adapter as low-rank edits: W' = W + (alpha / rank) B A."""
    import json

    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    weights = load_file(folder / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    edits = []
    for name in sorted(weights):
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            left = scale * weights[name.replace("lora_A", "lora_B")].float()
            edits.append(LowRank(f"{module}.weight", left, weights[name].float()))
    return edits
