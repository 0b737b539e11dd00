"""What a patched GGUF says of where it comes from, and that nothing else of it changes."""

from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFWriter

from bake import __version__
from bake.errors import VerificationError
from bake.export.compare import compare
from bake.export.gguf import patch
from bake.export.provenance import PARITY, provenance, write_parity
from bake.gguf_file import GGUFFile
from bake.recipe import LoadedRecipe, load_recipe
from bake.verify import Divergence

FOUND = Divergence(lost=1.5, effect=3.0, largest=0.25, largest_effect=7.5, positions=12)
HUB = ("model=org/some-model", "export.gguf.base=x.gguf", "revision=abc")


def written(path: Path, **pairs: str | list[str] | int) -> GGUFFile:
    """A GGUF without tensors to speak of, and with these keys."""
    import numpy as np

    writer = GGUFWriter(path, "llama")
    for key, value in pairs.items():
        if isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.add_tensor("one", np.ones((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile.open(path)


def said(path: Path) -> dict[str, object]:
    """The metadata by gguf-py's own reader."""
    return {
        field.name: field.contents()
        for field in GGUFReader(path).fields.values()
        if not field.name.startswith("GGUF.")
    }


@pytest.fixture
def loaded() -> LoadedRecipe:
    return load_recipe("political-open", overrides=HUB)


def patched(base: GGUFFile, loaded: LoadedRecipe, template: str | None = None) -> Path:
    output = base.path.with_name("out.gguf")
    pairs = provenance(base, loaded, template)
    patch(base, {}, output, edited_type="auto", pairs=pairs)
    compare(base, GGUFFile.open(output), set(), pairs=pairs)
    return output


def test_a_bare_base_gets_every_key_and_keeps_its_own(tmp_path: Path, loaded: LoadedRecipe) -> None:
    base = written(tmp_path / "base.gguf", **{"general.name": "Phi-3"})
    output = patched(base, loaded, "{{ messages }}")
    write_parity(output, FOUND)
    assert said(output) == {
        "general.architecture": "llama",
        # llama.cpp goes by it.
        "general.name": "Phi-3",
        "general.base_model.count": 1,
        "general.base_model.0.name": "some-model",
        "general.base_model.0.organization": "org",
        "general.base_model.0.version": "abc",
        "general.base_model.0.repo_url": "https://huggingface.co/org/some-model",
        "general.quantized_by": "bake (the edited tensors)",
        "general.tags": ["bake", "steering"],
        "tokenizer.chat_template": "{{ messages }}",
        "bake.version": __version__,
        "bake.recipe": "political-open",
        "bake.recipe.sha256": loaded.sha256,
        "bake.parity.lost_share": 0.5,
        "bake.parity.largest": 0.25,
        "bake.parity.largest_effect": 7.5,
        "bake.parity.positions": 12,
    }


def test_what_the_base_says_is_kept_and_its_lists_grow(
    tmp_path: Path, loaded: LoadedRecipe
) -> None:
    own: dict[str, str | list[str] | int] = {
        "general.quantized_by": "somebody",
        "tokenizer.chat_template": "theirs",
        "general.base_model.count": 1,
        "general.base_model.0.name": "grandparent",
        "general.base_model.0.doi": "10.1/2",
        "general.tags": ["text-generation", "bake", "ü"],
    }
    found = said(patched(written(tmp_path / "base.gguf", **own), loaded, "ours"))
    assert found.pop("general.tags") == ["text-generation", "bake", "ü", "steering"]
    assert found.pop("general.base_model.count") == 2
    assert found["general.base_model.1.name"] == "some-model"
    kept = {key: found[key] for key in own.keys() & found.keys()}
    assert kept == {key: value for key, value in own.items() if key in kept}
    assert len(kept) == len(own) - 2


def test_a_bake_of_a_bake_names_both_parents_and_its_own_recipe(
    tmp_path: Path, loaded: LoadedRecipe
) -> None:
    first = patched(written(tmp_path / "base.gguf"), loaded)
    again = load_recipe("political-open", overrides=(*HUB, "seed=1"))
    base = GGUFFile.open(first.rename(tmp_path / "first.gguf"))
    found = said(patched(base, again))
    assert found["general.base_model.count"] == 2
    assert found["general.tags"] == ["bake", "steering"]
    assert found["bake.recipe.sha256"] == again.sha256 != loaded.sha256


def test_a_count_that_cannot_be_is_not_believed(tmp_path: Path, loaded: LoadedRecipe) -> None:
    base = written(tmp_path / "base.gguf", **{"general.base_model.count": 2**32 - 1})
    found = said(patched(base, loaded))
    assert found["general.base_model.count"] == 1
    assert found["general.base_model.0.name"] == "some-model"


def test_parity_moves_nothing_but_its_figures(tmp_path: Path, loaded: LoadedRecipe) -> None:
    output = patched(written(tmp_path / "base.gguf"), loaded)
    before = output.read_bytes()
    write_parity(output, FOUND)
    after = output.read_bytes()
    assert len(before) == len(after)
    assert 0 < sum(a != b for a, b in zip(before, after, strict=True)) <= 8 * len(PARITY)
    write_parity(output, FOUND)
    assert output.read_bytes() == after


def test_a_key_that_was_not_planned_is_found(tmp_path: Path, loaded: LoadedRecipe) -> None:
    base = written(tmp_path / "base.gguf")
    output = patched(base, loaded)
    pairs = provenance(base, loaded, None)
    del pairs["bake.recipe"]
    with pytest.raises(VerificationError, match=r"a metadata key not planned, 'bake\.recipe'"):
        compare(base, GGUFFile.open(output), set(), pairs=pairs)
