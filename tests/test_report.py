"""The report: what it shows is what the evidence says, and no text of it can do anything."""

import base64
import copy
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bake.directions import Directions, save_directions
from bake.directions.value import Origin
from bake.html.svg import Figure, Scale, ticks
from tests.conftest import Run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ROLES = ("target", "protected", "lookalike", "general")
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&\x1b[2J\u202e\ud800"
RECIPE = """\
description: "<b>bold</b> & more"
model: demo
prompts: {target: political}
edits: [{op: gate, layers: 3-4, strength: -1}]
export: {gguf: {base: demo}}
"""
MANIFEST: dict[str, Any] = {
    "name": "open",
    "recipe": {"text": RECIPE, "source": "recipes/open.yaml", "overrides": ["--set seed=4"]},
    "model": "demo",
    "base": {},
    "seed": 4,
    "versions": {"bake": "0.1.0", "torch": "2.13.0+cpu"},
    "inputs": {"model.safetensors": "ab" * 32},
    "prompts": {"target": {"fit": "cd" * 32}},
    "directions": {"file": None, "model": "demo", "site": "out"},
    "plan": {
        "architecture": "llama",
        "layers": 6,
        "width": 8,
        "edits": [
            {
                "operator": "gate",
                "carrier": "rank-one",
                "layer": 3,
                "site": "mlp",
                "tensor": "model.layers.3.mlp.down_proj.weight",
            }
        ],
    },
    "fit": {
        "classes": {"target": {"prompts": 40, "refused": 38}},
        "gaps": {"3": 12.5},
        "figures": {"3": {"auc": 0.98, "spread": 0.9}},
        "readings": {"low": -1, "high": 2, "layers": {"3": {key: [0, 3, 1] for key in ROLES}}},
        "openings": {
            "edits.0.model.layers.3.mlp.down_proj": {"target": 0.9, "general": 0.01},
            "edits.1.model.layers.3.mlp.down_proj": {"target": 0.876, "general": 0.02},
        },
    },
    "residuals": {"model.layers.3.mlp.down_proj.weight": 2e-6},
    "gguf": [
        {
            "tensor": "blk.3.ffn_down.weight",
            "base_type": None,
            "written_type": "Q8_0",
            "surviving_share": 0.99,
            "noise": 0.01,
            "residual": 0.1,
        }
    ],
    "measured": {
        "refusals": {
            when: {"llama.cpp": {role: {"refused": count, "total": 40} for role in ROLES}}
            for when, count in (("before", 36), ("after", 4))
        },
        "paired": {"llama.cpp": {key: {"opened": 33, "closed": 1} for key in ROLES}},
        "parity": {
            "llama.cpp": {
                "lost_share": 0.04, "largest": 1.5, "largest_effect": 30.0, "positions": 99,
            }
        },
    },
    "conversion": {"type": "q4_k_m", "outtype": "bf16", "apart": 0.004, "imatrix": "text"},
    "runtimes": {
        "llama.cpp": {"status": "verified", "lost_share": 0.04},
        "vllm": {"status": "by table", "version": "vLLM 0", "trust": ["it reads", HOSTILE]},
        "mlx": {"status": "not written", "reads": "safetensors"},
    },
    "guard": {"protected_drop": 2.0, "target_at_most": None},
    "outputs": {},
}  # fmt: skip
NAMES = ("harmful", HOSTILE[:40], "generic", "random")
GEOMETRY: dict[str, Any] = {
    "format": "bake.geometry",
    "version": 1,
    "model": "demo",
    "recipe": "open",
    "layer": 3,
    "seed": 0,
    "contrast": "general",
    "kinds": {
        name: {
            "meaning": "", "prompts": 9, "refused": 8, "by": "behaviour", "gap": 3.0, "spread": 0.9,
        }
        for name in NAMES[:2]
    },
    "controls": {"generic": "refusal as such", "random": "any"},
    "cosines": {"names": list(NAMES), "values": torch.eye(4).tolist()},
    "trades": {
        "length": 3.0,
        "prompts": dict.fromkeys(ROLES, 16),
        "base": {"refused": dict.fromkeys(ROLES, 50.0), "divergence": 0.0},
        "curves": {
            name: [
                {"strength": strength, "refused": dict.fromkeys(ROLES, 25.0), "divergence": 0.2}
                for strength in (-1.0, 1.0)
            ]
            for name in NAMES
        },
    },
}  # fmt: skip
SELECTION: dict[str, Any] = {
    "format": "bake.selection",
    "version": 1,
    "model": "demo",
    "candidates": [
        {"site": "mid", "token": -2, "layer": layer, "figures": {"auc": 0.5 + layer / 10}}
        for layer in (1, 2)
    ],
    "chosen": {"site": "mid", "token": -2, "layer": 2, "figures": {"auc": 0.7}},
}


def answer(role: str, **more: object) -> dict[str, object]:
    return {
        "runtime": "llama.cpp",
        "set": role,
        "topic": "t",
        "prompt": f"about {role}",
        "refused_before": True,
        "refused_after": role != "target",
        "before": f"no {role}",
        "after": f"yes {role}",
        **more,
    }


class Page(HTMLParser):
    """What a browser would take from a page: elements with attributes, and what they hold."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "input"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open:
            self.inside.setdefault(self._open[-1], []).append(data)

    @property
    def text(self) -> str:
        return " ".join(part for tag, found in self.inside.items() for part in found)

    def where(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def write(place: Path, **files: object) -> Path:
    """A baked folder's evidence, and other files beside it."""
    folder = place / "open"
    folder.mkdir(exist_ok=True)
    given = {"manifest": MANIFEST, "answers": [answer(role) for role in ROLES]} | files
    for name, content in given.items():
        if name == "answers":
            assert isinstance(content, Sequence)
            lines = [json.dumps(line) for line in content]
            (folder / "answers.jsonl").write_text("\n".join(lines) + "\n")
        else:
            path = folder / "bake.json" if name == "manifest" else place / f"{name}.json"
            path.write_text(json.dumps(content))
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_everything_that_the_evidence_has_is_shown(bake: Run, place: Path) -> None:
    write(place, geometry=GEOMETRY, selection=SELECTION)
    code, out, err = bake(
        "report", "open", "--output", "report.html", "--geometry", "geometry.json",
        "--selection", "selection.json", "--figures", "figures",
    )  # fmt: skip
    assert (code, out, err) == (0, "written: report.html, figures\n", "")
    page = Page(place / "report.html")
    sections = {one["id"] for one in page.where("section")}
    assert sections == {
        "behaviour", "trades", "layers", "map", "readings", "parity", "answers", "reproduce",
    }  # fmt: skip
    text = page.text
    # 36 of 40, its interval, and 33 against 1 of 34 that changed.
    for words in ("90.0 %", "36/40", "[76.9, 96.0]", "-80.0", "33 opened", "4e-09", "4.0e-02"):
        assert words in text
    assert "bake --recipe open.yaml --set seed=4" in text
    for words in (
        "quantised by llama.cpp: q4_k_m, weighed by an importance matrix.",
        "0.40% from the checkpoint's",
        "logits compared, lost share 4.0e-02",
        "not run; by what is known of vLLM 0, it reads; </script>",
        "has nothing to serve: no safetensors is written",
        # Of two gates on one module, both.
        *("edits.0.model.layers.3.mlp.down_proj", "edits.1.model.layers.3.mlp.down_proj", "0.876"),
    ):
        assert words in text
    assert "pip install torch==2.13.0\n" in text
    assert "<b>bold</b> & more" in text
    assert {path.name for path in (place / "figures").iterdir()} == {
        "refusals-llama-cpp.svg", "scores-auc.svg", "cosines-map.svg", "readings-layer-3.svg",
        *(f"trades-{role}.svg" for role in ROLES),
    }  # fmt: skip
    for path in (place / "figures").iterdir():
        root = ElementTree.fromstring(path.read_text())
        assert root.find("{http://www.w3.org/2000/svg}style") is not None
        # A file has its own key.
        words = {one.text for one in root.iter("{http://www.w3.org/2000/svg}text")}
        assert {"generic", "random"} <= words or not path.name.startswith("trades")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_a_browser_runs_the_page(bake: Run, place: Path) -> None:
    """Its script under its own policy, without a word on the console."""
    write(place, geometry=GEOMETRY, selection=SELECTION)
    arguments = ("--geometry", "geometry.json", "--selection", "selection.json")
    assert bake("report", "open", "--output", "report.html", *arguments)[0] == 0
    assert CHROMIUM is not None
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr")
    folder = f"--user-data-dir={place / 'browser'}"
    address = (place / "report.html").as_uri()
    done = subprocess.run(
        [CHROMIUM, *options, folder, "--dump-dom", address],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr
    assert '<output id="shown">4 of 4 shown</output>' in done.stdout
    assert '<form id="filter">' in done.stdout


def test_what_is_not_there_is_left_out(bake: Run, place: Path) -> None:
    manifest = copy.deepcopy(MANIFEST)
    manifest["fit"] |= {"figures": {}, "gaps": {}, "openings": {}, "readings": None}
    manifest |= {"residuals": {}, "gguf": [], "conversion": None, "runtimes": {}}
    del manifest["measured"]["paired"]
    write(place, manifest=manifest)
    assert bake("report", "open", "--output", "report.html")[0] == 0
    page = Page(place / "report.html")
    assert {one["id"] for one in page.where("section")} == {
        "behaviour", "parity", "answers", "reproduce",
    }  # fmt: skip
    assert "opened" not in "".join(page.inside["td"])
    assert "Norms" not in page.text
    assert "Runtimes" not in page.text
    assert "converter" not in page.text


def test_a_bake_on_a_device_is_made_again_there(bake: Run, place: Path) -> None:
    manifest = copy.deepcopy(MANIFEST)
    manifest["versions"]["device"] = "auto (cuda)"
    write(place, manifest=manifest)
    assert bake("report", "open", "--output", "device.html")[0] == 0
    text = Page(place / "device.html").text
    assert "env BAKE_DEVICE=auto bake --recipe open.yaml" in text
    assert "device==" not in text


def test_hostile_text_is_text(bake: Run, place: Path) -> None:
    """From prompts, answers, names of sets, the recipe: no element, no handler, no address."""
    manifest = copy.deepcopy(MANIFEST)
    manifest["recipe"]["text"] = RECIPE + "# </pre>" + HOSTILE[:60]
    hostile = answer("target", prompt=HOSTILE, topic=HOSTILE, before=HOSTILE, after=HOSTILE)
    hostile["category_after"] = HOSTILE
    hostile["set"] = hostile["runtime"] = HOSTILE
    write(place, manifest=manifest, answers=[hostile], geometry=GEOMETRY)
    assert bake("report", "open", "--output", "r.html", "--geometry", "geometry.json")[0] == 0
    page = Page(place / "r.html")
    # The two names of figures are bold.
    assert [len(page.where(tag)) for tag in ("script", "img", "style", "b")] == [1, 0, 1, 2]
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        for name in ("src", "href", "xlink:href", "action", "formaction"):
            assert (attributes.get(name) or "#").startswith("#")
    policy = next(one["content"] for one in page.where("meta") if one.get("http-equiv") is not None)
    assert policy is not None
    for name in ("style", "script"):
        content = "".join(page.inside[name]).encode()
        digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert page.where("article")[0]["data-set"] == HOSTILE.replace("\ud800", "?")


def test_of_protected_prompts_only_verdicts_are_shown(bake: Run, place: Path) -> None:
    """Even where somebody wrote the answers into the file."""
    write(place)
    assert bake("report", "open", "--output", "report.html")[0] == 0
    text = Page(place / "report.html").text
    assert "about protected" in text
    assert "yes target" in text
    assert "yes protected" not in text
    assert "no protected" not in text


def test_many_answers_are_thinned_out_evenly(bake: Run, place: Path) -> None:
    """However much was said, the page is below 3 MiB, and says what it leaves out."""
    said = "<&>" * 400
    lines = [answer(role, before=said, after=said) for role in ROLES for _ in range(400)]
    write(place, answers=lines)
    assert bake("report", "open", "--output", "report.html")[0] == 0
    assert 1.5 * 2**20 < (place / "report.html").stat().st_size < 3 * 2**20
    page = Page(place / "report.html")
    shown = [one["data-set"] for one in page.where("article")]
    counts = [shown.count(role) for role in ROLES]
    assert max(counts) - min(counts) <= 1
    assert f"{1600 - len(shown)} of 1600 answers are left out" in " ".join(page.text.split())


def test_directions_of_a_fit_give_their_scores(bake: Run, place: Path) -> None:
    write(place)
    found = Directions(
        {layer: torch.ones(8) for layer in (1, 2, 3)},
        Origin("demo", "lda"),
        {layer: {"kl": layer / 8} for layer in (1, 2, 3)},
    )
    save_directions(found, place / "fit.safetensors")
    arguments = ("--selection", "fit.safetensors", "--figures", "figures")
    assert bake("report", "open", "--output", "report.html", *arguments)[0] == 0
    assert (place / "figures" / "scores-kl.svg").exists()
    assert "layer 3: 0.375" in (place / "report.html").read_text()


def _wrong(change: Callable[[dict[str, Any]], None], source: dict[str, Any]) -> dict[str, Any]:
    changed = copy.deepcopy(source)
    change(changed)
    return changed


@pytest.mark.parametrize(
    ("files", "arguments", "words"),
    [
        ({}, ["nothing"], ("nothing/bake.json", "give the folder of a bake")),
        (
            {"manifest": _wrong(lambda one: one.pop("guard"), MANIFEST)},
            ["open"],
            ("bake.json: guard: field required", "bake the recipe again"),
        ),
        (
            {
                "manifest": _wrong(
                    lambda one: one["measured"]["refusals"].update(before={}), MANIFEST
                )
            },
            ["open"],
            ("measured.refusals", "other runtimes or sets"),
        ),
        (
            {"answers": [{"runtime": 3}]},
            ["open"],
            ("answers.jsonl", "runtime", "bake the recipe again"),
        ),
        (
            {"geometry": _wrong(lambda one: one.update(model="other"), GEOMETRY)},
            ["open", "--geometry", "geometry.json"],
            ("geometry.json: model", "'other'", "a file of the same model"),
        ),
        (
            {"geometry": _wrong(lambda one: one["cosines"]["names"].pop(), GEOMETRY)},
            ["open", "--geometry", "geometry.json"],
            ("geometry.json: cosines: expected 3 rows", "run `bake geometry` again"),
        ),
        (
            {"geometry": _wrong(lambda one: one["trades"]["base"]["refused"].clear(), GEOMETRY)},
            ["open", "--geometry", "geometry.json"],
            ("geometry.json: trades", "other sets than the base"),
        ),
        ({}, ["open", "--geometry", "open/answers.jsonl"], ("answers.jsonl: not valid JSON",)),
        ({}, ["open", "--selection", "no.json"], ("no.json: cannot be read", "bake select")),
        (
            {"selection": GEOMETRY},
            ["open", "--selection", "selection.json"],
            ("selection.json: format", "run `bake select` again"),
        ),
        ({}, ["open", "--figures", "open/figures"], ("open/figures: lies in the baked folder",)),
    ],
)
def test_bad_input_is_one_line(
    bake: Run,
    place: Path,
    files: dict[str, object],
    arguments: list[str],
    words: tuple[str, ...],
) -> None:
    write(place, **files)
    before = sorted(place.rglob("*"))
    code, out, err = bake("report", *arguments, "--output", "report.html")
    assert (code, out, err.count("\n")) == (1, "", 1)
    for word in words:
        assert word in err
    assert sorted(place.rglob("*")) == before


def test_nothing_is_overwritten_silently(bake: Run, place: Path) -> None:
    write(place)
    (place / "report.html").write_text("mine")
    code, _, err = bake("report", "open", "--output", "report.html")
    assert (code, "exists already" in err) == (1, True)
    assert (place / "report.html").read_text() == "mine"
    assert bake("report", "open", "--output", "report.html", "--overwrite")[0] == 0
    code, _, err = bake("report", "open", "--output", "open/report.html")
    assert (code, "give another --output" in err) == (1, True)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 10))
def test_ticks_are_round_and_inside(low: float, width: float, count: int) -> None:
    high = low + width
    found = ticks(low, high, count)
    slack = 1e-6 * max(abs(low), abs(high), width)
    assert all(low - slack <= value <= high + slack for value, _ in found)
    assert len(found) <= count + 1
    assert len({words for _, words in found}) == len(found)


@given(st.text(), st.floats(-1e9, 1e9))
def test_a_figure_is_xml_whatever_its_words(words: str, value: float) -> None:
    figure = Figure(100, 50, words)
    figure.text(1, 2, words)
    figure.dot(Scale(0, 1, 0, 100)(value), 3, "before", tip=words)
    for text in (figure.inline(), figure.standalone(), figure.inline()):
        root = ElementTree.fromstring(text)
        (dot,) = root.iter("{http://www.w3.org/2000/svg}circle")
        assert 0 <= float(dot.get("cx", "-1")) <= 100
        assert not re.search("[\x00-\x08]", "".join(root.itertext()))
    assert (
        0
        <= float(root.iter("{http://www.w3.org/2000/svg}circle").__next__().get("cx", "-1"))
        <= 100
    )
