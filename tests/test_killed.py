"""Bakes that are killed while they write: nothing half-done appears, and they go on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("kills", ["16", pytest.param("200", marks=pytest.mark.slow)])
def test_a_killed_bake_leaves_no_part_and_ends_as_an_unbroken_one(
    tmp_path: Path, kills: str
) -> None:
    """At calls drawn of all that change the disk, the most of them twice in a row."""
    command = [sys.executable, "-m", "tests.killed", str(tmp_path), kills]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert found["kills"] == int(kills)
    # Some were late enough to have begun writing tensors.
    assert found["resumed"] > found["kills"] // 4
