"""A whole bake in several processes: the bytes of one, whichever is killed."""

import json
from pathlib import Path

import pytest

from bake.demo import Demo
from tests.chat_server import Script
from tests.launched import launch
from tests.test_fit_run import ROLES, judge, write_sets  # noqa: F401
from tests.through_disk import opened
from tests.tiny import write_tiny
from tests.tiny_gguf import write_tiny_gguf

RECIPE = """\
model: model
prompts: {target: target.txt, protected: protected.txt, lookalike: null, general: general.txt}
edits:
  - {op: gate, layers: 1-2, strength: -0.5}
  - {op: ablate, layers: 0-2, strength: 0.5}
fit: {prompts_per_class: 24}
judge: {kind: chat, model: any, url: "http://nowhere/v1"}
verify: {prompts: 8}
evaluate: {answer_tokens: 3, limit: 9, batch: 4}
guard: {protected_drop: 100, lookalike_rise: 100, general_rise: 100, runtime_gap: 100}
export: {gguf: {base: base.gguf}}
runtimes: [transformers, llama.cpp]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in several shards, its GGUF, and sets of prompts."""
    folder: Path = tmp_path_factory.mktemp("place")
    write_tiny("llama", folder / "model", shard="20KB")
    base, arch, _ = opened(folder / "model")
    write_tiny_gguf(base, arch, folder / "base.gguf")
    write_sets(folder)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def baked(judge: Script, name: str, processes: int, dies: str = "") -> tuple[int, str, str]:  # noqa: F811
    """A bake into `out`, which is then called by its name, with a cache of its own."""
    options = ("--recipe", "recipe.yaml", "--output", "out", "--set", f"judge.url={judge.url}")
    cache = str(Path("cache", name).absolute())
    found = launch(processes, *options, dies=dies, BAKE_CACHE=cache, OMP_NUM_THREADS="1")
    if found[0] == 0:
        Path("out").rename(name)
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_processes_give_the_bytes_of_one(judge: Script) -> None:  # noqa: F811
    """Unbroken, and after the second was killed while it measured, and while it wrote."""
    code, out, err = baked(judge, "one", 1)
    assert code == 0, err
    whole = contents(Path("one"))
    assert len([name for name in whole if name.endswith(".safetensors")]) > 4
    assert len([name for name in whole if name.endswith(".gguf")]) == 1
    code, out, err = baked(judge, "four", 4)
    assert code == 0, err
    assert out.count("written: out") == 1
    assert err.count("fit ...") == 1
    assert contents(Path("four")) == whole
    for dies in ("kill", "write"):
        code, out, err = baked(judge, dies, 4, dies)
        assert code != 0
        assert "written" not in out
        assert not Path("out").exists()
        assert Path(".out.bake", "journal.1").exists() == (dies == "write")
        code, out, err = baked(judge, dies, 4)
        assert code == 0, err
        assert contents(Path(dies)) == whole
        assert not Path(".out.bake").exists()


@pytest.mark.slow
def test_an_error_of_one_process_is_said_once(judge: Script) -> None:  # noqa: F811
    Path("out").mkdir()
    code, _, err = baked(judge, "none", 2)
    Path("out").rmdir()
    assert code != 0
    assert err.count("bake: out: exists already") == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_evaluation_in_three_processes_is_that_of_one(
    judge: Script,  # noqa: F811
    demo: Demo,
) -> None:
    """Of a folder beside its base, in transformers, and of a GGUF, to the byte; one judges."""
    assert baked(judge, "folder", 1)[0] == 0
    phrases = ("--set", "judge={kind: keyword, phrases: [w1, w2, w3]}")
    what = {
        "checkpoint": ("folder", "--tokens", "12"),
        "gguf": (
            *("--model", str(demo.gguf), "--recipe", "recipe.yaml"),
            *("--limit", "24", "--tokens", "6"),
        ),
    }
    for name, arguments in what.items():
        said = []
        for processes in (1, 3):
            output = f"{name}.{processes}"
            options = ("eval", *arguments, *phrases, "--output", f"{output}.json")
            cache = str(Path("cache", output).absolute())
            code, out, err = launch(processes, *options, BAKE_CACHE=cache, OMP_NUM_THREADS="1")
            assert code == 0, err
            assert out.count("written: ") == 1
            said.append(out.partition("\nwritten: ")[0])
        assert said[0] == said[1]
        one, three = (Path(f"{name}.{processes}.json").read_bytes() for processes in (1, 3))
        assert one == three
        # More than the group of one process.
        assert len(json.loads(one)["answers"]) > 64
    code, _, err = launch(2, "eval", "folder", "--sets", "none")
    assert code != 0
    assert err.count("bake: --sets none: ") == 1
