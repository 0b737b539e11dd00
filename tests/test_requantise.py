"""What an edited matrix is written in: auto, same, a named type, and what survives in each."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter

from bake.edits import Edit, LowRank, RemoveSubspace
from bake.errors import GGUFError, VerificationError
from bake.export.gguf import PatchedTensor, patch
from bake.export.lattice import Feedback, find_lattice, rounded
from bake.export.requantise import LEAST_SHARE, MOST_NOISE, MOST_NOISE_SAME, fitting, ways
from bake.ggml import WRITABLE, dequantised, needs_importance, quantised
from bake.gguf_file import GGUFFile, GGUFTensor

KINDS = {kind.name: kind for kind in WRITABLE}
SCALAR = (
    *("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS"),
    *("MXFP4", "NVFP4", "Q3_K", "Q2_K", "TQ2_0"),
)
ROWS, COLUMNS = 384, 512
NAME = "blk.0.ffn_down.weight"


def weight(rows: int = ROWS, columns: int = COLUMNS) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def gram(columns: int = COLUMNS) -> torch.Tensor:
    """The second moment of inputs some of whose directions are far more common than others."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    samples = torch.randn(4096, columns, generator=generator)
    samples = samples * torch.logspace(1, -1, columns) @ mixing
    return samples.T @ samples / len(samples)


def small_edit(relative: float, rows: int = ROWS, columns: int = COLUMNS) -> LowRank:
    generator = torch.Generator().manual_seed(2)
    left = torch.randn(rows, 1, generator=generator)
    right = torch.randn(1, columns, generator=generator)
    size = relative * float(weight(rows, columns).norm() / (left.norm() * right.norm()))
    return LowRank(NAME, size * left, right)


def stored(path: Path, kind: GGMLQuantizationType, values: torch.Tensor) -> GGUFFile:
    writer = GGUFWriter(path, "llama")
    writer.add_tensor(NAME, quantised(values.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile.open(path)


def one_patch(
    folder: Path, base: str, edit: Edit, asked: str, inputs: torch.Tensor | None = None
) -> PatchedTensor:
    file = stored(folder / f"{base}.gguf", KINDS[base], weight())
    (report,) = patch(
        *(file, {NAME: [edit]}, folder / f"{asked}.out.gguf"),
        edited_type=KINDS.get(asked, asked),
        inputs={} if inputs is None else {NAME: inputs},
    )
    return report


@pytest.mark.parametrize("name", KINDS)
def test_which_types_have_a_lattice(name: str) -> None:
    assert (find_lattice(KINDS[name]) is not None) == (name in SCALAR)


@pytest.mark.parametrize("name", SCALAR)
def test_codes_are_taken_out_and_put_back(name: str) -> None:
    kind, random = KINDS[name], np.random.default_rng(0)
    lattice = find_lattice(kind)
    assert lattice is not None
    bytes_of = quantised(weight().numpy(), kind)
    codes = lattice.codes(bytes_of)
    assert codes.shape == (ROWS, COLUMNS)
    assert np.array_equal(lattice.with_codes(bytes_of, codes), bytes_of)
    others = random.choice(lattice.ranked, codes.shape)
    changed = lattice.with_codes(bytes_of, others)
    assert np.array_equal(lattice.codes(changed), others)
    low, high = (
        dequantised(lattice.with_codes(bytes_of, np.full_like(codes, end)), kind)
        for end in lattice.ranked[[0, -1]]
    )
    places = np.argsort(lattice.ranked)[np.searchsorted(np.sort(lattice.ranked), others)]
    wanted = low + (high - low) * lattice.levels.numpy()[places]
    np.testing.assert_allclose(dequantised(changed, kind), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SCALAR)
def test_without_an_edit_nothing_is_rounded(name: str) -> None:
    kind = KINDS[name]
    bytes_of = quantised(weight().numpy(), kind)
    values = torch.from_numpy(dequantised(bytes_of, kind))
    for feedback in (None, Feedback.of(gram())):
        found = rounded(bytes_of, kind, values, feedback)
        assert np.array_equal(dequantised(found, kind), values.numpy())


@pytest.mark.parametrize(
    ("name", "relative"), [("Q8_0", 0.02), ("Q6_K", 0.05), ("Q4_1", 0.1), ("IQ4_NL", 0.1)]
)
def test_feedback_serves_the_inputs(name: str, relative: float) -> None:
    kind, moment = KINDS[name], gram()
    bytes_of = quantised(weight().numpy(), kind)
    wanted = small_edit(relative).apply(torch.from_numpy(dequantised(bytes_of, kind)))

    def lost(found: np.ndarray) -> float:
        error = torch.from_numpy(dequantised(found, kind)) - wanted
        return float(((error @ moment) * error).sum())

    back = lost(rounded(bytes_of, kind, wanted, Feedback.of(moment)))
    assert back < 0.4 * lost(rounded(bytes_of, kind, wanted, None))
    assert back < 0.4 * lost(quantised(wanted.numpy(), kind))


@pytest.mark.parametrize(
    ("base", "relative", "inputs"),
    [
        ("Q8_0", 0.005, False),
        ("Q8_0", 0.1, False),
        ("Q8_0", 0.1, True),
        ("Q4_K", 0.02, True),
        ("Q4_K", 0.1, False),
        ("Q4_K", 1.5, False),
        ("IQ3_S", 0.02, False),
        ("MXFP4", 0.2, False),
        ("BF16", 1e-3, False),
        ("F16", 0.1, False),
    ],
)
def test_auto_is_the_smallest_that_keeps_the_edit(
    tmp_path: Path, base: str, relative: float, inputs: bool
) -> None:
    edit, moment = small_edit(relative), gram() if inputs else None
    report = one_patch(tmp_path, base, edit, "auto", moment)
    assert report.surviving_share >= LEAST_SHARE
    assert report.noise <= MOST_NOISE
    assert report.by_inputs == inputs
    tensor = GGUFFile.open(tmp_path / f"{base}.gguf").tensors[NAME]
    smaller = []
    for way in ways(tensor, "auto", inputs):
        if (way.kind, way.feedback) == (report.written_type, report.feedback):
            break
        smaller.append(way.kind.name)
        if not way.feedback:
            one = one_patch(tmp_path, base, edit, way.kind.name, moment)
            (tmp_path / f"{way.kind.name}.out.gguf").unlink()
            assert way.kind.name in ("F16", "BF16") or not (
                one.surviving_share >= LEAST_SHARE and one.noise <= MOST_NOISE
            )
    assert smaller or (base, relative) in (("F16", 0.1), ("Q8_0", 0.1))


def test_the_report_is_of_the_bytes_written(tmp_path: Path) -> None:
    edit, moment = small_edit(0.02), gram()
    report = one_patch(tmp_path, "Q4_K", edit, "Q8_0", moment)
    base = GGUFFile.open(tmp_path / "Q4_K.gguf").read(NAME)
    found = GGUFFile.open(tmp_path / "Q8_0.out.gguf").read(NAME) - base
    wanted = edit.left @ edit.right
    power = float(((wanted @ moment) * wanted).sum())
    assert report.surviving_share == pytest.approx(
        float(((found @ moment) * wanted).sum()) / power, abs=1e-4
    )
    error = found - wanted
    noise = (float(((error @ moment) * error).sum()) / power) ** 0.5
    assert report.noise == pytest.approx(noise, rel=1e-3)
    assert report.residual == pytest.approx(float(error.norm() / wanted.norm()), rel=1e-3)


def test_same_keeps_the_type_or_is_refused(tmp_path: Path) -> None:
    for number, (base, relative) in enumerate((("Q8_0", 0.02), ("Q6_K", 0.1))):
        folder = tmp_path / str(number)
        folder.mkdir()
        report = one_patch(folder, base, small_edit(relative), "same", gram())
        assert report.written_type is KINDS[base]
        assert report.feedback
        assert 0.9 < report.surviving_share < 1.1
        assert report.noise <= MOST_NOISE_SAME
    with pytest.raises(VerificationError, match=r"survives in Q4_1.*edited_type to auto"):
        one_patch(tmp_path, "Q4_1", small_edit(0.005), "same", gram())


def test_types_in_which_weights_share_codes_cannot_stay_the_same(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match="of type IQ3_S, in which several weights share a code"):
        one_patch(tmp_path, "IQ3_S", small_edit(0.1), "same")


@pytest.mark.parametrize(
    "name", ["Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_XS", "IQ3_S", "MXFP4"]
)
def test_a_named_type_is_obeyed(tmp_path: Path, name: str) -> None:
    report = one_patch(tmp_path, "Q8_0", RemoveSubspace(NAME, torch.eye(ROWS)[:, :1]), name)
    assert report.written_type is KINDS[name]
    assert report.noise > MOST_NOISE


def test_types_with_an_importance_matrix_are_refused(tmp_path: Path) -> None:
    for name in (name for name, kind in KINDS.items() if needs_importance(kind)):
        with pytest.raises(GGUFError, match=f"{name}, which needs an importance matrix"):
            one_patch(tmp_path, "Q8_0", small_edit(0.1), name)


def test_an_edit_that_a_block_cannot_hold_goes_to_a_wider_type(tmp_path: Path) -> None:
    # 1e5 is beyond the scales of all quantised types, and beyond F16.
    huge = LowRank(NAME, torch.full((ROWS, 1), 3e8), torch.ones(1, COLUMNS))
    report = one_patch(tmp_path, "Q8_0", huge, "auto")
    assert report.written_type.name in ("BF16", "F32")
    with pytest.raises(GGUFError, match="not finite as F16"):
        one_patch(tmp_path, "Q8_0", huge, "F16")


def test_what_stands_in_for_rows_that_do_not_divide() -> None:
    found = {name: fitting(kind, 576).name for name, kind in KINDS.items() if name in SCALAR}
    assert found == {
        "Q8_0": "Q8_0",
        "Q6_K": "Q8_0",
        "Q5_K": "Q5_1",
        "Q5_1": "Q5_1",
        "Q5_0": "Q5_0",
        "Q4_K": "Q5_0",
        "Q4_1": "Q4_1",
        "Q4_0": "Q4_0",
        "IQ4_NL": "IQ4_NL",
        "IQ4_XS": "IQ4_NL",
        "MXFP4": "MXFP4",
        "NVFP4": "NVFP4",
        "Q3_K": "Q4_0",
        "Q2_K": "Q4_0",
        "TQ2_0": "Q4_0",
    }
    assert all(fitting(kind, 33).name in ("F16", "F32", "BF16") for kind in WRITABLE)


def test_vectors_and_floating_matrices_keep_their_type() -> None:
    vector = GGUFTensor("a.bias", KINDS["F32"], (32,), 0, 128)
    matrix = GGUFTensor("a.weight", KINDS["F16"], (4, 32), 0, 256)
    for asked in ("auto", "same", KINDS["Q8_0"]):
        assert [way.kind.name for way in ways(vector, asked)] == ["F32"]
        kinds = [way.kind.name for way in ways(matrix, asked)]
        assert kinds == (["F16", "BF16", "F32"] if asked == "auto" else ["F16"])
