"""`bake.json`: where a bake comes from, what was written, and every measured figure.

Nothing in it depends on when or where the bake ran, so the same bake gives the
same bytes.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Lock
from typing import Any, Final

from bake.device import CPU, chosen_device, edit_device
from bake.errors import ManifestError

__all__ = [
    "NAME",
    "differences",
    "file_hash",
    "file_hashes",
    "manifest_text",
    "read_manifest",
    "read_outputs",
    "versions",
    "write_manifest",
]

NAME: Final = "bake.json"
PACKAGES: Final = ("torch", "transformers", "safetensors", "gguf", "llama-cpp-python", "tokenizers")
CHUNK: Final = 1 << 20


def write_manifest(folder: Path, content: Mapping[str, object]) -> None:
    """Write the manifest into a folder."""
    (folder / NAME).write_text(manifest_text(content), encoding="utf-8")


def manifest_text(content: Mapping[str, object]) -> str:
    """The manifest as its file has it."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a baked folder; raises ManifestError where bake wrote none."""
    path = folder / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ManifestError(
            f"{path}: cannot be read: {error.strerror}; give the folder of a bake"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: not valid JSON; bake the recipe again") from error
    match content:
        case {"outputs": dict(outputs)} if all(isinstance(one, str) for one in outputs.values()):
            return dict(content)
    raise ManifestError(f"{path}: outputs: expected the hashes of files; bake the recipe again")


def read_outputs(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a baked folder, as its manifest has them.

    Raises ManifestError where there is no manifest that bake wrote.
    """
    outputs: dict[str, str] = read_manifest(folder)["outputs"]
    return outputs


def differences(
    folder: Path, outputs: Mapping[str, str], progress: Callable[[int], None] = lambda _: None
) -> list[str]:
    """What of a baked folder is not as its manifest has it, a line each.

    Hidden files do not count: a download of the Hub brings some (`.gitattributes`, `.cache`).
    Every file is read once; `progress` receives the number of bytes since the last call.
    """
    inside = (path for path in sorted(folder.rglob("*")) if path.is_file())
    found = {path.relative_to(folder).as_posix(): path for path in inside}
    for name in [name for name in found if name == NAME or "/." in f"/{name}"]:
        del found[name]
    missing = [f"{folder / name}: missing" for name in outputs if name not in found]
    others = [f"{path}: not of the bake" for name, path in found.items() if name not in outputs]
    hashes = file_hashes([found[name] for name in outputs if name in found], progress)
    changed = [
        f"{folder / name}: changed since the bake"
        for name, digest in outputs.items()
        if name in found and hashes[found[name]] != digest
    ]
    return missing + others + changed


def file_hashes(
    paths: Iterable[Path], progress: Callable[[int], None] = lambda _: None
) -> dict[Path, str]:
    """SHA-256 of files, a processor each; `progress` receives the bytes since the last call."""
    lock, paths = Lock(), tuple(paths)

    def done(count: int) -> None:
        with lock:
            progress(count)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        hashes = pool.map(lambda path: file_hash(path, done), paths)
        return dict(zip(paths, hashes, strict=True))


def file_hash(path: Path, progress: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of a file, as hexadecimal text."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while data := stream.read(CHUNK):
            digest.update(data)
            progress(len(data))
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """The versions of bake and of the packages whose numbers it relies on.

    With the kind of device that models run on, where it is not the processor, and of "auto" the
    kind that weights are edited on.
    """
    from bake import __version__

    found = {"bake": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    device, edits = (one.partition(":")[0] for one in (chosen_device(), edit_device()))
    if device != CPU:
        found["device"] = device if device == edits else f"{device} ({edits})"
    return found
