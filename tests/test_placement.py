"""A model that does not fit into memory runs from disk, and nothing else changes."""

import gc
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bake.archs import ARCHS
from bake.errors import CheckpointError
from bake.judge import Exchange, Verdict
from bake.model import LiveModel
from bake.placement import free_memory, placement
from tests.conftest import Run
from tests.through_disk import BATCH
from tests.tiny import write_tiny
from tests.word_fit import WORDS, ByWord

# Of a tiny llama's 97 KiB in float32 a part fits.
SOME = "64KiB"
RECIPE = """\
model: model
prompts: {target: target.txt, protected: protected.txt, lookalike: null, general: general.txt}
fit: {refused: protected}
edits:
  - {op: gate, layers: [1], strength: -1}
  - {op: ablate, layers: [2]}
evaluate: {runtimes: [transformers], answer_tokens: 4}
guard: {protected_drop: 100, general_rise: 100, target_at_most: null}
"""


@pytest.mark.parametrize("memory", [SOME, "1KiB"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "falcon_h1", "gemma3_text", "gpt2"])
def test_logits_and_answers_are_those_of_the_model_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, memory: str
) -> None:
    write_tiny(model_type, tmp_path)
    arch = ARCHS[model_type]
    whole = LiveModel.load(tmp_path, arch)
    monkeypatch.setenv("BAKE_MEMORY", memory)
    monkeypatch.setenv("BAKE_CACHE", str(tmp_path / "cache"))
    parted = LiveModel.load(tmp_path, arch)
    devices = {parameter.device.type for parameter in parted.model.parameters()}
    assert "meta" in devices
    assert torch.equal(parted.logits(BATCH), whole.logits(BATCH))
    prompts = [[5, 6, 7], [8, 9, 10, 11]]
    assert parted.answer(prompts, 4) == whole.answer(prompts, 4)
    assert len(list((tmp_path / "cache").glob("offload-*"))) == 1
    del parted
    gc.collect()
    assert not list((tmp_path / "cache").glob("offload-*"))


def test_half_precision_runs_in_float32_where_that_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny("llama", tmp_path)
    live = LiveModel.load(tmp_path, ARCHS["llama"])
    live.model.to(torch.float16).save_pretrained(tmp_path)
    monkeypatch.setattr("bake.model._fast", lambda dtype: dtype == torch.float32)
    whole = LiveModel.load(tmp_path, ARCHS["llama"])
    monkeypatch.setenv("BAKE_MEMORY", "1KiB")
    monkeypatch.setenv("BAKE_CACHE", str(tmp_path / "cache"))
    parted = LiveModel.load(tmp_path, ARCHS["llama"])
    assert parted.logits(BATCH).dtype == whole.model.dtype == torch.float32
    assert torch.equal(parted.logits(BATCH), whole.logits(BATCH))


def test_a_bake_beyond_memory_gives_the_same_bytes(
    bake: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels, statistics, hooks, parity and answers, all of a model that lies on disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bake.fit.run.MINIMUM", 0)
    write_tiny("llama", Path("model"))
    for role in ("target", "protected", "general"):
        lines = [f"{WORDS[role]} w{n} w{n + 7}" for n in range(20, 50)]
        Path(f"{role}.txt").write_text("\n".join(lines))
    Path("recipe.yaml").write_text(RECIPE)
    monkeypatch.setattr("bake.judge.keyword.KeywordJudge.judge", by_first_word)
    code, _, err = bake("--recipe", "recipe.yaml", "--output", "whole")
    assert code == 0, err
    assert "BAKE_MEMORY" not in err
    monkeypatch.setenv("BAKE_MEMORY", SOME)
    code, _, err = bake("--recipe", "recipe.yaml", "--output", "parted")
    assert code == 0, err
    assert "the weights take 0.0 GiB" in err
    for name in ("model.safetensors", "answers.jsonl", "steering/directions.safetensors"):
        assert Path("parted", name).read_bytes() == Path("whole", name).read_bytes()


def by_first_word(_: object, exchanges: Sequence[Exchange]) -> list[Verdict]:
    return ByWord(frozenset({WORDS["target"], WORDS["protected"]})).judge(exchanges)


def test_what_transformers_refuses_in_memory_is_refused_from_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves no folder behind."""
    write_tiny("llama", tmp_path)
    config = tmp_path / "config.json"
    monkeypatch.setenv("BAKE_MEMORY", "1KiB")
    monkeypatch.setenv("BAKE_CACHE", str(tmp_path / "cache"))
    whole = config.read_text()
    config.write_text(whole.replace('"vocab_size": 96', '"vocab_size": 50'))
    with pytest.raises(CheckpointError, match=r"has shape \[96, 32\], and config.json means \[50"):
        LiveModel.load(tmp_path, ARCHS["llama"])
    config.write_text(whole)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        LiveModel.load(tmp_path, ARCHS["llama"])
    gc.collect()
    assert not list((tmp_path / "cache").iterdir())


def test_what_fits_is_loaded_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny("llama", tmp_path)
    assert free_memory() > 1 << 20
    assert placement(tmp_path, torch.float32) == {}
    monkeypatch.setenv("BAKE_MEMORY", "1MiB")
    assert free_memory() == 1 << 20
    assert placement(tmp_path, torch.float32) == {}
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("BAKE_MEMORY", "much")
    with pytest.raises(CheckpointError, match=r"BAKE_MEMORY: 'much' is no size.*24GiB"):
        LiveModel.load(tmp_path, ARCHS["llama"])
