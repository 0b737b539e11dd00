"""Tensors by blocks of rows: what one block would give, whatever the threads."""

import ctypes
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bake import blocks
from bake.blocks import matrices, opened, source_of, workers
from bake.checkpoint import Checkpoint
from bake.edits import (
    AddVector,
    CreatedTensor,
    Edit,
    LowRank,
    RemoveKeepingNorms,
    RemoveSubspace,
    apply_all,
    worst,
)
from bake.ops.ablate import orthonormal
from bake.stream import write_checkpoint
from bake.verify import check_files


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cut(axis: int, width: int, kind: type = RemoveSubspace) -> Edit:
    found: Edit = kind("w", orthonormal(drawn(1, 2, width)), 0.7, axis)
    return found


LOW_RANK = LowRank("w", drawn(1, 40, 2), drawn(2, 2, 24))
CASES: dict[str, tuple[tuple[int, ...], Sequence[Edit]]] = {
    "a bias": ((24,), [AddVector("w", drawn(1, 24))]),
    "a vector on every row": ((40, 24), [AddVector("w", drawn(1, 24))]),
    "of low rank": ((40, 24), [LOW_RANK]),
    "a cut bias": ((24,), [cut(-1, 24)]),
    "a cut": ((40, 24), [cut(-2, 40)]),
    "a cut of rows": ((40, 24), [cut(-1, 24)]),
    "a cut of experts": ((3, 40, 24), [cut(-2, 40)]),
    "a cut of experts' rows": ((3, 40, 24), [cut(-1, 24)]),
    "norms": ((40, 24), [cut(-2, 40, RemoveKeepingNorms)]),
    "norms of rows": ((40, 24), [cut(-1, 24, RemoveKeepingNorms)]),
    "norms of experts": ((3, 40, 24), [cut(-2, 40, RemoveKeepingNorms)]),
    "a cut of what is added": ((40, 24), [LOW_RANK, cut(-2, 40)]),
    "norms of what is cut": ((40, 24), [cut(-2, 40), LOW_RANK, cut(-2, 40, RemoveKeepingNorms)]),
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, the last of them shorter."""
    monkeypatch.setattr(blocks, "BLOCK", 7 * 24)


def write(folder: Path, **tensors: Tensor) -> Checkpoint:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return Checkpoint.open(folder)


@pytest.mark.parametrize("case", CASES)
def test_blocks_give_what_the_whole_gives(tmp_path: Path, case: str) -> None:
    shape, edits = CASES[case]
    weight = drawn(3, *shape)
    base = write(tmp_path / "base", before=drawn(4, 5), w=weight, zbehind=drawn(5, 5))
    (tmp_path / "out").mkdir()
    write_checkpoint(base, {"w": edits}, (), {}, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(found["w"], apply_all(edits, weight))
    assert torch.equal(found["before"], drawn(4, 5))
    assert torch.equal(found["zbehind"], drawn(5, 5))
    residuals = check_files(base, Checkpoint.open(tmp_path / "out"), {"w": edits}, ())
    assert residuals["w"] < 1e-5


@pytest.mark.parametrize("case", [case for case in CASES if len(CASES[case][1]) == 1])
def test_a_residual_is_the_same_in_parts(tmp_path: Path, case: str) -> None:
    shape, (edit,) = CASES[case]
    before = drawn(3, *shape)
    wrong = edit.apply(before) + 0.1 * drawn(4, *shape)
    base = write(tmp_path / "base", w=before, x=wrong)
    errors = torch.zeros(1, 2)
    with workers() as pool, opened(base.shards[0].file) as file:
        sources = [source_of(base.find(name), file) for name in ("w", "x")]
        for pair in matrices(pool, shape, sources):
            errors = errors + edit.errors(pair)
    assert worst(errors) == pytest.approx(edit.residual(before, wrong), rel=1e-4)
    assert worst(errors) > 0.01


@pytest.mark.parametrize(
    "created",
    [
        CreatedTensor("x", (40, 24), "F32", "w", 0.5),
        CreatedTensor("x", (60, 24), "F32", "w", 0.0, ((0, 2.0), (24, -1.0))),
        CreatedTensor("x", (50, 24), "BF16", "w", 1.0, ((5, 2.0), (40, -1.0))),
        CreatedTensor("x", (3, 9, 24), "F16", "w", 0.25),
        CreatedTensor("x", (24,), "F32", "w", 3.0),
    ],
    ids=str,
)
def test_new_tensors_are_filled_by_blocks(tmp_path: Path, created: CreatedTensor) -> None:
    base = write(tmp_path / "base", w=drawn(1, 3))
    (tmp_path / "out").mkdir()
    write_checkpoint(base, {}, [created], {}, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")["x"]
    assert torch.equal(found.float(), created.filled())
    for row, number in created.diagonals:
        for column in range(min(24, len(found) - row)):
            assert found[row + column, column] == number


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_bytes_are_the_same_for_any_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    """Sums over rows that MKL would share between its threads, in float32, where it shows."""
    monkeypatch.setattr(blocks, "BLOCK", 1 << 19)
    basis = orthonormal(drawn(1, 2, 1500))
    edits: dict[str, list[Edit]] = {
        "w": [RemoveSubspace("w", basis)],
        "x": [LowRank("x", drawn(2, 1500, 3), drawn(3, 3, 900)), RemoveKeepingNorms("x", basis)],
    }
    base = write(tmp_path / "base", w=drawn(4, 1500, 900), x=drawn(5, 1500, 900))
    found, figures = [], []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        output = tmp_path / str(count)
        output.mkdir()
        write_checkpoint(base, edits, (), {}, output)
        figures.append(check_files(base, Checkpoint.open(output), edits, ()))
        assert torch.get_num_threads() == count
        found.append((output / "model.safetensors").read_bytes())
        with workers() as pool:
            # Whatever one thread begins, no other thread has a part in.
            assert set(pool.each(lambda _: torch.get_num_threads(), range(9))) == {1}
    assert found[0] == found[1] == found[2]
    assert figures[0] == figures[1] == figures[2]


def test_float32_is_not_rounded_to_less() -> None:
    """To TF32 on a GPU, or bfloat16 on some processors, where somebody has allowed that."""
    torch.set_float32_matmul_precision("medium")
    try:
        with workers():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


# Of glibc's `struct mallinfo2`: what lies in heaps, and in maps of its own.
FREED = """
import ctypes
from bake.blocks import workers

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.mallinfo2.restype = Info
with workers():
    before = libc.mallinfo2()
    block = libc.malloc(ctypes.c_size_t(1 << 24))
    taken = libc.mallinfo2()
    libc.free(block)
    freed = libc.mallinfo2()
assert taken.hblkhd == before.hblkhd, "mapped"
assert taken.arena >= 1 << 24, "not measured"
assert freed.arena == taken.arena, "given back"
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc's alone")
def test_what_is_freed_stays() -> None:
    """A block of 16 MiB is neither mapped by itself nor given back to the system."""
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
