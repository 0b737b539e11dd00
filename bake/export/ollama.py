"""What Ollama needs beside a GGUF: a Modelfile, and its parameters for `ollama run hf.co/...`.

A Modelfile's TEMPLATE is in Go's language, and a GGUF carries its chat template in Jinja, which
Ollama's runner renders itself (server/model.go of ollama, fb30760), so there is none. From a Hub
repository Ollama takes the parameters out of a file `params`, in JSON
(https://huggingface.co/docs/hub/ollama); its own defaults are those of docs/modelfile.mdx.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from bake.errors import CheckpointError, InputError, ManifestError, OutputError
from bake.manifest import file_hash, read_manifest

__all__ = ["MODELFILE", "PARAMS", "create", "parameters", "write_ollama"]

MODELFILE: Final = "Modelfile"
PARAMS: Final = "params"
# By transformers' name, Ollama's.
NAMES: Final = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
Parameters = Mapping[str, float | list[str]]


def parameters(folder: Path, ends: Sequence[str]) -> Parameters:
    """The checkpoint's generation_config.json in Ollama's words, and where answers end.

    What it does not say is left to Ollama. `ends` are the texts of the end-of-answer tokens:
    a GGUF names one of them. Raises CheckpointError for a file that is no JSON object.
    """
    path = folder / "generation_config.json"
    found: dict[str, float | list[str]] = {}
    if path.exists():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
        if not isinstance(config, dict):
            raise CheckpointError(f"{path}: expected a JSON object; download it again")
        if config.get("do_sample") is False:
            found["temperature"] = 0.0
        else:
            for theirs, name in NAMES.items():
                value = config.get(theirs)
                if isinstance(value, int | float) and not isinstance(value, bool):
                    found[name] = value
    # What would end the quotation around it is no stop that a Modelfile can have.
    if stops := [one for one in ends if one.isprintable() and '"""' not in one]:
        found["stop"] = stops
    return found


def write_ollama(folder: Path, parts: Sequence[str], chosen: Parameters) -> None:
    """Write Modelfile and `params` beside the GGUF, whose parts have these names.

    Ollama takes the files that are named and looks for no other part (parser/parser.go,
    `CreateRequest`; it joins them in server/create.go).
    """
    lines = [f"FROM ./{part}" for part in parts]
    for name, value in chosen.items():
        for one in value if isinstance(value, list) else [value]:
            lines.append(f"PARAMETER {name} {_quoted(one) if isinstance(one, str) else one}")
    (folder / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = json.dumps(chosen, ensure_ascii=False, indent=2) + "\n"
    (folder / PARAMS).write_text(text, encoding="utf-8")


def create(folder: Path, name: str | None, overwrite: bool) -> str:
    """Give a baked folder's GGUF to Ollama under a name, the bake's own if there is none.

    Returns the name. Raises ManifestError for a folder without a GGUF of a bake, InputError
    without Ollama or where it refuses, OutputError for a model that it has already.
    """
    manifest = read_manifest(folder)
    outputs: dict[str, str] = manifest["outputs"]
    if MODELFILE not in outputs:
        raise ManifestError(f"{folder}: has no {MODELFILE}; bake with export.gguf to serve it")
    for file in outputs:
        if file == MODELFILE or file.endswith(".gguf"):
            path = folder / file
            if not path.is_file() or file_hash(path) != outputs[file]:
                raise ManifestError(f"{path}: is not as the bake wrote it; see `bake verify`")
    name = name or str(manifest.get("name"))
    program = shutil.which("ollama")
    if program is None:
        raise InputError(
            "ollama: there is no such program on PATH; install it (https://ollama.com/download), "
            f"or run `ollama create {name} -f {folder / MODELFILE}` where it is"
        )
    known = subprocess.run([program, "show", name], capture_output=True, check=False)
    if known.returncode == 0 and not overwrite:
        raise OutputError(
            f"ollama: has a model {name} already; give another --name, or --overwrite to replace it"
        )
    # Ollama draws its progress on stderr, so that is the user's to see.
    made = subprocess.run(
        [program, "create", name, "-f", os.fspath(folder / MODELFILE)], check=False
    )
    if made.returncode:
        raise InputError(
            f"ollama: `ollama create {name}` ended with code {made.returncode}; its own words are "
            "above: check that its server runs and takes this name"
        )
    return name


def _quoted(text: str) -> str:
    return f'"""{text}"""' if '"' in text else f'"{text}"'
