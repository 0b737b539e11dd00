"""A GGUF of another model is refused by its weights, whatever its header says."""

from pathlib import Path

import pytest

from bake.archs import find_arch
from bake.checkpoint import Checkpoint
from bake.errors import GGUFError
from bake.export.same_model import check_same_model
from bake.gguf_file import GGUFFile
from tests.tiny import write_tiny
from tests.tiny_gguf import requantised, write_tiny_gguf


@pytest.mark.parametrize("model_type", ["llama", "granite", "qwen3", "qwen3_5_text"])
def test_its_own_gguf_passes_and_another_does_not(tmp_path: Path, model_type: str) -> None:
    write_tiny(model_type, tmp_path / "base")
    base = Checkpoint.open(tmp_path / "base")
    arch = find_arch(base.config, "config.json", base.tensors)
    write_tiny_gguf(base, arch, tmp_path / "own.gguf")
    own = GGUFFile.open(tmp_path / "own.gguf")
    check_same_model(own, base, arch)
    name = f"blk.{arch.layer_count(base.config) - 1}.attn_output.weight"
    assert own.tensors[name].shape[1] % 32 == 0
    for kind, little, much in (("F32", 0.01, 0.05), ("Q8_0", 0.01, 0.05), ("Q4_0", 0.1, 0.4)):
        check_same_model(requantised(own, kind, name, little, tmp_path / "a"), base, arch)
        with pytest.raises(GGUFError, match=rf"{name} is \d+% away .* {kind} explains"):
            check_same_model(requantised(own, kind, name, much, tmp_path / "b"), base, arch)
