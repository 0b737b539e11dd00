"""The main job on the real demo model, from recipe to folder, small enough to run every time."""

import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bake.checkpoint import Checkpoint
from bake.demo import Demo
from bake.directions import load_directions
from bake.errors import GuardError, VerificationError
from bake.evidence.shown import Beside
from bake.gguf_file import GGUFFile
from bake.html.files import report_to_file
from bake.llama import LlamaModel
from bake.manifest import differences, read_outputs
from bake.pipeline import bake
from bake.prompts import load_splits
from bake.recipe import LoadedRecipe, load_recipe
from bake.record import DIRECTIONS
from bake.runtimes.verify import verify_runtimes

SMALL = (
    "fit.prompts_per_class=24",
    "edits.0.layers=17-21",
    # Decided first tokens: so few prompts make a rough direction.
    "edits.0.strength=-4",
    # Passes of their own, which tests/test_ordered.py has on tiny models.
    "edits.0.ordered=false",
    "evaluate.limit=4",
    "evaluate.runtimes=[transformers, llama.cpp]",
    "evaluate.answer_tokens=12",
    "verify.prompts=4",
    "guard={protected_drop: 100, lookalike_rise: 100, general_rise: 100, runtime_gap: 100}",
)
FULL = ("export.adapters=[peft, gguf]", "export.gguf.edited_type=auto")
# Where answers are not looked at.
QUICK = ("evaluate.limit=1", "evaluate.answer_tokens=2", "verify.prompts=1")
API = Path(__file__).parent.parent / "docs" / "api.md"
ADD = "edits=[{op: add, layer: 17, strength: -1}]"


def small(output: Path, *overrides: str) -> LoadedRecipe:
    return load_recipe("political-open", overrides=(*SMALL, *overrides), output=str(output))


def added(baked: Path, output: Path, *overrides: str) -> LoadedRecipe:
    """An unconditional vector from the directions of another bake: nothing is fitted."""
    directions = f"directions={baked / DIRECTIONS}"
    return small(output, ADD, directions, *QUICK, *overrides)


def files(folder: Path) -> set[str]:
    """Every file of a folder, by its path inside."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", autouse=True)
def few_inputs() -> Iterator[None]:
    """What a rounding is weighed by needs no more of the prompts and texts here."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("bake.writing.SHOWN", 8)
        yield


@pytest.fixture(scope="module")
def baked(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield bake(small(tmp_path_factory.mktemp("baked") / "out", *FULL))


def test_the_documentations_python_runs(
    baked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/api.md, but for its first block, which is the bake itself."""
    blocks = re.findall(r"```python\n(.*?)```", API.read_text(), re.DOTALL)
    assert len(blocks) == 3
    (tmp_path / "opened").symlink_to(baked)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks[1:]:
        exec(block, names)
    answer, *norms = capsys.readouterr().out.splitlines()
    assert len(answer.split()) > 3
    assert [line.split()[0] for line in norms[-5:]] == ["17", "18", "19", "20", "21"]


def test_the_folder_has_everything_and_the_manifest_its_hashes(baked: Path) -> None:
    manifest = json.loads((baked / "bake.json").read_text())
    names = files(baked) - {"bake.json"}
    assert names == set(manifest["outputs"])
    assert names >= {
        "README.md",
        "Modelfile",
        "answers.jsonl",
        "config.json",
        "model.safetensors",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "params",
        "political-open.gguf",
        "political-open.lora.gguf",
        "report.html",
        "figures/readings-layer-19.svg",
        "figures/refusals-llama-cpp.svg",
        "steering/directions.safetensors",
        "steering/fit.safetensors",
        "tokenizer.json",
    }
    assert differences(baked, read_outputs(baked)) == []
    assert len(manifest["residuals"]) == len(manifest["gguf"]) == len(manifest["plan"]["edits"])
    for one in manifest["gguf"]:
        assert one["by_inputs"]
        assert one["surviving_share"] >= manifest["gguf_bounds"]["auto"]["surviving_share"]
        assert one["noise"] <= manifest["gguf_bounds"]["auto"]["noise"]
    parity = manifest["measured"]["parity"]
    for runtime in ("llama.cpp", "llama.cpp, the LoRA on the base GGUF"):
        assert parity[runtime]["lost_share"] < 0.1
    assert manifest["measured"]["parity"]["transformers"]["lost_share"] < 1e-4


def test_the_report_is_drawn_from_the_folder_alone(baked: Path, tmp_path: Path) -> None:
    report_to_file(baked, tmp_path / "report.html", Beside(), figures=tmp_path / "figures")
    assert (tmp_path / "report.html").read_bytes() == (baked / "report.html").read_bytes()
    assert files(tmp_path / "figures") == files(baked / "figures")
    measured = json.loads((baked / "bake.json").read_text())["measured"]
    assert measured["paired"].keys() == measured["refusals"]["after"].keys()
    low, high = measured["refusals"]["after"]["llama.cpp"]["target"]["interval"]
    assert 0 <= low < high <= 100
    fitted = json.loads((baked / "bake.json").read_text())["fit"]
    for by_role in fitted["readings"]["layers"].values():
        # All of the protected prompts, and of the target those that the base refused.
        assert sum(by_role["protected"]) == fitted["classes"]["protected"]["prompts"]
        assert sum(by_role["target"]) == fitted["classes"]["target"]["refused"]


def test_only_what_was_planned_differs_from_the_base(baked: Path, demo: Demo) -> None:
    planned = {
        edit["tensor"] for edit in json.loads((baked / "bake.json").read_text())["plan"]["edits"]
    }
    base, written = Checkpoint.open(demo.model), Checkpoint.open(baked)
    changed = {
        name for name in base.tensors if not torch.equal(base.read(name), written.read(name))
    }
    assert changed == planned
    old, new = GGUFFile.open(demo.gguf), GGUFFile.open(baked / "political-open.gguf")
    different = {name for name in old.tensors if not torch.equal(old.read(name), new.read(name))}
    assert different == {
        name.replace("model.layers", "blk")
        .replace("self_attn.o_proj", "attn_output")
        .replace("mlp.down_proj", "ffn_down")
        for name in planned
    }


def test_stock_classes_and_llama_cpp_begin_other_answers(baked: Path, demo: Demo) -> None:
    """The first answer token to held-out political questions, in both runtimes."""
    tokenizer = AutoTokenizer.from_pretrained(baked)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.text}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for prompt in load_splits("political").test[:8]
    ]
    first: list[list[int]] = []
    for folder in (demo.model, baked):
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        with torch.inference_mode():
            logits = [model(torch.tensor([ids])).logits[0, -1] for ids in prompts]
        first.append([int(one.argmax()) for one in logits])
    with LlamaModel(baked / "political-open.gguf", context=128, parallel=1, threads=2) as llama:
        quantised = [int(llama.logits(ids)[-1].argmax()) for ids in prompts]
    assert sum(a == b for a, b in zip(first[1], quantised, strict=True)) >= 7
    assert sum(a != b for a, b in zip(*first, strict=True)) >= 6


@pytest.mark.slow
def test_the_same_bake_gives_the_same_bytes(baked: Path, tmp_path: Path) -> None:
    again = bake(small(tmp_path / "again", *FULL))
    names = files(baked)
    assert names == files(again)
    for name in sorted(names):
        assert (baked / name).read_bytes() == (again / name).read_bytes(), name


@pytest.mark.slow
def test_the_baked_folder_serves_as_it_was_baked_in_every_runtime(baked: Path) -> None:
    runtimes = ["transformers", "llama.cpp", *(["mlx"] if find_spec("mlx_lm") else [])]
    found = verify_runtimes(baked, runtimes, server=True)
    assert len(found) == 4 * len(runtimes) + 1
    assert all(one.passed for one in found), "\n".join(map(str, found))


def test_a_broken_guard_publishes_its_evidence_alone(baked: Path, tmp_path: Path) -> None:
    shown: list[str] = []
    strong = ("evaluate.limit=2", "evaluate.answer_tokens=12", "edits.0.strength=-3")
    loaded = added(baked, tmp_path / "out", "guard.target_at_least=100", *strong)
    with pytest.raises(GuardError, match="target refusals are") as caught:
        bake(loaded, show=shown.append)
    assert caught.value.exit_code == 3
    assert "refused after" in shown[0]
    assert [one.name for one in tmp_path.iterdir()] == ["out.failed"]
    assert not [one for one in files(tmp_path) if one.endswith((".safetensors", ".gguf"))]
    assert differences(tmp_path / "out.failed", read_outputs(tmp_path / "out.failed")) == []


def test_lost_parity_publishes_nothing(baked: Path, tmp_path: Path) -> None:
    loaded = added(baked, tmp_path / "out", "verify.gguf_lost_share=1e-9")
    with pytest.raises(VerificationError, match=r"parity, llama\.cpp") as caught:
        bake(loaded)
    assert caught.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []


def test_an_added_vector_matches_llama_cpps_control_vector(baked: Path, tmp_path: Path) -> None:
    """`add` through the bias, in both formats; for the second the reference is llama.cpp's own."""
    folder = bake(added(baked, tmp_path / "out", "export.control_vector=true"))
    parity = json.loads((folder / "bake.json").read_text())["measured"]["parity"]
    assert parity["transformers"]["lost_share"] < 1e-4
    assert parity["llama.cpp, its own control vector"]["lost_share"] < 1e-2
    config = json.loads((folder / "config.json").read_text())
    assert config["mlp_bias"] is True
    gguf = GGUFFile.open(folder / "political-open.gguf")
    assert [name for name in gguf.tensors if name.endswith("bias")] == ["blk.17.ffn_down.bias"]
    beside = load_directions(folder / "political-open.vector.gguf")
    assert beside.layers == (17,)
    assert torch.equal(beside.vectors[17], gguf.read("blk.17.ffn_down.bias"))


def test_an_inserted_block_matches_llama_cpps_control_vector(
    baked: Path, demo: Demo, tmp_path: Path
) -> None:
    """`add` through one more block, in both formats, from a GGUF of four bits."""
    folder = bake(added(baked, tmp_path / "out", "edits.0.carrier=block"))
    manifest = json.loads((folder / "bake.json").read_text())
    parity = manifest["measured"]["parity"]
    assert parity["transformers"]["lost_share"] < 1e-4
    assert parity["llama.cpp, its own control vector"]["lost_share"] < 1e-2
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 31
    gguf, base = GGUFFile.open(folder / "political-open.gguf"), GGUFFile.open(demo.gguf)
    assert gguf.metadata["llama.block_count"] == 31
    assert gguf.tensors["blk.18.ffn_down.weight"].type.name == "F16"
    for name in ("ffn_down", "attn_q"):
        old, new = f"blk.18.{name}.weight", f"blk.19.{name}.weight"
        assert torch.equal(base.read(old), gguf.read(new))
    assert list(manifest["residuals"]) == ["model.layers.18.mlp.down_proj.weight"]
    assert manifest["plan"]["inserted"] == [18]
