"""From a checkpoint to a GGUF by llama.cpp's own converter: where it comes from, what it is told.

Tests that run the converter are slow; it is that of BAKE_LLAMA_CPP, or fetched once.
"""

import json
import shutil
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from bake.checkpoint import Checkpoint
from bake.errors import ConverterError, RecipeError
from bake.export.convert import _dropped, _explained, _lacking, _view
from bake.export.converter import VARIABLE, _extract, find_converter
from bake.recipe import load_recipe
from tests.conftest import Run

INSIDE = "llama_cpp_python-9/vendor/llama.cpp"


def packed(path: Path, *members: tuple[str, str]) -> Path:
    """An archive of files by name and text; a text of `-> place` makes a link."""
    with tarfile.open(path, "w:gz") as archive:
        for name, text in members:
            info = tarfile.TarInfo(name)
            if text.startswith("-> "):
                info.type, info.linkname = tarfile.SYMTYPE, text[3:]
            info.size = 0 if info.issym() else len(text)
            archive.addfile(info, BytesIO(text.encode()))
    return path


def make_tree(folder: Path) -> Path:
    for name in ("conversion", "gguf-py"):
        (folder / name).mkdir(parents=True)
    (folder / "convert_hf_to_gguf.py").write_text("")
    return folder


def test_a_given_tree_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = make_tree(tmp_path / "tree")
    assert find_converter(tree) == tree
    monkeypatch.setenv(VARIABLE, str(tree))
    assert find_converter() == tree
    (tree / "convert_hf_to_gguf.py").unlink()
    with pytest.raises(ConverterError, match=r"tree: has no convert_hf_to_gguf\.py.*--llama-cpp"):
        find_converter()


def test_the_cache_is_asked_before_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("BAKE_CACHE", str(tmp_path))
    monkeypatch.setattr("bake.export.converter.version", lambda _: "0.3.36+cu124")
    tree = make_tree(tmp_path / "llama.cpp-0.3.36")
    assert find_converter() == tree


@pytest.mark.parametrize("index", ["empty", "another file"])
def test_what_pip_does_not_give_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: str
) -> None:
    """Without an index, and with an archive of another hash: nothing of it is run or kept."""
    links, cache = tmp_path / "links", tmp_path / "cache"
    links.mkdir()
    if index == "another file":
        setup = f"open({str(tmp_path / 'ran')!r}, 'w')"
        stem = "llama_cpp_python-0.3.36"
        packed(links / f"{stem}.tar.gz", (f"{stem}/setup.py", setup))
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("BAKE_CACHE", str(cache))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr("bake.export.converter.version", lambda _: "0.3.36")
    message = r"pip cannot fetch .*0\.3\.36.*BAKE_LLAMA_CPP"
    with pytest.raises(ConverterError, match=message) as caught:
        find_converter()
    assert "\n" not in str(caught.value)
    if index == "another file":
        assert "HASHES" in str(caught.value)
    assert list(cache.iterdir()) == []
    assert not (tmp_path / "ran").exists()


def test_the_converter_alone_is_unpacked(tmp_path: Path) -> None:
    archive = packed(
        tmp_path / "a.tar.gz",
        (f"{INSIDE}/convert_hf_to_gguf.py", "1"),
        (f"{INSIDE}/conversion/llama.py", "2"),
        (f"{INSIDE}/src/llama.cpp", "3"),
        ("llama_cpp_python-9/setup.py", "4"),
        ("elsewhere/vendor/llama.cpp/LICENSE", "5"),
    )
    _extract(archive, tmp_path / "tree")
    found = {path.relative_to(tmp_path / "tree").as_posix() for path in tmp_path.rglob("tree/**/*")}
    assert found == {"convert_hf_to_gguf.py", "conversion", "conversion/llama.py", "LICENSE"}


@pytest.mark.parametrize(
    "member",
    [
        pytest.param((f"{INSIDE}/conversion/../../../../evil", "x"), id="a path that leaves"),
        pytest.param((f"{INSIDE}/conversion/link", "-> /etc/passwd"), id="an absolute link"),
        pytest.param((f"{INSIDE}/conversion/link", "-> ../../../x"), id="a link that leaves"),
    ],
)
def test_hostile_archives_are_refused(tmp_path: Path, member: tuple[str, str]) -> None:
    archive = packed(tmp_path / "a.tar.gz", member)
    with pytest.raises(ConverterError, match=r"a\.tar\.gz: cannot be unpacked") as caught:
        _extract(archive, tmp_path / "first")
    assert "\n" not in str(caught.value)
    (tmp_path / "text.tar.gz").write_text("hello")
    with pytest.raises(ConverterError, match="cannot be unpacked"):
        _extract(tmp_path / "text.tar.gz", tmp_path / "tree")


def test_the_view_has_no_code_and_one_template(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    content = {"chat_template": "old", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    (folder / "chat_template.jinja").unlink()
    for name in ("modeling_x.py", ".hidden", "other.safetensors", "pytorch_model.bin"):
        (folder / name).write_text("{}")
    _view(Checkpoint.open(folder), tmp_path / "one")
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {path.name for path in tiny_llama.iterdir()} - {"chat_template.jinja"}
    assert json.loads((tmp_path / "one/tokenizer_config.json").read_text()) == content
    (folder / "chat_template.jinja").write_text("new")
    _view(Checkpoint.open(folder), tmp_path / "two")
    assert json.loads((tmp_path / "two/tokenizer_config.json").read_text()) == {"eos_token": "</s>"}
    assert json.loads((folder / "tokenizer_config.json").read_text()) == content


def test_keys_that_transformers_5_drops() -> None:
    rope = {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.25}
    config = {
        "rope_parameters": rope,
        "n_positions": 1024,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "head_dim": None,
        "kept": 3,
    }
    found = {
        key: _dropped(key, config)
        for key in ("rotary_pct", "rope_theta", "n_ctx", "head_dim", "kept", "unknown")
    }
    wanted = {"rotary_pct": 0.25, "rope_theta": 5e4, "n_ctx": 1024, "head_dim": 16, "kept": 3}
    assert found == wanted | {"unknown": None}
    assert _dropped("n_ctx", {"text_config": {"max_position_embeddings": 8}}) == 8


WORDS = {
    "NotImplementedError: BPE pre-tokenizer was not recognized - update it": (
        r"tokenizer\.json: llama\.cpp's converter does not know this tokenizer"
    ),
    "ERROR:hf-to-gguf:Model NewForCausalLM is not supported": (
        r"config\.json: architectures: llama\.cpp's converter does not know NewForCausalLM"
    ),
    "ModuleNotFoundError: No module named 'sentencepiece'": r"needs the package sentencepiece.*pip",
    "KeyError: 'rotary_pct'": r"config\.json: has no rotary_pct.*may have dropped",
    "KeyError: '<|user|>'": r"failed: KeyError: '<\|user\|>'",
    "": "failed: it gave no reason",
}


@pytest.mark.parametrize("words", WORDS)
def test_what_the_converter_says_is_one_line(words: str) -> None:
    said = _explained(Path("folder"), f"Traceback (most recent call last):\n  File\n{words}\n\n")
    if not words:
        said = _explained(Path("folder"), "")
    assert "\n" not in said
    assert pytest.importorskip("re").search(WORDS[words], said)
    assert "export.gguf" in said or "pip install" in said
    assert _lacking("KeyError: \"could not find any of: ['n_ctx', 'n']\"") == "n_ctx"


MISTAKES = {
    "{convert: q4_kx}": r"export\.gguf\.convert\.type: no type 'q4_kx'; did you mean 'q4_k'",
    "{convert: {type: q4_0, tensor_types: {attn_v: q9}}}": r"tensor_types\.attn_v: no type 'q9'",
    "{convert: {type: q4_0, tensor_types: [a]}}": r"tensor_types: expected a mapping",
    "{convert: {type: f16, imatrix: text}}": r"imatrix: f16 is not quantised; leave it out",
    "{convert: {type: base}}": r"base: convert\.type is base; give the GGUF",
    "{convert: {type: base, pure: true}, base: x.gguf}": r"pure: type: base has the type of every",
    "{convert: q4_0, base: x.gguf}": r"base: is patched, and convert takes the checkpoint",
    "{base: null}": r"base: nothing to patch; give a GGUF, or export\.gguf\.convert",
    "{convert: f16, edited_type: auto}": r"edited_type: convert\.type is f16",
    "{convert: bf16, edited_type: q8_0}": r"edited_type: convert\.type is bf16",
    "{convert: q4_0, split: 4GB}": r"split: no size '4GB'; expected a number of M or G",
    "{base: x.gguf, split: 4G}": r"split: a patched file has its base's parts",
    "{convert: {type: q4_0, imatrx: text}}": r"unknown key 'imatrx'; did you mean 'imatrix'",
}


@pytest.mark.parametrize("given", MISTAKES)
def test_mistakes_in_the_recipe(given: str) -> None:
    with pytest.raises(RecipeError, match=MISTAKES[given]) as caught:
        load_recipe("political-open", overrides=[f"export.gguf={given}"])
    assert len(str(caught.value).splitlines()) == 1


def test_a_lora_for_llama_cpp_needs_the_file_that_it_is_for() -> None:
    overrides = ("export.gguf={convert: q4_0}", "export.adapters=[gguf]")
    with pytest.raises(RecipeError, match=r"give it as export\.gguf\.base"):
        load_recipe("political-open", overrides=overrides)


def test_short_and_long_forms_are_the_same() -> None:
    def conversion(given: str) -> object:
        export = load_recipe("political-open", overrides=[f"export.gguf={given}"]).recipe.export
        assert export.gguf is not None
        assert export.gguf.base is None
        assert export.gguf.named_type is None
        return export.gguf.convert

    assert conversion("{convert: Q4_K_M}") == conversion("{convert: {type: q4_k_m}}")


def test_usage_of_the_command(bake: Run, tmp_path: Path) -> None:
    folder, output = str(tmp_path), str(tmp_path / "out.gguf")
    for given, message in {
        (): "--type and --output are needed",
        ("--type", "base", "-o", output): "--type base and --base GGUF go together",
        ("--type", "q4_kx", "-o", output): "--type: no type 'q4_kx'; did you mean 'q4_k'",
        ("--type", "q4_0", "-o", output, "--tensor-type", "a"): "expected NAME=TYPE, found 'a'",
        ("--type", "bf16", "-o", output, "--imatrix", "text"): "--imatrix: bf16 is not quantised",
    }.items():
        code, _, error = bake("convert", folder, *given)
        assert (code, message in error) == (2, True), error
    code, _, error = bake("convert", folder, "--type", "q4_0", "-o", output)
    assert (code, "config.json" in error) == (1, True)
    (tmp_path / "out.gguf").write_text("mine")
    code, _, error = bake("convert", folder, "--type", "q4_0", "-o", output)
    assert (code, "exists already" in error) == (1, True)
    assert (tmp_path / "out.gguf").read_text() == "mine"
