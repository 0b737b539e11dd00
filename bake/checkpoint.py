"""The read side of a safetensors checkpoint: headers, single tensors, sidecar files.

Opening reads headers only. The format is described at
https://github.com/huggingface/safetensors#format: eight bytes of little-endian
header length, a JSON header, then the tensors' bytes without holes.
"""

import json
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from sys import intern
from typing import Final, NamedTuple

import torch
from torch import Tensor

from bake.errors import CheckpointError
from bake.quantised import check_quantisation, companions, dequantised

__all__ = [
    "DTYPES",
    "EDITABLE",
    "FP8",
    "INDEX",
    "Checkpoint",
    "Shard",
    "TensorInfo",
    "byte_count",
    "read_shard",
    "read_tensor",
]

# The cap of the reference implementation (safetensors/src/tensor.rs, MAX_HEADER_SIZE).
MAX_HEADER: Final = 100_000_000

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "C64": torch.complex64,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
# Those that torch has no tensors of: they are copied (safetensors/src/tensor.rs, `Dtype`).
PACKED_BITS: Final = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
LARGEST: Final = 1 << 63
EDITABLE: Final = ("F32", "F16", "BF16", "F64")
FP8: Final = "F8_E4M3"

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"


class TensorInfo(NamedTuple):
    """Where a tensor lies: `start` and `stop` are absolute byte offsets in `file`.

    A tensor in FP8 has its `scale`; `dtype` is then what it is written in when it is edited.
    The largest checkpoints have 90,000: a tuple is made in half the time of a dataclass.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int
    scale: "TensorInfo | None" = None


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its tensors in the order of their bytes, which begin at `start`.

    They are as on disk: `Checkpoint.tensors` has those in FP8 as what they mean.
    """

    file: Path
    start: int
    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str] | None


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a config.json and safetensors files.

    `beside` are, by the name of a tensor in FP8, those that belong to it and to nothing
    else: they are not among the `tensors`, and go when it is written in another type.
    """

    folder: Path
    config: Mapping[str, object]
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorInfo]
    beside: Mapping[str, tuple[TensorInfo, ...]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read the headers of every shard.

        Raises CheckpointError for anything missing, truncated or contradictory.
        """
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder; give a checkpoint folder or a Hub id")
        config = _read_json(folder / "config.json")
        shards = tuple(read_shard(file) for file in _shard_files(folder))
        tensors: dict[str, TensorInfo] = {}
        for shard in shards:
            for info in shard.tensors:
                if info.name in tensors:
                    raise CheckpointError(
                        f"{info.file}: {info.name} is also in {tensors[info.name].file.name}"
                    )
                tensors[info.name] = info
        if not check_quantisation(config, str(folder / "config.json"), tensors):
            return cls(folder, config, shards, tensors)
        beside = _beside(tensors)
        for name, found in beside.items():
            tensors[name] = tensors[name]._replace(dtype="BF16", scale=found[0])
            for one in found:
                del tensors[one.name]
        return cls(folder, config, shards, tensors, beside)

    def read(self, name: str) -> Tensor:
        """Read one tensor in the type it has on disk; one in FP8 in float32, scaled."""
        return read_tensor(self.find(name))

    def find(self, name: str) -> TensorInfo:
        """The header entry of a tensor; raises CheckpointError when there is none."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder}: no tensor named {name}")
        return self.tensors[name]

    def sidecars(self) -> tuple[Path, ...]:
        """Every file beside the shards that belongs to the model, sorted by name.

        Weights in other formats are left out: they would be the unedited model.
        """
        weights = {shard.file.name for shard in self.shards}
        foreign = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".safetensors")
        return tuple(
            path
            for path in sorted(self.folder.iterdir())
            if path.is_file()
            and path.name not in weights
            and not path.name.startswith(".")
            and not path.name.endswith(foreign)
        )


def _beside(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[TensorInfo, ...]]:
    """What belongs to each FP8 weight, its scale first.

    Raises CheckpointError for an FP8 tensor without a scale.
    """
    found = {}
    for name, info in tensors.items():
        if info.dtype == FP8:
            own = tuple(tensors[one] for one in companions(name) if one in tensors)
            if not own or own[0].name != companions(name)[0]:
                raise CheckpointError(
                    f"{info.file}: {name} is {info.dtype}, and there is no {companions(name)[0]}; "
                    "give a bfloat16 copy"
                )
            found[name] = own
    return found


def read_tensor(info: TensorInfo) -> Tensor:
    """Read one tensor, shape and dtype as in its header; one in FP8 in float32, scaled."""
    if info.scale:
        plain = info._replace(dtype=FP8, scale=None)
        return dequantised(read_tensor(plain), read_tensor(info.scale), info.name)
    if info.dtype not in DTYPES:
        raise CheckpointError(f"{info.file}: {info.name}: torch has no tensors of {info.dtype}")
    try:
        with info.file.open("rb") as stream:
            stream.seek(info.start)
            data = stream.read(info.stop - info.start)
    except OSError as error:
        raise CheckpointError(f"{info.file}: {error.strerror}") from error
    if len(data) != info.stop - info.start:
        raise CheckpointError(f"{info.file}: truncated inside {info.name}; download it again")
    if not data:
        return torch.empty(info.shape, dtype=DTYPES[info.dtype])
    return torch.frombuffer(bytearray(data), dtype=DTYPES[info.dtype]).view(info.shape)


def _shard_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.exists():
        single = folder / SINGLE
        if single.is_file():
            return [single]
        raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX}; bake reads safetensors")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map: missing or empty")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        plain = Path(name).name == name and name.isprintable()
        if not plain or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: weight_map: {name!r} is not a file of this folder")
        if not _is_file(folder / name):
            raise CheckpointError(f"{folder / name}: missing, but {INDEX} names it")
    return [folder / name for name in names]


def _is_file(path: Path) -> bool:
    # Also for a name that is longer than the system allows.
    try:
        return path.is_file()
    except OSError:
        return False


def _read_json(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value


def read_shard(file: Path) -> Shard:
    """Read and check the header of one file; raises CheckpointError."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{file}: not a safetensors file, or truncated "
                    f"(header of {length} bytes in a file of {size}); download it again"
                )
            header = json.loads(stream.read(length), object_pairs_hook=_unique)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: unreadable safetensors header ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: unreadable safetensors header (not an object)")
    metadata = header.pop("__metadata__", None)
    if not (metadata is None or _is_text(metadata)):
        raise CheckpointError(f"{file}: __metadata__: expected an object of text")
    data_start = 8 + length
    # Most tensors have a shape that others have.
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
    found = [_info(file, name, entry, data_start, shapes) for name, entry in header.items()]
    tensors = tuple(sorted(found, key=attrgetter("start", "stop")))
    end = data_start
    for info in tensors:
        if info.start != end:
            raise CheckpointError(f"{file}: {info.name}: its bytes overlap or leave a hole")
        end = info.stop
    if end != size:
        raise CheckpointError(
            f"{file}: truncated or padded: {size} bytes, but its header describes {end}; "
            "download it again"
        )
    return Shard(file, data_start, tensors, metadata)


def byte_count(shape: Iterable[int], dtype: str) -> int | None:
    """The bytes of a tensor; None where the last would not be full, or no disk holds so many."""
    bits = PACKED_BITS[dtype] if dtype in PACKED_BITS else 8 * DTYPES[dtype].itemsize
    count = 1
    for length in shape:
        count *= length
        # The product of a header's worth of large numbers would take minutes.
        if count > LARGEST:
            return None
    count, left = divmod(count * bits, 8)
    return None if left else count


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate key")
    return found


def _is_text(metadata: object) -> bool:
    return isinstance(metadata, dict) and all(isinstance(one, str) for one in metadata.values())


def _info(
    file: Path,
    name: str,
    entry: object,
    data_start: int,
    shapes: dict[tuple[int, ...], tuple[int, ...]],
) -> TensorInfo:
    # Control characters and halves of surrogate pairs can be in no message and no other header.
    if not name.isprintable():
        raise CheckpointError(f"{file}: {name[:40]!a}: malformed name of a tensor")
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(first), int(last)]}:
            pass
        case _:
            raise CheckpointError(f"{file}: {name}: malformed header entry")
    if dtype not in DTYPES and dtype not in PACKED_BITS:
        raise CheckpointError(f"{file}: {name}: dtype {dtype!r} is not supported")
    if not all(type(length) is int and length >= 0 for length in shape):
        raise CheckpointError(f"{file}: {name}: malformed shape {reprlib.repr(shape)}")
    if bool in (type(first), type(last)):
        raise CheckpointError(f"{file}: {name}: malformed header entry")
    if not 0 <= first <= last or last - first != byte_count(shape, dtype):
        raise CheckpointError(
            f"{file}: {name}: offsets do not match shape {reprlib.repr(shape)} of {dtype}"
        )
    own = tuple(shape)
    shared = shapes.setdefault(own, own)
    return TensorInfo(name, intern(dtype), shared, file, data_start + first, data_start + last)
