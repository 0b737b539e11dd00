"""A GGUF in floating point as one of another type, by llama.cpp's own quantiser.

What `llama-quantize` would write, byte for byte: the options have its names, and the metadata
that it adds is added (llama.cpp's tools/quantize/quantize.cpp, `llama_quantize`).
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType

from bake.errors import ConverterError, GGUFError
from bake.ggml import Floats
from bake.gguf_file import GGUFFile
from bake.imatrix import Importance

__all__ = ["Quantisation", "check_patterns", "quantise"]

_ALIASES: Final = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
_BUFFER: Final = 1 << 30
"""Bytes of a tensor's rows that llama.cpp holds at a time; its own default is eight times that."""


@dataclass(frozen=True)
class Quantisation:
    """What llama-quantize is asked for.

    `type` is of `bake.recipe.values.FILE_TYPES`; `tensor_types` are regular expressions of tensor
    names with their type, of which the first that is found in a name counts. `file_type` is
    what the metadata says where that is another than `type`.
    """

    type: str
    tensor_types: tuple[tuple[str, GGMLQuantizationType], ...] = ()
    output_tensor_type: GGMLQuantizationType | None = None
    token_embedding_type: GGMLQuantizationType | None = None
    pure: bool = False
    file_type: int | None = None


def quantise(
    source: GGUFFile,
    output: Path,
    asked: Quantisation,
    threads: int,
    importance: Importance | None = None,
    name: str = "",
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Write `source`, a file in floating point, to the new file `output` as asked.

    `name` is the importance matrix's in the metadata. One tensor is in memory at a time.
    `progress` receives the number of tensors written since its last call. Raises
    ConverterError for a pattern that is in no tensor's name and with llama.cpp's own last
    words, and GGUFError for an importance matrix of another model.
    """
    check_patterns(source, asked)
    pairs: dict[str, int | str] = {}
    if asked.file_type is not None:
        pairs["general.file_type"] = asked.file_type
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".quantise-") as folder:
        request = {
            "source": str(source.path),
            "output": str(output),
            "ftype": _number(asked.type),
            "nthread": threads,
            "pure": asked.pure,
            "max_buf_size": _BUFFER,
            "output_tensor_type": asked.output_tensor_type,
            "token_embedding_type": asked.token_embedding_type,
            # llama-quantize makes them small, so that a pattern in capitals is found.
            "tensor_types": [(pattern.lower(), kind) for pattern, kind in asked.tensor_types],
            "importance": None,
            "pairs": pairs,
        }
        if importance is not None:
            means = _fitting(source, importance, name)
            request["importance"] = _stored(means, Path(folder, "importance"))
            pairs |= _importance_pairs(importance, name, len(means))
        failed = _run(request, progress)
    if failed is not None:
        output.unlink(missing_ok=True)
        remedy = "choose another type, or other tensor_types"
        if "imatrix" in failed or "importance matrix" in failed:
            remedy = "give an imatrix (text computes one), or choose another type"
        raise ConverterError(
            f"convert: llama.cpp does not make {asked.type} of this model: {failed}; {remedy}"
        )


def _number(name: str) -> int:
    """A mix of types in include/llama.h, `enum llama_ftype`."""
    number: int = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{_ALIASES.get(name, name).upper()}")
    return number


def check_patterns(source: GGUFFile, asked: Quantisation) -> None:
    """Refuse a pattern that is in the name of no matrix: llama.cpp would pass over it."""
    matrices = [name for name, tensor in source.tensors.items() if len(tensor.shape) > 1]
    for pattern, _ in asked.tensor_types:
        try:
            found = any(re.search(pattern.lower(), name) for name in matrices)
        except re.error as error:
            raise ConverterError(
                f"tensor_types: {pattern!r} is no regular expression: {error}; "
                'give parts of tensor names, as in "attn_v"'
            ) from error
        if not found:
            raise ConverterError(
                f"tensor_types: {pattern!r} is in the name of no matrix of the model; "
                f"there are {', '.join(_kinds(matrices))}"
            )


def _kinds(matrices: list[str]) -> list[str]:
    """The matrices' names without their blocks."""
    return sorted({name.split(".")[-2] for name in matrices if name.endswith(".weight")})


def _fitting(source: GGUFFile, importance: Importance, name: str) -> dict[str, Floats]:
    """The means; refused where they are of another model."""
    means = importance.means()
    known = means.keys() & source.tensors.keys()
    for tensor in known:
        shape = source.tensors[tensor].shape
        size = prod(shape[:-2]) * shape[-1]
        if len(means[tensor]) != size:
            raise GGUFError(
                f"{name}: {tensor} has {len(means[tensor])} values, and the model's reads {size}; "
                "give the importance matrix of this model"
            )
    if not known:
        raise GGUFError(
            f"{name}: has no tensor of this model; give the importance matrix of this model"
        )
    return means


def _stored(means: Mapping[str, Floats], file: Path) -> dict[str, object]:
    entries, start = [], 0
    with file.open("wb") as stream:
        for name, values in means.items():
            stream.write(values.astype(np.float32).tobytes())
            entries.append((name, start, values.size))
            start += values.size
    return {"file": str(file), "entries": entries}


def _importance_pairs(importance: Importance, name: str, entries: int) -> dict[str, int | str]:
    """The metadata that llama-quantize adds, in its order."""
    pairs: dict[str, int | str] = {"quantize.imatrix.file": name}
    if importance.datasets:
        pairs["quantize.imatrix.dataset"] = importance.datasets[0]
    pairs["quantize.imatrix.entries_count"] = entries
    if importance.chunks > 0:
        pairs["quantize.imatrix.chunks_count"] = importance.chunks
    return pairs


def _run(request: Mapping[str, object], progress: Callable[[int], None]) -> str | None:
    """Run the process; what it said last where it failed."""
    command = [sys.executable, "-m", "bake.export.quantise_process"]
    # What ggml asserts is said in one line, without a debugger's.
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    with (
        tempfile.TemporaryFile("w+", errors="replace") as said,
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            # A process that died at once has its reason on stderr.
            with suppress(BrokenPipeError), process.stdin as stream:
                stream.write(json.dumps(request))
            for count in _steps(process.stdout):
                progress(count)
            code = process.wait()
        except BaseException:
            process.kill()
            raise
        if code == 0:
            return None
        said.seek(0)
        lines = [line.strip(" =\n") for line in said]
        words = [line for line in lines if line]
        last = words[-1] if words else f"it ended with code {code}"
        return last.removeprefix("llama_model_quantize: failed to quantize: ")[:300]


def _steps(lines: Iterable[str]) -> Iterator[int]:
    """How far it is, as steps; ggml prints other lines too."""
    before = 0
    for line in lines:
        done = line.partition(" ")[0]
        if done.isdecimal() and int(done) > before:
            yield int(done) - before
            before = int(done)
