"""An importance matrix of a GGUF, from what its matrices read in llama.cpp.

As tools/imatrix/imatrix.cpp has it (`collect_imatrix`, `compute_imatrix`): texts one behind the
other in chunks of 512 tokens, a chunk a sequence, and the squares of the inputs of every matrix of
a block summed over the tokens, for stacked experts over the tokens that chose each.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import llama_cpp
import numpy as np
import numpy.typing as npt

from bake.errors import ConverterError, PromptError
from bake.ggml import ggml
from bake.ggml_graph import GraphTensor, check_layout
from bake.imatrix import Importance
from bake.llama import LlamaModel

__all__ = ["CHUNK", "collect_importance"]

CHUNK: Final = 512
"""Tokens of a sequence."""
_FEWEST: Final = 16
"""Rows below which an operation is left out, as llama.cpp does: it is not the reading of a text."""
_F32: Final = 0


def collect_importance(
    path: Path,
    texts: Sequence[str],
    dataset: str,
    threads: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Importance:
    """The importance matrix of a GGUF on some texts; `dataset` is what they are called.

    Tokens that fill no chunk are left out. `progress` receives the tokens read since its last
    call. Raises PromptError where the texts have not even one chunk.
    """
    try:
        check_layout()
    except NotImplementedError as error:
        raise ConverterError(
            f"imatrix: none can be computed with the installed llama.cpp ({error}); give a file of "
            "llama-imatrix, or install the llama-cpp-python of constraints.txt"
        ) from error
    sums = _Sums()
    watch = llama_cpp.llama_cpp.ggml_backend_sched_eval_callback(sums.receive)
    with LlamaModel(path, context=CHUNK, parallel=1, threads=threads, watch=watch) as model:
        tokens = model.tokenize("\n\n".join(texts))
        chunks = len(tokens) // CHUNK
        if not chunks:
            raise PromptError(
                f"prompts.text: {len(tokens)} tokens in its fit split, and an importance matrix "
                f"takes {CHUNK}; give more text, or a file as imatrix"
            )
        for start in range(0, chunks * CHUNK, CHUNK):
            chunk = tokens[start : start + CHUNK]
            if model.beginning is not None:
                chunk[0] = model.beginning
            # All logits are asked for: else the last block reads one token of each chunk.
            model.logits(chunk)
            progress(CHUNK)
    if sums.failed:
        raise ConverterError(f"{path.name}: no importance matrix: {sums.failed}")
    return Importance(
        {name: total.astype(np.float32) for name, total in sums.sums.items()},
        {name: counts.astype(np.float32) for name, counts in sums.counts.items()},
        (dataset,),
        chunks,
        CHUNK,
    )


class _Sums:
    """What has been summed so far, in float64."""

    def __init__(self) -> None:
        self.sums: dict[str, npt.NDArray[np.float64]] = {}
        self.counts: dict[str, npt.NDArray[np.float64]] = {}
        self.failed = ""

    def receive(self, address: int, ask: bool, _: object) -> bool:
        """llama.cpp asks about an operation before it, and where it was wanted, shows it after."""
        try:
            done = ctypes.cast(address, ctypes.POINTER(GraphTensor)).contents
            kind = _operation(done.op)
            if kind not in (b"MUL_MAT", b"MUL_MAT_ID"):
                return False
            matrix, inputs = done.src[0].contents, done.src[1].contents
            # As in CPU#blk.0.attn_q.weight#0, where a matrix was copied to a device.
            marked = matrix.name.decode().split("#")
            name = marked[1] if len(marked) > 1 else marked[0]
            expert = kind == b"MUL_MAT_ID"
            if ask:
                few = not expert and inputs.ne[1] < _FEWEST
                return name.startswith("blk.") and inputs.type == _F32 and not few
            if expert:
                self._add_experts(name, matrix, inputs, done.src[2].contents)
            else:
                self._add(name, matrix, inputs)
        except Exception as error:  # An exception would be lost in C, and the sums be wrong.
            self.failed = self.failed or f"{type(error).__name__}: {error}"
        return True

    def _add(self, name: str, matrix: GraphTensor, inputs: GraphTensor) -> None:
        values = _array(inputs, np.float32)
        # Inputs [ne3, ne2, tokens, columns]; a stack of matrices repeats under them.
        stack = matrix.ne[2], matrix.ne[3]
        columns, tokens = inputs.ne[0], inputs.ne[1] * inputs.ne[2] * inputs.ne[3]
        squares = np.zeros((stack[1], stack[0], columns))
        for i3 in range(inputs.ne[3]):
            for i2 in range(inputs.ne[2]):
                rows = values[i3, i2].astype(np.float64)
                squares[i3 % stack[1], i2 % stack[0]] += np.square(rows).sum(0)
        total = self.sums.setdefault(name, np.zeros((1, squares.size)))
        total += squares.reshape(1, -1)
        self.counts.setdefault(name, np.zeros(1))[:] += tokens // (stack[0] * stack[1])

    def _add_experts(
        self, name: str, matrix: GraphTensor, inputs: GraphTensor, chosen: GraphTensor
    ) -> None:
        values = _array(inputs, np.float32)[0]  # [tokens, experts used or 1, columns]
        ids = _array(chosen, np.int32)[0, 0]  # [tokens, experts used]
        total = self.sums.setdefault(name, np.zeros((matrix.ne[2], inputs.ne[0])))
        counts = self.counts.setdefault(name, np.zeros(matrix.ne[2]))
        for place in range(ids.shape[1]):
            rows = np.square(values[:, place % values.shape[1]].astype(np.float64))
            np.add.at(total, ids[:, place], rows)
            np.add.at(counts, ids[:, place], 1)


def _array(tensor: GraphTensor, kind: type[np.generic]) -> npt.NDArray[Any]:
    """The numbers of a tensor in the memory of the processor, slowest axis first."""
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    size = sum((count - 1) * step for count, step in zip(shape, strides, strict=True))
    memory = (ctypes.c_char * (size + np.dtype(kind).itemsize)).from_address(tensor.data)
    return np.ndarray(shape, kind, memory, strides=strides)


@cache
def _operation(number: int) -> bytes:
    name: bytes = ggml().ggml_op_name(number)
    return name
