"""The README's first command, as a newcomer runs it: a clean folder, every shipped recipe."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bake.recipe import shipped_recipes

ROOT = Path(__file__).parent.parent


def first_screen() -> list[str]:
    """The two commands at the top of the README."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [block.strip() for block in blocks[:2]]


def test_the_two_commands_are_the_ones_that_ci_and_tests_run() -> None:
    first, second = first_screen()
    install, run = first.split(" && ")
    assert install == 'pip install -c constraints.txt -e ".[demo]"'
    assert run == "bake --recipe recipes/political-open.yaml"
    assert second == 'pip install -c constraints.txt -e ".[demo,test]" && pytest'
    assert (ROOT / "recipes/political-open.yaml").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", [recipe.name for recipe in shipped_recipes()])
def test_a_shipped_recipe_keeps_its_promises(
    name: str, tmp_path: Path, demo: object, capsys: pytest.CaptureFixture[str]
) -> None:
    """`bake --recipe` in a clean folder; its guard and its verification are the assertions."""
    done = subprocess.run(
        ["bake", "--recipe", str(ROOT / "recipes" / f"{name}.yaml")],
        cwd=tmp_path,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "llama-server -m" in done.stdout
    manifest = json.loads((tmp_path / name / "bake.json").read_text())
    assert set(manifest["measured"]["refusals"]["after"]) == {"transformers", "llama.cpp"}
    # The measured table belongs into the log of a test run.
    with capsys.disabled():
        sys.stdout.write(f"\n{done.stdout}")
