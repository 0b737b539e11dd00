"""One call of `llama_model_quantize`, in a process of its own.

ggml ends the process where a claim does not hold (a code that is not on the grid of an IQ type,
for one), and the call cannot be interrupted; neither shall end or block a bake. The request is
JSON on stdin (`bake.export.quantise`), progress goes to stdout as `done of all`, what failed to
stderr.
"""

import ctypes
import json
import re
import sys
from collections.abc import Mapping
from typing import Any

import llama_cpp
import numpy as np

_ERROR = 4
"""A level of `enum ggml_log_level` (ggml's include/ggml.h)."""


def main() -> int:
    """Quantise as asked; returns the exit code."""
    asked = json.load(sys.stdin)

    def log(level: int, text: bytes, _: object) -> None:
        line = text.decode("utf-8", "replace")
        if level == _ERROR:
            sys.stderr.write(line)
        elif found := re.match(r"\[ *(\d+)/ *(\d+)\]", line):
            sys.stdout.write(f"{found[1]} {found[2]}\n")
            sys.stdout.flush()

    callback = llama_cpp.llama_log_callback(log)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_quantize_default_params()
    for key in ("ftype", "nthread", "pure", "max_buf_size"):
        setattr(parameters, key, asked[key])
    for key in ("output_tensor_type", "token_embedding_type"):
        if asked[key] is not None:
            setattr(parameters, key, asked[key])
    types = [(name.encode(), kind) for name, kind in asked["tensor_types"]]
    if types:
        overrides = (llama_cpp.llama_model_tensor_override * (len(types) + 1))(*types)
        overrides[len(types)].type = llama_cpp.GGML_TYPE_COUNT
        parameters.tt_overrides = overrides
    if asked["importance"]:
        importance, _kept = _importance(asked["importance"])
        parameters.imatrix = importance
    if asked["pairs"]:
        parameters.kv_overrides = _pairs(asked["pairs"])
    source, output = asked["source"].encode(), asked["output"].encode()
    return int(llama_cpp.llama_model_quantize(source, output, ctypes.byref(parameters)))


def _importance(asked: Mapping[str, Any]) -> tuple[Any, Any]:
    """The importance matrix as llama.cpp takes it, and what must live as long."""
    values = np.fromfile(asked["file"], dtype=np.float32)
    entries = (llama_cpp.llama_model_imatrix_data * (len(asked["entries"]) + 1))()
    pointer = ctypes.POINTER(ctypes.c_float)
    for place, (name, start, size) in zip(entries, asked["entries"], strict=False):
        place.name, place.size = name.encode(), size
        place.data = values[start : start + size].ctypes.data_as(pointer)
    return entries, values


def _pairs(asked: Mapping[str, int | str]) -> Any:
    """Metadata to set, as llama.cpp takes it; the last one has no key."""
    pairs = (llama_cpp.llama_model_kv_override * (len(asked) + 1))()
    for place, (key, value) in zip(pairs, asked.items(), strict=False):
        place.key = key.encode()
        if isinstance(value, int):
            place.tag, place.value.val_i64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, value
        else:
            # A zero-terminated text of 128 bytes.
            place.tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR
            place.value.val_str = value.encode()[:127]
    return pairs


if __name__ == "__main__":
    sys.exit(main())
