"""A GGUF in several files, as `llama-gguf-split --split-max-size` would cut it."""

from dataclasses import replace
from types import MappingProxyType

from bake.gguf_file import DEFAULT_ALIGNMENT, GGUFFile, GGUFTensor, Span, padded

__all__ = ["in_parts"]


def in_parts(file: GGUFFile, most: int) -> GGUFFile:
    """The same file as if it were cut, for `patch` to write and `compare` to read.

    A part has at most `most` bytes of tensors, or one tensor; its header and metadata are not
    counted. All metadata is in the first part (llama.cpp's tools/gguf-split/gguf-split.cpp,
    `split_strategy`). A file that fits into one part is returned as it is.
    """
    groups: list[dict[str, GGUFTensor]] = [{}]
    size = 0
    for name, tensor in file.tensors.items():
        nbytes = padded(tensor.nbytes, DEFAULT_ALIGNMENT)
        size += nbytes
        if size > most and groups[-1]:
            groups.append({})
            size = nbytes
        groups[-1][name] = tensor
    if len(groups) == 1:
        return file
    bare = replace(
        file,
        metadata=MappingProxyType({}),
        pairs=MappingProxyType({}),
        metadata_range=Span(0, 0),
        # A part says nothing of its own alignment.
        alignment=DEFAULT_ALIGNMENT,
    )
    parts = tuple(
        replace(bare if number else file, tensors=MappingProxyType(group))
        for number, group in enumerate(groups)
    )
    tensors = {
        name: replace(tensor, part=number)
        for number, group in enumerate(groups)
        for name, tensor in group.items()
    }
    return replace(file, tensors=MappingProxyType(tensors), parts=parts)
