"""The moments that a rounding is weighed by are of the columns as the GGUF has them."""

from pathlib import Path

import torch
from torch import Tensor

from bake.archs import find_arch
from bake.checkpoint import Checkpoint
from bake.edits import LowRank
from bake.export.inputs import _affordable, input_moments
from bake.gguf_file import GGUFFile
from bake.model import LiveModel
from tests.tiny import write_tiny
from tests.tiny_gguf import requantised, write_tiny_gguf


def test_the_widest_moments_are_not_gathered() -> None:
    """Of 11008 columns feedback alone takes 4 GB; of 8192 there is room for eight."""
    widths = {"wide": 11008, **{f"down.{layer}": 8192 for layer in range(9)}, "out": 4096}
    assert list(_affordable(widths)) == ["out", *(f"down.{layer}" for layer in range(7))]


def test_moments_follow_the_columns_of_linear_attention(tmp_path: Path) -> None:
    """What Qwen 3.5's GGUF reads, times its weight, is what the module writes."""
    write_tiny("qwen3_5_text", tmp_path / "base")
    base = Checkpoint.open(tmp_path / "base")
    arch = find_arch(base.config, "config.json", base.tensors)
    write_tiny_gguf(base, arch, tmp_path / "f32.gguf")
    own = GGUFFile.open(tmp_path / "f32.gguf")
    quantised = requantised(own, "Q8_0", "", 0.0, tmp_path / "q8.gguf")
    model = LiveModel.load(base.folder, arch)
    name = "model.layers.1.linear_attn.out_proj"
    weight = base.read(f"{name}.weight")
    edit = LowRank(f"{name}.weight", torch.zeros(weight.shape[0], 1), torch.zeros(1, 32))
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    written: list[Tensor] = []
    module = model.module(name)
    handle = module.register_forward_hook(lambda _, __, out: written.append(out[0, 1:]))
    with torch.no_grad():
        for prompt in prompts:
            model.model(torch.tensor([prompt]))
    handle.remove()
    total = torch.cat(written)

    (moment,) = input_moments(
        model, (), quantised, base.config, {edit.tensor: [edit]}, prompts
    ).values()
    stored = own.read(arch.gguf_name(edit.tensor))
    found, wanted = stored @ moment @ stored.T, total.T @ total / len(total)
    assert (found - wanted).norm() < 1e-3 * wanted.norm()
