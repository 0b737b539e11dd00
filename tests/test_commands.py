"""The command line: help, errors in one line each, their exit codes, and nothing left behind."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from bake.commands import main
from bake.recipe import shipped_recipes
from tests.tiny import write_tiny

RECIPE = """\
model: {model}
prompts:
  target: target.txt
  protected: protected.txt
  lookalike: null
  general: general.txt
edits:
  - op: gate
    layers: [1]
    strength: -1
evaluate:
  runtimes: [transformers]
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model, prompt files and a recipe, as current folder."""
    monkeypatch.chdir(tmp_path)
    write_tiny("llama", tmp_path / "model")
    for number, role in enumerate(("target", "protected", "general")):
        lines = [f"w{10 * number + i} w{i + 40} w{number}" for i in range(9)]
        (tmp_path / f"{role}.txt").write_text("\n".join(lines))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model="model"))
    return tmp_path


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bake(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `bake` in this process; returns the exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bake", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        code = caught.value.code
        return (code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


def refused(run: Run, arguments: Sequence[str], code: int, *words: str) -> None:
    """Assert one line on stderr that holds `words`, the exit code, and no new file."""
    before = sorted(path.name for path in Path().iterdir())
    found, out, err = run(*arguments)
    progress = ("fit ...", "fit: done")
    messages = [line for line in err.splitlines() if not line.startswith(progress)]
    assert (found, len(messages), out) == (code, 1, ""), err
    for word in words:
        assert word in messages[0]
    assert sorted(path.name for path in Path().iterdir()) == before


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['bake', '--help']\n"
        "from bake.commands import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Exit codes" in done.stdout


def test_three_ways_in(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    for command in ([sys.executable, "-m", "bake"], [sys.executable, str(root / "cli.py")]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, cwd=root)
        assert done.stdout.startswith("bake, version "), done.stderr


def test_the_shipped_recipes_are_listed(bake: Run) -> None:
    code, out, _ = bake("recipes")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [
        "fewer-overrefusals.yaml",
        "political-open.yaml",
        "refuse-topic.yaml",
    ]


def test_usage_errors_exit_2(bake: Run) -> None:
    assert bake("plan")[0] == 2
    assert bake("--nonsense")[0] == 2
    assert bake("--recipe", "political-open", "recipes")[0] == 2


def test_a_plan_names_every_edit(bake: Run, place: Path) -> None:
    code, out, _ = bake("plan", "--recipe", "recipe.yaml", "--json")
    assert code == 0
    assert [edit["tensor"] for edit in json.loads(out)["edits"]] == [
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ]
    code, out, _ = bake("plan", "--recipe", "recipe.yaml", "--set", "edits.0.sites=[mlp]")
    assert code == 0
    assert "model.layers.1.mlp.down_proj.weight" in out
    assert "o_proj" not in out


def test_a_plan_of_an_added_bias_lists_what_it_creates(bake: Run, place: Path) -> None:
    override = "edits.0={op: add, layer: 1, strength: -1}"
    code, out, _ = bake("plan", "--recipe", "recipe.yaml", "--set", override, "--json")
    assert code == 0
    plan = json.loads(out)
    assert plan["config"] == {"mlp_bias": True}
    assert len(plan["created"]) == 9


def test_a_plan_reads_headers_only(bake: Run, place: Path) -> None:
    """140 GB of weights that are a hole in the disk: reading them would never end."""
    width, inner, blocks, words = 8192, 28672, 80, 128256
    shapes = {"model.embed_tokens": (words, width), "lm_head": (words, width)}
    for layer in range(blocks):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.self_attn.{name}_proj": (width, width) for name in "qkvo"}
        shapes |= {f"{block}.mlp.{name}_proj": (inner, width) for name in ("gate", "up")}
        shapes[f"{block}.mlp.down_proj"] = (width, inner)
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * shape[1]
        entry = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        header[f"{name}.weight"] = entry
        end += size
    text = json.dumps(header).encode()
    with (place / "model" / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    file = place / "model" / "config.json"
    sizes = {"hidden_size": width, "num_hidden_layers": blocks}
    file.write_text(json.dumps(json.loads(file.read_text()) | sizes))
    code, out, _ = bake("plan", "--recipe", "recipe.yaml", "--set", "edits.0.layers=40-43")
    assert code == 0
    assert "model.layers.43.mlp.down_proj.weight" in out
    assert end > 140e9


def test_three_mistakes_are_three_lines(bake: Run, place: Path) -> None:
    Path("wrong.yaml").write_text(
        "model: model\nedits:\n  - op: gate\n    layers: [1]\n    strenght: 2\n"
        "    strength: much\nfit:\n  ridge: -1\n"
    )
    code, _, err = bake("--recipe", "wrong.yaml")
    assert code == 1
    lines = err.splitlines()
    assert [line.split(" ")[0] for line in lines] == [
        "wrong.yaml:5:5:",
        "wrong.yaml:6:15:",
        "wrong.yaml:8:10:",
    ]
    assert "did you mean 'strength'" in lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "nothing.yaml"], ["nothing.yaml"]),
        (["--recipe", "recipe.yaml", "--model", "nowhere/at-all"], ["nowhere/at-all"]),
        (["--recipe", "recipe.yaml", "--set", "edits.0.layers=3"], ["edits.0.layers", "0 to 2"]),
        (["--recipe", "recipe.yaml", "--set", "prompts.target=gone.txt"], ["gone.txt"]),
        (["--recipe", "recipe.yaml", "--set", "export.gguf.base=gone.gguf"], ["gone.gguf"]),
        (["--recipe", "recipe.yaml", "--set", "export.gguf.base=demo"], ["export.gguf.base"]),
        (["--recipe", "recipe.yaml", "--output", "model"], ["model", "--overwrite"]),
    ],
)
def test_bad_input_is_one_line(
    bake: Run, place: Path, arguments: list[str], words: list[str]
) -> None:
    refused(bake, arguments, 1, *words)


def test_a_hub_id_is_found_in_the_hubs_cache(place: Path) -> None:
    """The Hub's own client and cache layout; there is no network here."""
    repository = place / "hub" / "models--somebody--tiny"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(snapshot.name)
    shutil.copytree(place / "model", snapshot)
    command = [sys.executable, "-m", "bake", "plan", "--recipe", "recipe.yaml", "--model"]
    environment = {**os.environ, "HF_HUB_CACHE": str(place / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "somebody/tiny"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "model.layers.1.mlp.down_proj.weight" in done.stdout
    done = subprocess.run(
        [*command, "somebody/else"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    assert done.stderr.startswith("bake: model: somebody/else: no such folder, and the Hub")
    assert len(done.stderr.splitlines()) == 1


def test_an_architecture_outside_the_table(bake: Run, place: Path) -> None:
    config = json.loads(Path("model/config.json").read_text()) | {"model_type": "rwkv"}
    Path("model/config.json").write_text(json.dumps(config))
    refused(bake, ["--recipe", "recipe.yaml"], 1, "model/config.json", "'rwkv'")


def test_a_truncated_checkpoint(bake: Run, place: Path) -> None:
    weights = Path("model/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    refused(bake, ["--recipe", "recipe.yaml"], 1, "model/model.safetensors", "truncated")


def test_a_base_gguf_of_another_model_or_none(bake: Run, place: Path) -> None:
    from bake.demo.base import base_gguf

    arguments = ["--recipe", "recipe.yaml", "--set", f"export.gguf.base={base_gguf()}"]
    refused(bake, arguments, 1, "30 blocks", "the checkpoint 3")
    Path("cut.gguf").write_bytes(base_gguf().read_bytes()[:5000])
    refused(bake, ["--recipe", "recipe.yaml", "--set", "export.gguf.base=cut.gguf"], 1, "cut.gguf")


def test_a_model_that_never_refuses_is_no_base(bake: Run, place: Path) -> None:
    refused(bake, ["--recipe", "recipe.yaml"], 1, "prompts.target", "refused")


@pytest.mark.parametrize("name", [recipe.name for recipe in shipped_recipes()])
def test_every_shipped_recipe_can_be_planned(bake: Run, demo: object, name: str) -> None:
    code, out, err = bake("plan", "--recipe", name)
    assert code == 0, err
    assert "model.layers.1" in out
