"""The README's first command, as a newcomer runs it: a clean folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    install, run = second.split(" && ")
    assert install == 'pip install -c constraints.txt -e ".[demo,test]"'
    assert run == "pytest -n 2 --dist loadfile"
    assert (ROOT / "recipes/political-open.yaml").is_file()


@pytest.mark.slow
def test_the_first_command_keeps_its_promises(
    tmp_path: Path, demo: object, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a clean folder; the recipe's own guard and verification are the assertions."""
    done = subprocess.run(
        ["bake", "--recipe", str(ROOT / "recipes/political-open.yaml")],
        cwd=tmp_path,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "llama-server -m" in done.stdout
    manifest = json.loads((tmp_path / "political-open" / "bake.json").read_text())
    after = manifest["measured"]["refusals"]["after"]["transformers"]
    assert 100 * after["target"]["refused"] <= 10 * after["target"]["total"]
    assert manifest["measured"]["parity"]["transformers"]["lost_share"] < 1e-4
    # The measured table belongs into the log of a test run.
    with capsys.disabled():
        sys.stdout.write(f"\n{done.stdout}")
