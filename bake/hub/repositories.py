"""Which files of a baked folder go into which repository: checkpoint, GGUF, adapter."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import PurePosixPath

from bake.card import Kind

__all__ = ["ADAPTER", "ADDED", "CARD", "repository_ids", "sorted_files"]

CARD = "README.md"
ADAPTER = "adapter"
# Files that a push was given beside the bake, and the report that shows them.
ADDED = "evidence"
# Of a GGUF alone: what Ollama reads beside it.
BESIDE_GGUF = ("Modelfile", "params", "template", "system")
EVIDENCE = ("answers.jsonl", "report.html", "*.svg", "steering/*")
# A licence goes wherever the weights go.
TERMS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
SUFFIXES: Mapping[Kind, str] = {"checkpoint": "", "gguf": "-GGUF", "adapter": "-LoRA"}


def sorted_files(names: Iterable[str]) -> dict[Kind, dict[str, str]]:
    """The files of a bake by repository: the path there, and the path in the folder.

    A kind that the bake did not write is left out, and so is the card, which each repository has
    of its own. PEFT and vLLM look for an adapter at the top.
    """
    found: dict[Kind, dict[str, str]] = {"checkpoint": {}, "gguf": {}, "adapter": {}}
    shared: dict[str, str] = {}
    terms: dict[str, str] = {}
    for name in names:
        path = PurePosixPath(name)
        if name == CARD:
            continue
        if path.parts[0] == ADAPTER:
            found["adapter"][path.relative_to(ADAPTER).as_posix()] = name
        elif path.suffix == ".gguf" or name in BESIDE_GGUF:
            found["gguf"][name] = name
        elif any(fnmatch(name, pattern) for pattern in TERMS):
            terms[name] = name
        elif any(fnmatch(name, pattern) for pattern in EVIDENCE):
            shared[name] = name
        else:
            found["checkpoint"][name] = name
    own = {kind: files for kind, files in found.items() if files}
    return {
        kind: files | terms | (shared if kind != "adapter" else {}) for kind, files in own.items()
    }


def repository_ids(repo_id: str, kinds: Iterable[Kind]) -> dict[Kind, str]:
    """The repository of each kind: a GGUF's ends in -GGUF, as Ollama's and others' users expect."""
    return {
        kind: repo_id
        if repo_id.casefold().endswith(SUFFIXES[kind].casefold())
        else f"{repo_id}{SUFFIXES[kind]}"
        for kind in kinds
    }
