"""llama.cpp's control vector: a GGUF of the architecture `controlvector`.

`direction.N` (N from 1, F32, [width]) is added to the output of block N, counted from 0
(common/common.cpp, `common_control_vector_load_one`, puts it at data[(N - 1) * n_embd], and
src/llama-adapter.cpp, `llama_adapter_cvec::apply`, hands that to block N), so it is bake's
layer N. repeng numbers alike: its layer N is hidden_states[N + 1] (repeng/extract.py,
`batched_get_hiddens`), which is the output of block N.

Trap: llama.cpp's own cvector-generator names what it measured behind block N
`direction.{N + 1}` (tools/cvector-generator/mean.hpp:18, pca.hpp:305), and so llama.cpp
adds it one block later. Nothing in the file tells; bake does with it what llama.cpp does.
"""

from pathlib import Path

from gguf import GGMLQuantizationType, GGUFWriter

from bake.directions.value import Directions, Origin, check_vector, key_of, layer_of, shown
from bake.errors import DirectionsError
from bake.gguf_file import GGUFFile

__all__ = ["read_control_vector", "write_control_vector"]

ARCHITECTURE = "controlvector"
HINT = f"{ARCHITECTURE}.model_hint"
READABLE = ("F32", "F16", "BF16")


def read_control_vector(path: Path) -> Directions:
    """Read what llama.cpp's `--control-vector`, or repeng, reads of such a file."""
    file = GGUFFile.open(path)
    if file.architecture != ARCHITECTURE:
        raise DirectionsError(
            f"general.architecture is {shown(file.architecture)}, not {ARCHITECTURE!r}: this GGUF "
            "is no control vector; give one, or a safetensors file of directions"
        )
    placed = {}
    for name, tensor in file.tensors.items():
        layer = layer_of(name)
        if layer == 0:
            raise DirectionsError(
                f"{shown(name)}: llama.cpp refuses a direction of block 0, so none can mean it; "
                "remove it, or save block 0's direction as safetensors"
            )
        check_vector(shown(name), tensor.shape)
        if tensor.type.name not in READABLE:
            raise DirectionsError(f"{shown(name)} is of type {tensor.type.name}; save it as F32")
        placed[layer] = name
    origin = Origin.of(
        {"model": file.metadata.get(HINT)}
        | {
            key.removeprefix("bake."): text
            for key, text in file.metadata.items()
            if key.startswith("bake.")
        }
    )
    return Directions({layer: file.read(name) for layer, name in placed.items()}, origin)


def write_control_vector(directions: Directions, path: Path) -> None:
    """Write a file for `llama-cli --control-vector` and repeng; the origin is under `bake.`.

    Raises DirectionsError for a direction of block 0, for which llama.cpp has no slot, and
    for several of one block.
    """
    if directions.several:
        layer = directions.several[0]
        raise DirectionsError(
            f"{key_of(layer)} has {len(directions.basis(layer))} vectors, and a control vector has "
            "one a layer; write .safetensors instead, or take the first with `bake directions "
            "--first`"
        )
    if 0 in directions.vectors:
        raise DirectionsError(
            "llama.cpp cannot steer the output of block 0, and there is a direction.0; "
            "write .safetensors instead"
        )
    writer = GGUFWriter(path, ARCHITECTURE)
    writer.add_string(HINT, directions.origin.model or "unknown")
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions.layers))
    for key, text in directions.origin.as_json().items():
        if text:
            writer.add_string(f"bake.{key}", text)
    for layer, vector in directions.vectors.items():
        writer.add_tensor(key_of(layer), vector.numpy(), raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
