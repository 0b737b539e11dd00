"""`bake reproduce`: a bake again, from its own manifest, here and from a repository."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bake.evidence import Beside
from bake.hub import prepare_push
from bake.manifest import read_manifest, write_manifest
from tests.conftest import Run
from tests.hub_server import Repo, served
from tests.test_push import MAIN, place
from tests.test_report import GEOMETRY

__all__ = ["place"]


def quiet(err: str) -> list[str]:
    """What is said beside progress."""
    return [
        line for line in err.splitlines() if not line.endswith("...") and ": done in" not in line
    ]


def test_the_same_bytes_come_out_and_nothing_stays_behind(
    bake: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    before = sorted(place.iterdir())
    code, out, err = bake("reproduce", "out")
    assert (code, quiet(err)) == (0, []), err
    files = len(read_manifest(place / "out")["outputs"]) - 1
    assert out == (
        f"{files} of {files} files have the same bytes, 6 of 6 counts of refusals are the same\n"
    )
    assert sorted(place.iterdir()) == before


def test_other_figures_are_named(
    bake: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    manifest = read_manifest(place / "out")
    manifest["measured"]["refusals"]["after"]["transformers"]["target"]["refused"] = 2
    manifest["outputs"]["config.json"] = "0" * 64
    manifest["versions"]["torch"] = "1.0"
    write_manifest(tmp_path, manifest)
    code, out, err = bake("reproduce", str(tmp_path))
    assert code == 4
    assert quiet(err) == [f"bake: {tmp_path}: 1 counts of refusals are not the same"]
    lines = [line.split() for line in out.splitlines()]
    assert ["transformers,", "after", "target", "66.7", "%", "(2/3)", "0.0", "%", "(0/3)"] in lines
    assert ["other", "bytes:", "config.json"] in lines
    assert ["torch", "1.0"] in [line[:2] for line in lines]


@pytest.mark.parametrize(
    ("key", "name", "said"),
    [
        ("inputs", "model.safetensors", "is not what the bake was made of; give the base of then"),
        ("inputs", "gone.json", "missing; the bake was made of it"),
        ("prompts", "target", "prompts.target: are not those of the bake"),
    ],
)
def test_another_base_is_refused_before_anything_is_baked(
    bake: Run,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    name: str,
    said: str,
) -> None:
    monkeypatch.chdir(place)
    manifest = read_manifest(place / "out")
    manifest[key][name] = "0" * 64 if key == "inputs" else {"fit": "0" * 64}
    write_manifest(tmp_path, manifest)
    code, out, err = bake("reproduce", str(tmp_path))
    assert (code, out, len(quiet(err))) == (1, "", 1), err
    assert said in err


def test_a_repository_is_reproduced_for_the_files_that_it_has(
    bake: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    mapped = tmp_path / "map.json"
    mapped.write_text(json.dumps({**GEOMETRY, "model": "model"}))
    push = prepare_push(place / "out", MAIN, beside=Beside(geometry=mapped))
    for one in push.repositories[1:]:
        manifest = one.files["bake.json"]
        assert isinstance(manifest, bytes)
        (tmp_path / "bake.json").write_bytes(manifest)
        code, out, err = bake("reproduce", str(tmp_path))
        # But for the card and the manifest, and what the push was given beside the bake.
        added = [name for name in one.files if name.startswith("evidence/")]
        assert "evidence/geometry.json" in added
        files = len(one.files) - len(added) - 2
        assert (code, quiet(err)) == (0, []), err
        assert out.startswith(f"{files} of {files} files have the same bytes, ")


def test_the_manifest_comes_from_the_hub(place: Path, tmp_path: Path) -> None:
    with served() as hub:
        content = (place / "out" / "bake.json").read_bytes()
        hub.repos[MAIN] = Repo("public", files={"bake.json": content})
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
        }
        program = """if True:
            import sys
            from bake.errors import HubError
            from bake.hub import find_evidence
            print(find_evidence(sys.argv[1]).loaded.sha256)
            try:
                find_evidence("me/nothing", "some-branch")
            except HubError as error:
                print(error)
        """
        done = subprocess.run(
            [sys.executable, "-c", program, MAIN],
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
    found, *refused = done.stdout.splitlines()
    assert found == read_manifest(place / "out")["recipe"]["sha256"], done.stderr
    assert len(refused) == 1
    assert refused[0].startswith("me/nothing: the Hub says 404: ")
