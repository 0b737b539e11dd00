"""Files of directions: what is written is read back, in every format, and hostile ones are not."""

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bake import __version__
from bake.directions import (
    Directions,
    Unplaced,
    load_directions,
    read_directions,
    save_directions,
)
from bake.directions.value import Origin, in_words, layer_of
from bake.errors import DirectionsError, GGUFError, InputError, OutputError

ORIGIN = Origin("some/model", "rmd", "out", "recipe x: target against general")


def vectors(*layers: int, width: int = 6) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {layer: 3 * torch.randn(width, generator=generator) for layer in layers}


def assert_same(one: Directions, other: Directions) -> None:
    """Equal to the bit, layers and origin too."""
    assert one.layers == other.layers
    for layer in one.layers:
        assert one.vectors[layer].dtype == other.vectors[layer].dtype == torch.float32
        assert torch.equal(one.vectors[layer], other.vectors[layer])
    assert one.origin == other.origin


# --- the value


def test_directions_are_sorted_float32_copies_of_their_own_length() -> None:
    given = {5: torch.tensor([3.0, 4.0]), 2: torch.ones(2).half(), 3: torch.ones(2).double()}
    found = Directions(given)
    given[5][0] = 100
    assert found.layers == (2, 3, 5)
    assert found.width == 2
    assert {vector.dtype for vector in found.vectors.values()} == {torch.float32}
    assert float(found.vectors[5].norm()) == 5
    assert found.at([5]).layers == (5,)
    with pytest.raises(TypeError):
        found.vectors[5] = torch.ones(2)  # type: ignore[index]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({}, "there is no direction"),
        ({1: torch.zeros(3)}, "direction.1 is all zeros"),
        ({1: torch.tensor([1.0, float("nan")])}, "direction.1 is not finite"),
        ({1: torch.tensor([1.0, float("inf")])}, "direction.1 is not finite"),
        ({1: torch.tensor([1e300], dtype=torch.float64)}, "direction.1 is not finite"),
        ({1: torch.ones(3), 4: torch.ones(2)}, "direction.4 has width 2 and direction.1 3"),
        ({1: torch.ones(2, 2, 3)}, r"direction.1 has shape \[2, 2, 3\]"),
        ({1: torch.eye(3).repeat(2, 1)[:4]}, r"shape \[4, 3\]; .* several \[k, width\] with k up"),
        ({1: torch.ones(2, 3)}, "direction.1: of its 2 vectors one lies in the span of the others"),
        ({1: torch.tensor([[1.0, 2, 3], [0, 0, 0]])}, "direction.1 is all zeros"),
        ({1: torch.eye(3)[:2], 2: torch.ones(2)}, "direction.2 has width 2 and direction.1 3"),
        ({-1: torch.ones(3)}, "-1 is no name"),
        ({1000: torch.ones(3)}, "1000 is no name"),
        ({1: torch.ones(0)}, r"direction.1 has shape \[0\]"),
        ({1: torch.ones(3, dtype=torch.int64)}, "direction.1 is of type int64"),
    ],
)
def test_what_is_no_direction(wrong: dict[int, Tensor], words: str) -> None:
    with pytest.raises(DirectionsError, match=words):
        Directions(wrong)


def test_directions_at_another_site_are_not_mistaken() -> None:
    with pytest.raises(DirectionsError, match=r"site: .* not at 'ln1'"):
        Origin(site="ln1")


@pytest.mark.parametrize(
    ("key", "layer"),
    [("direction.0", 0), ("direction.15", 15), ("15", 15), (15, 15), (0, 0), (999, 999)],
)
def test_keys_that_name_a_layer(key: object, layer: int) -> None:
    assert layer_of(key, bare=True) == layer
    if not str(key).startswith("direction"):
        with pytest.raises(DirectionsError):
            layer_of(key)


@pytest.mark.parametrize(
    "key",
    [
        *("direction.", "direction.01", "direction.-1", "direction.1000", "direction.٣"),
        *("direction.1\n", "layer.1", -1, 1000, True, 1.0, None, (1,)),
        pytest.param(10**5000, id="huge"),
    ],
)
def test_keys_that_name_none(key: object) -> None:
    with pytest.raises(DirectionsError, match=r"expected direction\.LAYER") as caught:
        layer_of(key, bare=True)
    assert len(str(caught.value)) < 200


def test_layers_in_words() -> None:
    assert in_words([1, 5, 6, 7, 9]) == "1, 5-7, 9"


# --- round trips


@pytest.mark.parametrize("name", ["d.safetensors", "d.gguf"])
@pytest.mark.parametrize("origin", [ORIGIN, Origin(source="größer")], ids=["full", "source"])
def test_written_files_are_read_back_to_the_bit(tmp_path: Path, name: str, origin: Origin) -> None:
    given = Directions(vectors(1, 15, 999), origin)
    save_directions(given, tmp_path / name)
    # What a file is, its bytes say: the name plays no part.
    (tmp_path / name).rename(tmp_path / "renamed.npy")
    if name.endswith("gguf") and not origin.model:
        origin = Origin("unknown", source=origin.source)  # the model hint is required
    assert_same(load_directions(tmp_path / "renamed.npy"), Directions(given.vectors, origin))
    assert [path.name for path in tmp_path.iterdir()] == ["renamed.npy"]


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.dictionaries(
        st.integers(1, 999),
        st.lists(
            st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3
        ).filter(any),
        min_size=1,
        max_size=4,
    ),
    st.text(st.characters(exclude_categories=["C", "Z"])),
)
def test_any_directions_survive_both_formats(
    tmp_path: Path, numbers: dict[int, list[float]], words: str
) -> None:
    origin = Origin(model="m", source="s", estimator=words)
    given = Directions({layer: torch.tensor(row) for layer, row in numbers.items()}, origin)
    for name in ("d.safetensors", "d.gguf"):
        save_directions(given, tmp_path / name, overwrite=True)
        assert_same(load_directions(tmp_path / name), given)


def test_the_documented_names_are_in_the_file(tmp_path: Path) -> None:
    """Through safetensors' own reader, and the same bytes each time."""
    given = Directions(vectors(3, 12), ORIGIN)
    path = tmp_path / "d.safetensors"
    save_directions(given, path)
    for layer, vector in load_file(path).items():
        assert torch.equal(vector, given.vectors[int(layer.removeprefix("direction."))])
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {
            "format": "bake.directions",
            "version": "1",
            "bake": __version__,
            "width": "6",
            "layers": "3,12",
            "model": "some/model",
            "estimator": "rmd",
            "site": "out",
            "source": "recipe x: target against general",
        }
    first = path.read_bytes()
    assert int.from_bytes(first[:8], "little") % 8 == 0
    save_directions(given, path, overwrite=True)
    assert path.read_bytes() == first


def test_a_control_vector_is_what_llama_cpp_and_repeng_read(tmp_path: Path) -> None:
    """By gguf-py's reader: the checks of llama.cpp's loader (common.cpp), the keys of repeng's."""
    given = Directions(vectors(1, 12), ORIGIN)
    path = tmp_path / "d.gguf"
    save_directions(given, path)
    reader = GGUFReader(path)
    text = {key: field.contents() for key, field in reader.fields.items()}
    assert text["general.architecture"] == "controlvector"
    assert text["controlvector.model_hint"] == "some/model"
    assert text["controlvector.layer_count"] == 2
    assert text["bake.estimator"] == "rmd"
    for tensor, layer in zip(reader.tensors, (1, 12), strict=True):
        assert tensor.name == f"direction.{layer}"
        assert tensor.tensor_type == GGMLQuantizationType.F32
        assert list(tensor.shape) == [6]
        np.testing.assert_array_equal(tensor.data, given.vectors[layer].numpy())


def test_a_file_of_repeng(tmp_path: Path) -> None:
    """As repeng's `ControlVector.export_gguf` writes it: descending layers, a model type."""
    given = vectors(1, 2, 3)
    write_gguf(tmp_path / "r.gguf", {f"direction.{n}": given[n].numpy() for n in (3, 2, 1)})
    found = load_directions(tmp_path / "r.gguf")
    assert_same(found, Directions(given, Origin(model="qwen2", source="r.gguf")))


def write_gguf(
    path: Path, arrays: dict[str, np.ndarray], architecture: str = "controlvector"
) -> None:
    writer = GGUFWriter(path, architecture)
    writer.add_string("controlvector.model_hint", "qwen2")
    writer.add_uint32("controlvector.layer_count", len(arrays))
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", [">f8", "<f4", "<f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_numpy_stack_has_row_n_behind_block_n(tmp_path: Path, kind: str, order: Any) -> None:
    stack = np.zeros((5, 6), dtype=kind, order=order)
    stack[1], stack[4] = np.arange(6) - 0.5, np.arange(6) + 1
    np.save(tmp_path / "d.npy", stack)
    found = load_directions(tmp_path / "d.npy", layer=3)
    assert found.layers == (1, 4)
    assert found.vectors[1].tolist() == [-0.5, 0.5, 1.5, 2.5, 3.5, 4.5]
    assert found.vectors[4].tolist() == [1, 2, 3, 4, 5, 6]
    assert found.origin == Origin(source="d.npy")


def test_a_bare_vector_needs_a_layer(tmp_path: Path) -> None:
    vector = vectors(0)[0]
    np.save(tmp_path / "d.npy", vector.numpy())
    torch.save(vector, tmp_path / "d.pt")
    for name in ("d.npy", "d.pt"):
        assert isinstance(read_directions(tmp_path / name), Unplaced)
        found = load_directions(tmp_path / name, layer=7)
        assert_same(found, Directions({7: vector}, Origin(source=name)))
        with pytest.raises(DirectionsError, match=f"{name}: holds one vector .* --layer N"):
            load_directions(tmp_path / name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_torch_files(tmp_path: Path, dtype: torch.dtype) -> None:
    given = {layer: vector.to(dtype) for layer, vector in vectors(2, 4).items()}
    expected = Directions(given, Origin(source="d.pt"))
    stack = torch.zeros(5, 6, dtype=dtype)
    stack[2], stack[4] = given[2], given[4]
    for content in (given, {"2": given[2], "direction.4": given[4]}, stack):
        torch.save(content, tmp_path / "d.pt")
        assert_same(load_directions(tmp_path / "d.pt"), expected)
    # A row of a larger tensor, and a parameter.
    torch.save({2: torch.nn.Parameter(stack[2]), 4: stack[4]}, tmp_path / "d.pt")
    assert_same(load_directions(tmp_path / "d.pt"), expected)


def test_a_foreign_safetensors_file_counts_by_its_tensors(tmp_path: Path) -> None:
    given = vectors(2, 4)
    named = {f"direction.{layer}": vector.bfloat16() for layer, vector in given.items()}
    # Another program's `site` is not ours to read.
    save_file(named, tmp_path / "f.safetensors", metadata={"format": "pt", "site": "mid"})
    expected = {layer: vector.bfloat16() for layer, vector in given.items()}
    assert_same(
        load_directions(tmp_path / "f.safetensors"),
        Directions(expected, Origin(source="f.safetensors")),
    )


# --- what is not written


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path: Path) -> None:
    given = Directions(vectors(0, 3))
    path = tmp_path / "d.safetensors"
    path.write_text("precious")
    with pytest.raises(OutputError, match="--overwrite"):
        save_directions(given, path)
    with pytest.raises(DirectionsError, match=r"d\.gguf: llama.cpp cannot steer .* block 0"):
        save_directions(given, tmp_path / "d.gguf")
    with pytest.raises(DirectionsError, match=r"d\.npy: directions are written to \.safetensors"):
        save_directions(given, tmp_path / "d.npy")
    assert path.read_text() == "precious"
    assert [one.name for one in tmp_path.iterdir()] == ["d.safetensors"]


# --- hostile files


def header(path: Path, entries: dict[str, Any], data: bytes) -> None:
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(*shape: int, dtype: str = "F32", size: int | None = None) -> dict[str, Any]:
    nbytes = 4 * int(np.prod(shape)) if size is None else size
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [0, nbytes]}


def ours(path: Path, **changes: str) -> None:
    """A file of bake's own with other metadata than its tensors call for."""
    metadata = {"format": "bake.directions", "version": "1", "width": "2", "layers": "1"}
    header(
        path,
        {"__metadata__": metadata | changes, "direction.1": entry(2)},
        struct.pack("<2f", 1, 2),
    )


class Evil:
    """Pickled, it would make a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return (Path.mkdir, (self.folder,))


class Hungry:
    """Pickled, it is a gigabyte of zeros from a few bytes."""

    def __reduce__(self) -> Any:
        return (bytearray, (1 << 30,))


def rezip(
    path: Path, change: Callable[[str, bytes], bytes], kind: int = zipfile.ZIP_STORED
) -> None:
    """Write torch's archive again with other members."""
    torch.save(torch.ones(6), path)
    with zipfile.ZipFile(path) as archive:
        members = {one: change(one, archive.read(one)) for one in archive.namelist()}
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def npy(path: Path, text: str, data: bytes = b"") -> None:
    encoded = text.encode()
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(encoded)) + encoded + data)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing there": (lambda p: None, "cannot be read: No such file"),
    "a folder": (lambda p: p.mkdir(), "is not a file"),
    "empty": (lambda p: p.write_bytes(b""), "by its first bytes"),
    "text": (lambda p: p.write_bytes(b"direction.1: 1 2 3\n"), "by its first bytes"),
    "a bare pickle": (lambda p: p.write_bytes(pickle.dumps(Evil(p.parent / "x"))), "bare pickle"),
    # safetensors
    "cut header": (lambda p: p.write_bytes(struct.pack("<Q", 99) + b"{}"), "truncated"),
    "huge header": (lambda p: p.write_bytes(b"\xff" * 8 + b"{}"), "truncated"),
    "no JSON": (lambda p: p.write_bytes(struct.pack("<Q", 2) + b"{{"), "unreadable"),
    "no tensors": (lambda p: header(p, {}, b""), "no direction"),
    "cut data": (lambda p: header(p, {"direction.1": entry(2)}, b"1234"), "truncated"),
    "a claim of a terabyte": (
        lambda p: header(p, {"direction.1": entry(1 << 38)}, b""),
        "truncated",
    ),
    "a name of weights": (lambda p: save_file({"w": torch.ones(2)}, p), "'w' is no name"),
    "a name with a line break": (
        lambda p: header(p, {"a\nb": entry(2, dtype="X")}, bytes(8)),
        r"'a\\nb': malformed name",
    ),
    "two names of a layer": (
        lambda p: save_file({"direction.1": torch.ones(2), "1": torch.ones(2)}, p),
        "'1' is no name",
    ),
    "a stack": (
        lambda p: save_file({"direction.1": torch.ones(1, 2, 2)}, p),
        "expected one vector",
    ),
    "no basis": (lambda p: save_file({"direction.1": torch.eye(2)[[0, 1, 0]]}, p), "with k up to"),
    "one vector twice": (
        lambda p: save_file({"direction.1": torch.ones(2, 2)}, p),
        "lies in the span of the others",
    ),
    "integers": (
        lambda p: save_file({"direction.1": torch.ones(2, dtype=torch.int32)}, p),
        "of type I32",
    ),
    "not finite": (
        lambda p: save_file({"direction.1": torch.tensor([1, torch.nan])}, p),
        "direction.1 is not finite",
    ),
    "two widths": (
        lambda p: save_file({"direction.1": torch.ones(2), "direction.2": torch.ones(3)}, p),
        "width 3",
    ),
    "metadata of numbers": (
        lambda p: header(p, {"__metadata__": {"site": 3}, "direction.1": entry(1)}, bytes(4)),
        "__metadata__",
    ),
    "another version": (lambda p: ours(p, version="2"), "version is '2'.* upgrade bake"),
    "another width": (lambda p: ours(p, width="3"), "width is '3', its tensors say '2'"),
    "other layers": (lambda p: ours(p, layers="1,2"), "layers is '1,2', its tensors say '1'"),
    "another site": (lambda p: ours(p, site="pre"), "not at 'pre'"),
    # GGUF
    "a cut GGUF": (lambda p: p.write_bytes(b"GGUF\x03\x00"), "the version needs 4 bytes"),
    "a model": (
        lambda p: write_gguf(p, {"direction.1": np.ones(3, np.float32)}, "llama"),
        "'llama', not 'controlvector'",
    ),
    "a direction of block 0": (
        lambda p: write_gguf(p, {"direction.0": np.ones(3, np.float32)}),
        "'direction.0': llama.cpp refuses",
    ),
    "a GGUF of weights": (
        lambda p: write_gguf(p, {"blk.1.w": np.ones(3, np.float32)}),
        "'blk.1.w' is no name",
    ),
    "a GGUF of integers": (
        lambda p: write_gguf(p, {"direction.1": np.ones(3, np.int32)}),
        "of type I32",
    ),
    "a GGUF of matrices": (
        lambda p: write_gguf(p, {"direction.1": np.ones((3, 2), np.float32)}),
        "expected one vector",
    ),
    "a GGUF of nothing": (lambda p: write_gguf(p, {}), "no direction"),
    "a GGUF of zeros": (
        lambda p: write_gguf(p, {"direction.1": np.zeros(3, np.float32)}),
        "direction.1 is all zeros",
    ),
    # numpy
    "numpy objects": (
        lambda p: p.write_bytes(b"") or _save_array(p, np.array([{}, 1], dtype=object)),
        "never unpickles",
    ),
    "numpy integers": (lambda p: _save_array(p, np.ones(3, int)), "of type 'int64'"),
    "numpy in three dimensions": (
        lambda p: _save_array(p, np.ones((2, 2, 2))),
        r"shape \[2, 2, 2\]; expected",
    ),
    "a numpy scalar": (lambda p: _save_array(p, np.float32(3)), r"shape \[\]; expected"),
    "numpy zeros": (lambda p: _save_array(p, np.zeros((4, 3))), "no direction"),
    "numpy NaN": (lambda p: _save_array(p, np.full((4, 3), np.nan)), "direction.0 is not finite"),
    "a bare NaN": (lambda p: _save_array(p, np.full(3, np.nan)), "the vector is not finite"),
    "a bare zero": (lambda p: _save_array(p, np.zeros(3)), "the vector is all zeros"),
    "numpy beyond float32": (lambda p: _save_array(p, np.full((1, 3), 1e300)), "not finite"),
    "a cut array": (
        lambda p: _save_array(p, np.ones(30)) or p.write_bytes(p.read_bytes()[:-1]),
        "holds 239 bytes where its header says 240",
    ),
    "a cut numpy header": (lambda p: p.write_bytes(b"\x93NUMPY\x01\x00\xff"), "header is damaged"),
    "numpy of another version": (lambda p: p.write_bytes(b"\x93NUMPY\x09\x00\xff"), "version"),
    "a numpy terabyte": (
        lambda p: npy(p, "{'descr': '<f4', 'fortran_order': False, 'shape': (1 << 38,)}"),
        "header is damaged",
    ),
    "a numpy gigabyte": (
        lambda p: npy(p, "{'descr': '<f4', 'fortran_order': False, 'shape': (999, 131072)}"),
        "holds 0 bytes",
    ),
    "a negative shape": (
        lambda p: npy(p, "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}"),
        r"shape \[-1\]; expected",
    ),
    "a nested numpy header": (lambda p: npy(p, "(" * 5000), "header is damaged"),
    "structured numpy": (lambda p: _save_array(p, np.ones(3, [("a", "f4")])), "of type"),
    # torch
    "a zip": (lambda p: _zip(p, {"a": b"1"}), "torch.save did not write"),
    "a cut zip": (lambda p: p.write_bytes(b"PK\x03\x04 and so on"), "zip or pickle is damaged"),
    "a pickle of code": (lambda p: torch.save(Evil(p.parent / "x"), p), "which no tensor needs"),
    "a pickle of memory": (
        lambda p: torch.save([Hungry()], p),
        "'builtins bytearray'|'__builtin__",
    ),
    "a damaged pickle": (
        lambda p: rezip(p, lambda name, data: b"garbage" if name.endswith("pkl") else data),
        "zip or pickle is damaged",
    ),
    "a cut pickle": (
        lambda p: rezip(p, lambda name, data: b"\x80\x02." if name.endswith("pkl") else data),
        "torch cannot load it",
    ),
    "a cut storage": (
        lambda p: rezip(p, lambda name, data: data[:8] if name.endswith("data/0") else data),
        "torch cannot load it",
    ),
    "a zip bomb": (
        lambda p: rezip(p, lambda _, data: data, zipfile.ZIP_DEFLATED),
        "would grow",
    ),
    "an expanded tensor": (
        lambda p: torch.save(torch.ones(1).expand(999, 1 << 30), p),
        r"shape \[999, 1073741824\]; expected",
    ),
    "a sparse tensor": (
        lambda p: torch.save(torch.eye(3).to_sparse(), p),
        "which no tensor needs",
    ),
    "torch integers": (lambda p: torch.save(torch.ones(3, dtype=torch.int64), p), "LongStorage"),
    "a list of tensors": (lambda p: torch.save([torch.ones(3)], p), "holds a list"),
    "a dictionary of lists": (lambda p: torch.save({1: [1.0]}, p), "1 is a list"),
    "a dictionary of matrices": (
        lambda p: torch.save({1: torch.ones(2, 2)}, p),
        "1 has shape",
    ),
    "an empty dictionary": (lambda p: torch.save({}, p), "no direction"),
    "one layer under two keys": (
        lambda p: torch.save({1: torch.ones(2), "1": torch.ones(2)}, p),
        "layer 1 is there twice",
    ),
    "a layer of truth": (lambda p: torch.save({True: torch.ones(2)}, p), "no name of a direction"),
    "a layer of many digits": (
        lambda p: torch.save({10**5000: torch.ones(2)}, p),
        "torch cannot load it",
    ),
}


def _save_array(path: Path, array: Any) -> None:
    with path.open("wb") as stream:
        np.save(stream, array, allow_pickle=True)


def _zip(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_one_line_that_names_it(tmp_path: Path, case: str) -> None:
    write, words = HOSTILE[case]
    path = tmp_path / "given"
    write(path)
    with pytest.raises(InputError, match=words) as caught:
        read_directions(path)
    message = str(caught.value)
    assert isinstance(caught.value, DirectionsError | GGUFError)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 400
    # Nothing in it ran.
    assert not (tmp_path / "x").exists()


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """Every beginning of a good file of every format, and none of them by a traceback."""
    # Of a multiple of 32 bytes each, so that a GGUF ends without padding.
    given = Directions(vectors(1, 2, width=8), ORIGIN)
    for name in ("d.safetensors", "d.gguf"):
        save_directions(given, tmp_path / name)
    np.save(tmp_path / "d.npy", np.ones((2, 6), np.float32))
    torch.save({1: torch.ones(6)}, tmp_path / "d.pt")
    for whole in sorted(tmp_path.iterdir()):
        content, path = whole.read_bytes(), tmp_path / "cut"
        for length in range(0, len(content), 7):
            path.write_bytes(content[:length])
            with pytest.raises(InputError):
                load_directions(path)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(["safetensors", "gguf", "npy", "pt"]), st.data())
def test_flipped_bytes_are_directions_or_an_error(
    tmp_path: Path, kind: str, data: st.DataObject
) -> None:
    source = tmp_path / f"good.{kind}"
    if not source.exists():
        if kind == "npy":
            np.save(source, np.ones((2, 6), np.float32))
        elif kind == "pt":
            torch.save({1: torch.ones(6)}, source)
        else:
            save_directions(Directions(vectors(1, 2), ORIGIN), source)
    content = bytearray(source.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    (tmp_path / "flipped").write_bytes(content)
    try:
        found = load_directions(tmp_path / "flipped", layer=1)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert all(torch.isfinite(vector).all() for vector in found.vectors.values())


def test_metadata_does_not_reach_a_terminal_as_it_is(tmp_path: Path) -> None:
    ours(tmp_path / "d", source="\x1b[2J\nlayer 1", model="m")
    found = load_directions(tmp_path / "d")
    assert "\x1b" not in found.table()
    assert r"'\x1b[2J\nlayer 1'" in found.table()
