"""A checkpoint as a GGUF, by llama.cpp's own converter in a process of its own.

The converter reads a view of the folder: links to its files, but for what would make the GGUF
another model than the checkpoint (`_view`). Its numbers are its own: for what it converts by
itself, the bytes are those of `convert_hf_to_gguf.py FOLDER`. Keys of config.json that
transformers 5 hides from it are given only when it has stopped for want of them.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from bake.checkpoint import Checkpoint
from bake.errors import ConverterError, VerificationError
from bake.export.converter import SCRIPT
from bake.gguf_file import GGUFFile

__all__ = ["convert"]

_RUN: Final = """
import json, runpy, sys
tree, told = sys.argv[1], json.loads(sys.argv[2])
del sys.argv[1:3]
sys.path.insert(0, tree)
from conversion import ModelBase
ModelBase.no_mtp = not told["mtp"]
if told["missing"]:
    load = ModelBase.load_hparams
    ModelBase.load_hparams = staticmethod(lambda *given: {**told["missing"], **load(*given)})
sys.argv[0] = f"{tree}/convert_hf_to_gguf.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""
_PREDICTING: Final = re.compile(r"(^|\.)mtp\.|\.(eh_proj|enorm|hnorm|shared_head)\.")
"""Tensors of blocks that predict further tokens (gguf-py's tensor_mapping.py, `NEXTN_*`)."""
_REMEDY: Final = "leave out export.gguf, or patch a GGUF of this model with export.gguf.base"


def convert(tree: Path, folder: Path, output: Path, outtype: str, name: str) -> None:
    """Write the checkpoint in `folder` to the new file `output`, matrices in f32, f16 or bf16.

    `tree` is llama.cpp's (`find_converter`), `name` what the model is called in the metadata.
    Raises ConverterError with the converter's last words, and VerificationError when the chat
    template in the file is not the tokenizer's.
    """
    base = Checkpoint.open(folder)
    predicting = any(_PREDICTING.search(one) for one in base.tensors)
    missing: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".view-") as temporary:
        view = Path(temporary, name)
        _view(base, view)
        while words := _run(tree, view, output, outtype, {"missing": missing, "mtp": predicting}):
            output.unlink(missing_ok=True)
            key = _lacking(words)
            value = None if key is None or key in missing else _dropped(key, base.config)
            if key is None or value is None:
                raise ConverterError(_explained(folder, words))
            missing[key] = value
            _write(view / "config.json", {**base.config, **missing})
    _check_template(folder, output)


def _view(base: Checkpoint, view: Path) -> None:
    """A folder of links to a checkpoint's files, as the converter should see them.

    Other weights are left out, and so is code: the converter would run it. Where the chat
    template is in a file of its own, the one in tokenizer_config.json goes: transformers takes
    the file's, the converter the other.
    """
    view.mkdir()
    shards = (shard.file for shard in base.shards)
    templates = base.folder / "additional_chat_templates"
    for path in (*shards, *base.sidecars(), *([templates] if templates.is_dir() else [])):
        if path.suffix != ".py":
            (view / path.name).symlink_to(path.resolve())
    tokenizer = view / "tokenizer_config.json"
    own = any((view / f"chat_template.{kind}").exists() for kind in ("jinja", "json"))
    if own and tokenizer.exists():
        content = json.loads(tokenizer.read_text(encoding="utf-8"))
        if content.pop("chat_template", None) is not None:
            _write(tokenizer, content)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON in the place of a link."""
    path.unlink()
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _run(tree: Path, view: Path, output: Path, outtype: str, told: Mapping[str, Any]) -> str | None:
    """Run the converter; what it said on stderr where it failed.

    `missing` are keys that its configuration gets where it has none, and without `mtp` it looks
    for no blocks that predict further tokens: a config.json may count some that are not there.
    """
    command = [sys.executable, "-P", "-c", _RUN, str(tree.resolve()), json.dumps(told)]
    command += [str(view), "--outfile", str(output), "--outtype", outtype]
    # The tree's own gguf-py; nothing is looked up on the Hub for a folder that is all there.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for variable in ("NO_LOCAL_GGUF", "PYTHONPATH", "PYTHONWARNINGS"):
        environment.pop(variable, None)
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode == 0 and output.is_file():
        return None
    return done.stderr or f"it ended with code {done.returncode}"


def _lacking(words: str) -> str | None:
    """The key of the configuration that the converter looked for last and did not find."""
    found = re.search(r"^KeyError: ['\"](?:could not find any of: \[')?(\w+)", _last(words))
    return found[1] if found else None


def _dropped(key: str, config: Mapping[str, Any]) -> Any:
    """What a converter reads under a key that transformers 5 keeps under another, if at all.

    It moves what rotary embeddings have into `rope_parameters`, and leaves out what follows
    from other keys.
    """
    config = {**config, **(config.get("text_config") or {})}
    rope = config.get("rope_parameters") or {}
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    known = {
        "rotary_pct": rope.get("partial_rotary_factor", 1.0),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
        "rotary_emb_base": rope.get("rope_theta"),
        "rope_theta": rope.get("rope_theta"),
        "n_ctx": config.get("n_positions", config.get("max_position_embeddings")),
        "head_dim": width // heads if width and heads else None,
    }
    found = config.get(key)
    return known.get(key) if found is None else found


def _explained(folder: Path, words: str) -> str:
    """One line of what the converter said, and the remedy."""
    last = _last(words)
    if "pre-tokenizer was not recognized" in words:
        return (
            f"{folder / 'tokenizer.json'}: llama.cpp's converter does not know this tokenizer "
            f"(it goes by what the tokenizer makes of one text); {_REMEDY}"
        )
    if found := re.search(r"Model (\w+) is not supported", words):
        return (
            f"{folder / 'config.json'}: architectures: llama.cpp's converter does not know "
            f"{found[1]}; {_REMEDY}"
        )
    if found := re.search(r"No module named '(\w+)'", last):
        return (
            f"{folder}: llama.cpp's converter needs the package {found[1]} for this tokenizer; "
            'install it with: pip install -c constraints.txt -e ".[convert]"'
        )
    if key := _lacking(words):
        return (
            f"{folder / 'config.json'}: has no {key}, which llama.cpp's converter reads and "
            "transformers 5 may have dropped; take config.json from the model's first repository, "
            f"or {_REMEDY}"
        )
    places = re.findall(r'File ".*?([^/\\"]+)", line (\d+), in \w+\n +(.+)', words)
    place = " ({}, line {}: {})".format(*places[-1]) if places and ":" not in last else ""
    return f"{folder}: llama.cpp's converter ({SCRIPT}) failed: {last}{place}; {_REMEDY}"


def _last(words: str) -> str:
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it gave no reason"


def _check_template(folder: Path, output: Path) -> None:
    """The template that a GGUF's runtimes render must be the one that the fit rendered."""
    from transformers import AutoTokenizer

    wanted = AutoTokenizer.from_pretrained(folder).chat_template
    if isinstance(wanted, dict):
        wanted = wanted.get("default")
    found = GGUFFile.open(output).metadata.get("tokenizer.chat_template")
    if found != wanted:
        raise VerificationError(
            f"{folder}: the GGUF's chat template is not the one that transformers takes from "
            "there; keep one template, in chat_template.jinja"
        )
