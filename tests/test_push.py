"""`bake push`: the real client against a local server; what may not go out stays here."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from bake.card import check_card
from bake.directions import Directions, save_directions
from bake.errors import GuardError, HubError, ManifestError, VerificationError
from bake.hub import prepare_push
from bake.manifest import differences, file_hash, read_manifest, read_outputs, write_manifest
from bake.pipeline import bake
from bake.recipe import load_recipe
from tests.hub_server import TOKEN, Server, git, served
from tests.test_given_directions import ROLES
from tests.through_disk import opened
from tests.tiny import write_place
from tests.tiny_gguf import write_tiny_gguf

RECIPE = """\
description: Less of one thing.
model: model
prompts:
  target: target.txt
  protected: protected.txt
  lookalike: null
  general: general.txt
  text: passages.txt
directions: vector.safetensors
edits:
  - {op: ablate, layers: [1]}
export: {gguf: {base: base.gguf, edited_type: f32}, adapters: [peft, gguf]}
verify: {prompts: 4}
evaluate: {runtimes: [transformers], answer_tokens: 3, limit: 3}
guard: {protected_drop: 1.5, lookalike_rise: 100, general_rise: 100}
"""
BASE_CARD = "---\nlicense: other\nlicense_name: some-terms\nlicense_link: LICENSE\n---\n# Base\n"
MAIN, GGUF, LORA = "me/opened", "me/opened-GGUF", "me/opened-LoRA"
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and its GGUF, and in `out` a checkpoint, GGUFs and a LoRA."""
    folder = write_place(tmp_path_factory.mktemp("place"), RECIPE, ROLES)
    (folder / "model" / "README.md").write_text(BASE_CARD)
    (folder / "model" / "LICENSE").write_text("Some terms.")
    base, arch, _ = opened(folder / "model")
    write_tiny_gguf(base, arch, folder / "base.gguf")
    vectors = {1: torch.randn(32, generator=torch.Generator().manual_seed(1))}
    save_directions(Directions(vectors), folder / "vector.safetensors")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        bake(load_recipe("recipe.yaml", output="out"))
    return folder


@pytest.fixture
def out(place: Path, tmp_path: Path) -> Path:
    """The baked folder, to be spoilt."""
    return Path(shutil.copytree(place / "out", tmp_path / "out"))


@pytest.fixture
def hub() -> Iterator[Server]:
    with served() as server:
        yield server


class Push:
    """`bake push` in a process of its own."""

    def __init__(self, hub: Server, home: Path) -> None:
        self.environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
        }

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "bake", "push", *map(str, arguments)]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=100
        )
        assert TOKEN not in done.stdout + done.stderr
        said = [line for line in done.stderr.splitlines() if not line.startswith(QUIET)]
        return done.returncode, done.stdout, "\n".join(said)


QUIET = ("verify", "look for tokens", "upload")


@pytest.fixture
def push(hub: Server, tmp_path: Path) -> Push:
    return Push(hub, tmp_path / "hf")


@pytest.fixture(scope="module")
def pushed(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """A server with the three repositories of a push, and what the push said."""
    with served() as hub:
        push = Push(hub, tmp_path_factory.mktemp("hf"))
        code, said, err = push(place / "out", "--repo-id", MAIN)
        assert (code, err) == (0, ""), err
        yield hub, said


def test_three_repositories_each_a_bake_of_its_own(
    pushed: tuple[Server, str], place: Path, tmp_path: Path
) -> None:
    hub, said = pushed
    assert set(hub.repos) == {MAIN, GGUF, LORA}
    recipe = read_manifest(place / "out")["recipe"]["sha256"]
    for name, repo in hub.repos.items():
        assert f"{name}: " in said
        assert repo.visibility == "private"
        assert repo.commits[-1]["summary"] == f"bake recipe, recipe {recipe[:12]}"
        assert recipe in repo.commits[-1]["description"]
        assert len(repo.commits) == 2
        # What is downloaded again is what `bake verify` expects.
        folder = tmp_path / name
        for inside, content in repo.files.items():
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            (folder / inside).write_bytes(content)
        assert differences(folder, read_outputs(folder)) == []
        assert (folder / "LICENSE").read_text() == "Some terms."
        assert not any(TOKEN.encode() in content for content in repo.files.values())
    weights = (place / "out" / "model.safetensors").read_bytes()
    assert hub.repos[MAIN].files["model.safetensors"] == weights
    assert not any(name.endswith(".gguf") for name in hub.repos[MAIN].files)
    assert {"recipe.gguf", "recipe.lora.gguf", "Modelfile", "params", "answers.jsonl"} <= set(
        hub.repos[GGUF].files
    )
    assert "config.json" not in hub.repos[GGUF].files
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(hub.repos[LORA].files)


def test_cards_read_as_the_hub_reads_them(pushed: tuple[Server, str]) -> None:
    repos = pushed[0].repos
    cards = {name: repo.files["README.md"].decode() for name, repo in repos.items()}
    for name, text in cards.items():
        check_card(text)
        pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
        assert set(pictures) <= repos[name].files.keys()
        assert bool(pictures) == (name != LORA)
    data = {name: ModelCard(text).data for name, text in cards.items()}
    front = data[MAIN].to_dict()
    assert front["license"] == "other"
    assert front["license_name"] == "some-terms"
    assert (front["library_name"], front["pipeline_tag"]) == ("transformers", "text-generation")
    assert "base_model" not in front
    results = {one.task_name: one for one in data[MAIN].eval_results}
    assert set(results) == {"Refusals, target", "Refusals, protected", "Refusals, general"}
    assert results["Refusals, protected"].metric_args == {"before": 0.0, "refused": 0, "total": 3}
    assert (data[GGUF].base_model, data[GGUF].base_model_relation) == (MAIN, "quantized")
    assert data[LORA].library_name == "peft"
    first = cards[MAIN].split("---\n\n")[1].splitlines()
    assert first[0] == "# opened"
    assert "may fall by at most 1.5 points" in first[2]
    # The tiny base refuses nothing, so that this promises nothing.
    assert first[4].startswith("**Warning: guard, transformers: protected_drop promises nothing: ")
    assert f"ollama run hf.co/{GGUF}" in cards[GGUF]
    assert f'from_pretrained(base, "{LORA}")' in cards[LORA]


def test_a_dry_run_lists_what_is_sent_and_asks_nothing(
    hub: Server, push: Push, pushed: tuple[Server, str], place: Path
) -> None:
    del push.environment["HF_TOKEN"]
    code, said, err = push(place / "out", "--repo-id", MAIN, "--dry-run")
    assert (code, err, hub.asked) == (0, "", [])
    rows = [line.split() for line in said.split("\n\n")[0].splitlines()[1:]]
    assert all(row[1] == "(private)" for row in rows)
    sent = {
        (name, inside, f"{len(content):,}")
        for name, repo in pushed[0].repos.items()
        for inside, content in repo.files.items()
        if inside != ".gitattributes"
    }
    assert {(row[0], row[2], row[3]) for row in rows} == sent


def test_an_existing_repository_is_not_overwritten_without_update(
    hub: Server, push: Push, place: Path
) -> None:
    assert push(place / "out", "--repo-id", MAIN, "--public")[0] == 0
    assert {repo.visibility for repo in hub.repos.values()} == {"public"}
    hub.asked.clear()
    # The same again changes nothing, and says so.
    code, said, _ = push(place / "out", "--repo-id", MAIN)
    assert code == 0
    assert said.count("files already") == 3
    assert not [one for one in hub.asked if "commit" in one or "lfs" in one]
    hub.repos[MAIN].files |= {"README.md": b"# mine", "notes.md": b"mine"}
    before = {name: dict(repo.files) for name, repo in hub.repos.items()}
    code, _, err = push(place / "out", "--repo-id", MAIN)
    assert (code, len(err.splitlines())) == (1, 1), err
    assert f"{MAIN}: exists already and has another README.md and 1 more" in err
    assert "--update" in err
    assert {name: repo.files for name, repo in hub.repos.items()} == before
    code, said, err = push(place / "out", "--repo-id", MAIN, "--update")
    assert (code, err) == (0, "")
    assert "1 of " in said
    assert "1 deleted" in said
    assert "notes.md" not in hub.repos[MAIN].files
    assert hub.repos[MAIN].files["README.md"].startswith(b"---")


def test_a_cut_upload_leaves_no_half_commit_and_goes_on(
    hub: Server, push: Push, place: Path
) -> None:
    # As the client does it by default: through Xet, but without its patience.
    push.environment |= {"HF_HUB_DISABLE_XET": "0", "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1"}
    hub.cut = 1
    code, _, err = push(place / "out", "--repo-id", MAIN)
    assert (code, len(err.splitlines())) == (1, 1), err
    assert err.startswith(f"bake: {MAIN}: broke off: ")
    assert "push again" in err
    assert set(hub.repos[MAIN].files) == {".gitattributes"}
    assert GGUF not in hub.repos
    taken = list(hub.xorbs)
    assert len(taken) == 1
    hub.cut = None
    code, _, err = push(place / "out", "--repo-id", MAIN)
    assert (code, err) == (0, ""), err
    # The file that went through was not sent again.
    assert hub.xorbs.count(taken[0]) == 1
    assert set(hub.repos) == {MAIN, GGUF, LORA}
    sums = read_outputs(place / "out")
    large = ("model.safetensors", "steering/directions.safetensors")
    assert hub.repos[MAIN].large == {name: sums[name] for name in large}


REFUSALS = {
    "no token": ({}, None, "there is no token; log in with `hf auth login`"),
    "a wrong token": ({}, "hf_" + "x" * 34, "the Hub says 401"),
    "no right to write": (
        {"POST /api/repos/create": (403, f"You have no rights here with {TOKEN}")},
        TOKEN,
        "You have no rights here with …; use a token that may write there",
    ),
    "a rejected upload": (
        {"POST /me/opened.git": (403, "Private repository storage limit reached")},
        TOKEN,
        f"{MAIN}: the Hub says 403: Private repository storage limit reached",
    ),
    "a commit between": (
        {"POST /api/models/me/opened/commit": (412, "A commit has happened since.")},
        TOKEN,
        "somebody else has changed it meanwhile",
    ),
    "a card that the Hub refuses": (
        {"POST /api/validate-yaml": (400, "license: must be one of a list")},
        TOKEN,
        f"{MAIN}: README.md: refused: ",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_hub_refuses_is_one_line(hub: Server, push: Push, place: Path, case: str) -> None:
    hub.refuse, token, said = REFUSALS[case]
    push.environment.pop("HF_TOKEN")
    if token:
        push.environment["HF_TOKEN"] = token
    code, out, err = push(place / "out", "--repo-id", MAIN)
    assert (code, out, len(err.splitlines())) == (1, "", 1), err
    assert said in err
    assert all(set(repo.files) == {".gitattributes"} for repo in hub.repos.values())


def rewrite(folder: Path, change: Change) -> None:
    manifest = read_manifest(folder)
    change(manifest)
    write_manifest(folder, manifest)


def worse(manifest: dict[str, Any]) -> None:
    for found, refused in (("before", 3), ("after", 1)):
        manifest["measured"]["refusals"][found]["transformers"]["protected"]["refused"] = refused


def licensed(*ids: str) -> Change:
    return lambda manifest: manifest["base"].update(license=ids, license_name=None)


def leak(folder: Path) -> None:
    path = folder / "answers.jsonl"
    path.write_text(path.read_text() + f'{{"text": "hf_{"A" * 34}"}}\n')
    rewrite(folder, lambda one: one["outputs"].update({"answers.jsonl": file_hash(path)}))


SPOILT: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no manifest": (lambda out: (out / "bake.json").unlink(), ManifestError, "cannot be read"),
    "an older manifest": (
        lambda out: rewrite(out, lambda one: one.pop("base")),
        ManifestError,
        "bake.json: base: field required",
    ),
    "another file": (
        lambda out: (out / "config.json").write_text("{}"),
        VerificationError,
        "config.json: changed since the bake",
    ),
    "a broken guard": (
        lambda out: rewrite(out, worse),
        GuardError,
        r"protected refusals fell by 66\.7 points, 1\.5 allowed",
    ),
    "no derivatives": (
        lambda out: rewrite(out, licensed("cc-by-nc-nd-4.0")),
        HubError,
        "under cc-by-nc-nd-4.0, which allows no derivatives",
    ),
    "an unknown licence": (
        lambda out: rewrite(out, licensed()),
        HubError,
        "the licence of the base is not known",
    ),
    "a token inside": (leak, HubError, "answers.jsonl: holds an access token"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_may_not_go_out_is_refused_before_the_hub_is_asked(out: Path, case: str) -> None:
    spoil, error, said = SPOILT[case]
    spoil(out)
    with pytest.raises(error, match=said) as caught:
        prepare_push(out, MAIN)
    assert len(str(caught.value).splitlines()) == 1


def test_a_licence_is_given_where_the_base_names_none_and_only_there(out: Path) -> None:
    with pytest.raises(HubError, match="which the bake inherits; leave it out"):
        prepare_push(out, MAIN, licence="mit")
    rewrite(out, licensed())
    with pytest.raises(HubError, match="allows no derivatives"):
        prepare_push(out, MAIN, licence="cc-by-nd-4.0")
    made = prepare_push(out, MAIN, licence="mit")
    text = made.repositories[0].files["README.md"]
    assert isinstance(text, bytes)
    assert ModelCard(text.decode()).data.license == "mit"


@pytest.mark.parametrize("name", ["opened", "me/a/b", "me/opened-GGUF", "me/..", "me/" + "x" * 96])
def test_a_name_that_the_hub_does_not_take_is_refused(place: Path, name: str) -> None:
    with pytest.raises(HubError, match=r"^--repo-id "):
        prepare_push(place / "out", name)


def test_the_server_hashes_as_git_does() -> None:
    """The empty blob's name is known to everybody who has used git."""
    assert git(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
