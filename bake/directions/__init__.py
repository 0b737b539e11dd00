"""Directions, one or several to a layer, and the files that hold them, one format a file.

`load_directions` reads every format (safetensors, llama.cpp's control vector, .npy, .pt) by
what the file's first bytes say; `save_directions` writes the first two. docs/directions.md
has the formats.
"""

from bake.directions.files import load_directions, read_directions, save_directions
from bake.directions.value import Directions, Unplaced

__all__ = ["Directions", "Unplaced", "load_directions", "read_directions", "save_directions"]
