"""Which tensors a graph of llama.cpp reads, from the nodes that it computes.

A loader that creates a tensor may build a graph that never reads it: falcon-h1 loads the bias of
its attention output and adds none (llama.cpp's src/models/falcon-h1.cpp), fused q, k and v add
theirs only together (src/llama-graph.cpp, `build_qkv`). So a file that loads proves nothing. The
scheduler shows each node to a callback before it runs (ggml's include/ggml-backend.h,
`ggml_backend_sched_eval_callback`), and a node names what it is computed from.
"""

import ctypes
from typing import Any

import llama_cpp

from bake.ggml import ggml

__all__ = ["GraphTensor", "TensorsRead", "check_layout"]


class GraphTensor(ctypes.Structure):
    """`struct ggml_tensor` (ggml's include/ggml.h)."""


GraphTensor._fields_ = (
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(GraphTensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
)


def check_layout() -> None:
    """Raises NotImplementedError where this build of ggml lays tensors out in another way."""
    tensor = GraphTensor()
    start = ctypes.addressof(tensor)
    # The library's own answer to where the name lies, behind all that is read here.
    if ggml().ggml_get_name(start) - start != GraphTensor.name.offset:
        raise NotImplementedError("another layout of ggml_tensor")


class TensorsRead:
    """Collects the names of what nodes are computed from; `callback` goes into a context.

    Raises NotImplementedError as `check_layout` does.
    """

    def __init__(self) -> None:
        check_layout()
        self.names: set[str] = set()
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._receive)

    def _receive(self, node: Any, _asked: bool, _data: Any) -> bool:
        sources = ctypes.cast(node, ctypes.POINTER(GraphTensor)).contents.src
        self.names |= {one.contents.name.decode("utf-8", "replace") for one in sources if one}
        return False  # nothing of it has to be computed for us
