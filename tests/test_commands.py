"""The command line: help, errors in one line each, their exit codes, and nothing left behind."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from bake.directions import Directions, load_directions, save_directions
from bake.recipe import shipped_recipes
from tests.conftest import Run
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
    """Nor does the end of any command look for cycles in what it leaves."""
    code = (
        "import atexit, gc, sys; sys.argv = ['bake', '--help']\n"
        "atexit.register(lambda: print(gc.get_freeze_count() > 0))\n"
        "from bake.commands import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Exit codes" in done.stdout
    assert done.stdout.endswith("\nTrue\n")


def test_a_plan_imports_no_models(place: Path) -> None:
    code = (
        "import sys; sys.argv = ['bake', 'plan', '--recipe', 'recipe.yaml']\n"
        "from bake.commands import main\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code\n"
        "heavy = {'transformers', 'accelerate', 'sympy', 'scipy'} & set(sys.modules)\n"
        "assert 'torch' in sys.modules and not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stderr


def test_a_shell_completes_commands_and_recipes() -> None:
    def completed(words: str, last: int) -> list[str]:
        asked = {"_BAKE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(last)}
        done = subprocess.run(["bake"], env=os.environ | asked, capture_output=True, text=True)
        return done.stdout.split()

    assert completed("bake repr", 1) == ["plain,reproduce"]
    found = ["file,pol", "plain,political-open-block", "plain,political-open"]
    assert completed("bake plan --recipe pol", 3) == found


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
        "political-open-block.yaml",
        "political-open.yaml",
        "refuse-topic-block.yaml",
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


LONG = "a" * 5000
SHAPED = "edits.0={op: add, layer: 1, strength: -1}"


def test_directions_are_printed_and_converted(bake: Run, place: Path) -> None:
    np.save("d.npy", np.array([[0, 0], [3, 4], [0, 2.0]]))
    code, out, _ = bake("directions", "d.npy")
    assert code == 0
    assert out.splitlines() == [
        "site       out",
        "source     d.npy",
        "width      2",
        "layers     2",
        "",
        "layer      norm",
        "1          5",
        "2          2",
    ]
    code, out, _ = bake("directions", "d.npy", "--output", "d.gguf")
    assert code == 0
    assert out.endswith("\nwritten: d.gguf\n")
    code, out, _ = bake("directions", "d.gguf", "--output", "d.safetensors")
    assert code == 0
    assert "source     d.npy\n" in out
    found = load_directions(Path("d.safetensors"))
    assert {layer: row.tolist() for layer, row in found.vectors.items()} == {1: [3, 4], 2: [0, 2]}
    refused(bake, ["directions", "d.npy", "--output", "d.gguf"], 1, "d.gguf", "--overwrite")
    refused(bake, ["directions", "d.npy", "--output", "d.pt"], 1, "d.pt", ".safetensors or .gguf")
    code, out, _ = bake("directions", "d.npy", "--output", "d.gguf", "--overwrite")
    assert code == 0


def test_a_bare_vector_is_printed_and_takes_its_layer_from_the_user(bake: Run, place: Path) -> None:
    torch.save(torch.ones(4), "d.pt")
    code, out, _ = bake("directions", "d.pt")
    assert code == 0
    assert out.endswith("not named  2\n")
    refused(bake, ["directions", "d.pt", "--output", "d.safetensors"], 1, "d.pt", "--layer N")
    code, out, _ = bake("directions", "d.pt", "--layer", "7", "--output", "d.safetensors")
    assert code == 0
    assert load_directions(Path("d.safetensors")).layers == (7,)
    assert bake("directions", "d.safetensors", "--layer", "7")[0] == 2


def test_a_plan_takes_the_directions_of_a_file(bake: Run, place: Path) -> None:
    np.save("d.npy", np.ones(32))
    given = ["plan", "--recipe", "recipe.yaml", "--set", "directions=d.npy", "--set", SHAPED]
    code, out, _ = bake(*given)
    assert code == 0
    assert "directions: layer 1 of d.npy (site out, source d.npy)" in out
    np.save("d.npy", np.ones(31))
    refused(bake, given, 1, "d.npy", "width 31", "has 32")
    Path("d.npy").unlink()
    refused(bake, given, 1, "d.npy", "No such file")


def test_no_class_is_needed_where_directions_are_given(bake: Run, place: Path) -> None:
    """The model refuses nothing: without the file this recipe has nothing to fit."""
    more = ["evaluate.limit=2", "evaluate.answer_tokens=2", "runtimes=[transformers]", SHAPED]
    arguments = ["--recipe", "recipe.yaml"] + [word for one in more for word in ("--set", one)]
    refused(bake, arguments, 1, "prompts.target", "refused")
    save_directions(Directions({1: torch.ones(32)}), Path("d.safetensors"))
    code, out, err = bake(*arguments, "--set", "directions=d.safetensors", "--output", "out")
    assert code == 0, err
    assert "written: out" in out
    assert "fit ..." not in err


def test_a_saved_plan_is_applied_to_the_same_bytes(bake: Run, place: Path) -> None:
    save_directions(Directions({1: torch.ones(32)}), Path("d.safetensors"))
    more = ["evaluate.limit=2", "evaluate.answer_tokens=2", "runtimes=[transformers]", SHAPED]
    more += ["directions=d.safetensors", "name=mine"]
    arguments = ["--recipe", "recipe.yaml", "--model", "./model"]
    arguments += [word for one in more for word in ("--set", one)]
    code, out, err = bake("plan", *arguments, "--output", "plan.json")
    assert (code, out.splitlines()[-1]) == (0, "written: plan.json"), err
    refused(bake, ["plan", *arguments, "--output", "plan.json"], 1, "plan.json", "--overwrite")
    code, printed, _ = bake("plan", *arguments, "--json")
    saved = json.loads(Path("plan.json").read_text())
    assert json.loads(printed).items() <= saved.items()
    assert saved["recipe"]["text"] == Path("recipe.yaml").read_text()
    # The recipe's own file may change: the plan has it.
    Path("recipe.yaml").unlink()
    code, out, err = bake("apply", "plan.json")
    assert code == 0, err
    assert "written: mine" in out
    refused(bake, ["apply", "plan.json"], 1, "mine", "--overwrite")
    assert bake("apply", "plan.json", "--overwrite")[0] == 0
    assert bake("apply", "plan.json", "--output", "again")[0] == 0
    Path("recipe.yaml").write_text(saved["recipe"]["text"])
    assert bake(*arguments, "--output", "direct")[0] == 0
    for name in (
        "model.safetensors",
        "config.json",
        "bake.json",
        "steering/directions.safetensors",
    ):
        written = {(Path(folder) / name).read_bytes() for folder in ("mine", "again", "direct")}
        assert len(written) == 1, name


def test_a_saved_plan_with_an_inserted_block_is_applied(bake: Run, place: Path) -> None:
    write_tiny("llama", place / "model", intermediate_size=80)
    save_directions(Directions({1: torch.ones(32)}), Path("d.safetensors"))
    more = ["evaluate.limit=2", "evaluate.answer_tokens=2", "runtimes=[transformers]", "name=mine"]
    more += ["edits.0={op: add, layer: 1, strength: -1, carrier: block}"]
    more += ["directions=d.safetensors"]
    options = [word for one in more for word in ("--set", one)]
    arguments = ["--recipe", "recipe.yaml", "--model", "./model", *options]
    code, out, err = bake("plan", *arguments, "--output", "plan.json")
    assert code == 0, err
    assert "inserted: block 2 behind block 1, 9 tensors" in out
    assert "renamed: 9 tensors of the blocks behind" in out
    assert "config.json: num_hidden_layers = 4" in out
    code, _, err = bake("apply", "plan.json")
    assert code == 0, err
    manifest = json.loads(Path("mine/bake.json").read_text())
    assert manifest["plan"]["inserted"] == [2]
    assert manifest["measured"]["parity"]["transformers"]["lost_share"] < 1e-6
    assert list(manifest["residuals"]) == ["model.layers.2.mlp.down_proj.weight"]
    _in_plan('"value": 1.0', '"value": 2.0')(place)
    refused(bake, ["apply", "plan.json", "--output", "again"], 1, "value: was 2.0 and is 1.0")


def _retrain(place: Path) -> None:
    """Other weights under the same headers, which no plan looks at."""
    weights = bytearray((place / "model" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (place / "model" / "model.safetensors").write_bytes(weights)


def _other_config(place: Path) -> None:
    file = place / "model" / "config.json"
    file.write_text(file.read_text().replace('"hidden_act": "silu"', '"hidden_act": "gelu"'))


def _other_header(place: Path) -> None:
    file = place / "model" / "model.safetensors"
    content = file.read_bytes()
    assert content.count(b'"format":"pt"') == 1
    file.write_bytes(content.replace(b'"format":"pt"', b'"format":"PT"'))


def _two_shards(place: Path) -> None:
    shutil.rmtree(place / "model")
    write_tiny("llama", place / "model", shard="20KB")


def _in_plan(old: str, new: str) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        text = (place / "plan.json").read_text()
        assert old in text
        (place / "plan.json").write_text(text.replace(old, new, 1))

    return change


def _in_file(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda place: (place / name).write_bytes(content)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "the config": (_other_config, "inputs.config.json: was"),
    "a header": (_other_header, "inputs.headers.model.safetensors: was"),
    "the shards": (_two_shards, "inputs.headers.model.safetensors: is gone"),
    "a prompt": (_in_file("target.txt", b"w1\nw2\nw3\nw4"), "inputs.prompts.target.fit: was"),
    "the directions": (
        lambda place: save_directions(
            Directions({1: 2 * torch.ones(32)}), place / "d.safetensors", overwrite=True
        ),
        "inputs.directions: was",
    ),
    "the plan": (
        _in_plan("layers.1.mlp.down_proj.bias", "layers.2.mlp.down_proj.bias"),
        'edits.0.tensor: was "model.layers.2.mlp.down_proj.bias" and is',
    ),
    "a plan's type": (_in_plan('"mlp_bias": true', '"mlp_bias": 1'), "config.mlp_bias: was 1 and"),
    "a plan with more": (_in_plan('"format": 1', '"more": 0, "format": 1'), "more: is gone since"),
    "the stored recipe": (_in_plan("layer: 1,", "layer: 2,"), "d.safetensors: has no direction"),
    "an override": (_in_plan('"--set name=mine"', '"--output x"'), "expected --set or --model"),
    "another format": (_in_plan('"format": 1', '"format": 2'), "plan.json: format: is 2"),
    "another recipe's kind": (_in_plan('"text"', '"texts"'), "plan.json: is no plan: recipe"),
    "no JSON": (_in_file("plan.json", b"{"), "plan.json: is no plan: not valid JSON"),
    "no text": (_in_file("plan.json", b"\xff"), "plan.json: is no plan: not valid JSON"),
    "a nest": (_in_file("plan.json", b"[" * 100_000), "plan.json: is no plan"),
    "no object": (_in_file("plan.json", b"[]"), "plan.json: is no plan: recipe and format"),
    "no file": (lambda place: (place / "plan.json").unlink(), "plan.json: cannot be read"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_plan_that_holds_no_more_is_one_line(bake: Run, place: Path, case: str) -> None:
    save_directions(Directions({1: torch.ones(32)}), Path("d.safetensors"))
    more = [SHAPED, "directions=d.safetensors", "name=mine", "runtimes=[transformers]"]
    options = [word for one in more for word in ("--set", one)]
    code, _, err = bake("plan", "--recipe", "recipe.yaml", *options, "--output", "plan.json")
    assert code == 0, err
    change, words = CHANGES[case]
    change(place)
    refused(bake, ["apply", "plan.json"], 1, words)


def test_other_weights_under_the_same_headers_are_no_other_plan(bake: Run, place: Path) -> None:
    """A plan is made from headers alone; the version of bake that made it does not count."""
    save_directions(Directions({1: torch.ones(32)}), Path("d.safetensors"))
    more = [SHAPED, "directions=d.safetensors", "name=mine", "runtimes=[transformers]"]
    more += ["evaluate.limit=1", "evaluate.answer_tokens=1"]
    options = [word for one in more for word in ("--set", one)]
    assert bake("plan", "--recipe", "recipe.yaml", *options, "--output", "plan.json")[0] == 0
    _retrain(place)
    _in_plan('"bake": "', '"bake": "0')(place)
    code, _, err = bake("apply", "plan.json")
    assert code == 0, err


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


def test_a_model_named_beyond_the_systems_names_is_one_line(bake: Run) -> None:
    others = ("export.gguf=null", "evaluate.runtimes=[transformers]")
    chosen = [part for one in others for part in ("--set", one)]
    code, _, err = bake("plan", "--recipe", "political-open", "--model", LONG, *chosen)
    assert code == 1
    assert err.startswith("bake: model: aaa")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("reproduce", LONG),
        ("clean", LONG),
        ("--recipe", "political-open", "--output", LONG),
        ("plan", "--recipe", "political-open", "--set", f"export.gguf.base={LONG}"),
    ],
    ids=lambda one: one[0],
)
def test_any_name_beyond_the_systems_names_is_one_line(
    bake: Run, arguments: tuple[str, ...]
) -> None:
    code, out, err = bake(*arguments)
    assert (code, out) == (1, "")
    assert LONG in err
    assert err.endswith("File name too long; give another path\n")
    assert len(err.splitlines()) == 1
