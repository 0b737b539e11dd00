"""`bake.json`: where a bake comes from, what was written, and every measured figure.

Nothing in it depends on when or where the bake ran, so the same bake gives the
same bytes.
"""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

__all__ = ["NAME", "file_hash", "versions", "write_manifest"]

NAME: Final = "bake.json"
PACKAGES: Final = ("torch", "transformers", "safetensors", "gguf", "llama-cpp-python", "tokenizers")
CHUNK: Final = 8 << 20


def write_manifest(folder: Path, content: Mapping[str, object]) -> None:
    """Write the manifest into a folder."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / NAME).write_text(text, encoding="utf-8")


def file_hash(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal text."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while data := stream.read(CHUNK):
            digest.update(data)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """The versions of bake and of the packages whose numbers it relies on."""
    from bake import __version__

    found = {"bake": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
