"""What a card takes from the base's, and what it says of a recipe."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from bake.base_card import BaseCard, base_card
from bake.card import Place, card, check_card
from bake.evidence import MOVED, Evidence
from bake.hub.secrets import CHUNK, holds_token
from bake.recipe import LoadedRecipe, load_recipe
from tests.test_report import MANIFEST

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB = ("model=org/base", "export.gguf=null", "evaluate.runtimes=[transformers]")
TOKEN = b"hf_" + b"A1" * 17


def written(folder: Path, front: str | None) -> Path:
    folder.mkdir(parents=True)
    if front is not None:
        (folder / "README.md").write_text(f"---\n{front}\n---\n# Base\n")
    return folder


@pytest.mark.parametrize(
    ("front", "ids", "name", "link", "forbids"),
    [
        (None, (), None, None, False),
        ("tags: [a]", (), None, None, False),
        ("license: unknown", (), None, None, False),
        ("license: [", (), None, None, False),
        ("- license", (), None, None, False),
        ("license: mit", ("mit",), None, None, False),
        ("license: [mit, apache-2.0]", ("mit", "apache-2.0"), None, None, False),
        ("license: cc-by-nd-4.0", ("cc-by-nd-4.0",), None, None, True),
        ("license: [mit, cc-by-nc-nd-3.0]", ("mit", "cc-by-nc-nd-3.0"), None, None, True),
        ("license: cc-by-nc-sa-4.0", ("cc-by-nc-sa-4.0",), None, None, False),
        (
            "license: other\nlicense_name: CC-BY-NC-ND of ours\nlicense_link: LICENSE",
            ("other",),
            "CC-BY-NC-ND of ours",
            "https://huggingface.co/org/base/blob/main/LICENSE",
            True,
        ),
        (
            "license: other\nlicense_name: band\nlicense_link: https://example.org/l",
            ("other",),
            "band",
            "https://example.org/l",
            False,
        ),
    ],
)
def test_the_licence_is_that_of_the_bases_card(
    tmp_path: Path, front: str | None, ids: tuple[str, ...], name: str, link: str, forbids: bool
) -> None:
    recipe = load_recipe("political-open", overrides=HUB).recipe
    found = base_card(recipe, written(tmp_path / "snapshots" / COMMIT, front))
    assert found == BaseCard("org/base", COMMIT, ids, name, link)
    assert found.forbids_derivatives is forbids


def test_the_demo_has_the_licence_and_the_name_of_what_it_was_made_of(tmp_path: Path) -> None:
    found = base_card(load_recipe("political-open").recipe, tmp_path)
    assert found == BaseCard("HuggingFaceTB/SmolLM2-135M-Instruct", license=("apache-2.0",))


def evidence(loaded: LoadedRecipe, **base: Any) -> Evidence:
    rates = {"target": {"refused": 1, "total": 4}, "protected": {"refused": 4, "total": 4}}
    before = {"target": {"refused": 3, "total": 4}, "protected": {"refused": 4, "total": 4}}
    content: dict[str, Any] = MANIFEST | {
        "name": loaded.recipe.name,
        "recipe": {"text": loaded.text, "source": loaded.source, "overrides": [*loaded.overrides]},
        "base": base,
        "measured": {
            "refusals": {"before": {"transformers": before}, "after": {"transformers": rates}},
            "parity": {
                name: {"lost_share": 0.1, "largest": 1.0, "largest_effect": 9.0, "positions": 5}
                for name in ("llama.cpp", MOVED)
            },
        },
        "runtimes": {"vllm": {"status": "by table", "version": "vLLM 0", "trust": ["a | b"]}},
        "conversion": {"type": "bf16", "outtype": "bf16", "apart": 0.004},
    }
    return Evidence.of(content, loaded, "bake.json")


def test_a_card_names_base_datasets_and_results() -> None:
    sets = f"prompts.target={{set: 'hub:org/questions', revision: {COMMIT}, split: hard}}"
    loaded = load_recipe("political-open", overrides=(*HUB, sets))
    known = {"hub_id": "org/base", "commit": COMMIT, "pipeline_tag": "image-text-to-text"}
    figures = [f"figures/{one}.svg" for one in ("refusals-transformers", "readings-layer-3")]
    text = card(evidence(loaded, **known, license=("mit",)), figures=figures)
    check_card(text)
    assert text.count("![") == 1
    assert "\n![refusals transformers](figures/refusals-transformers.svg)\n" in text
    data = ModelCard(text).data
    assert (data.base_model, data.base_model_relation) == ("org/base", "finetune")
    assert (data.license, data.pipeline_tag) == ("mit", "image-text-to-text")
    assert data.datasets == ["org/questions"]
    first, second = data.eval_results
    assert (first.dataset_type, first.dataset_revision) == ("org/questions", COMMIT)
    assert (first.dataset_split, first.metric_value) == ("hard", 25.0)
    assert first.metric_args == {"refused": 1, "total": 4, "before": 75.0}
    assert (second.dataset_type, second.dataset_split) == ("bake-harmful", "test")
    assert f"at commit `{COMMIT}`" in text
    # Wilson's bounds of 1 in 4 and of 4 in 4.
    assert "25.0 % (1/4), 5 to 70 %" in text
    assert "100.0 % (4/4), 51 to 100 %" in text
    assert "licence of the base is not known" not in text
    assert "| vllm | not run; by what is known of vLLM 0, a \\| b |" in text
    assert "made of the checkpoint by llama.cpp's own converter, in bf16 (" in text
    assert "quantised" not in text
    assert f"| {MOVED} | 1.0e-01 |" in text
    assert "the hooked model is the base GGUF with the edits in float32" in text


def test_a_card_names_every_set_of_a_role() -> None:
    hub = f"{{set: 'hub:org/questions', revision: {COMMIT}}}"
    apart = "{set: medical, fit_only: true}, {set: timely, select_only: true}"
    sets = f"prompts.target=[political, {hub}, {apart}]"
    loaded = load_recipe("political-open", overrides=(*HUB, sets))
    data = ModelCard(card(evidence(loaded))).data
    assert data.datasets == ["org/questions"]
    first = data.eval_results[0]
    assert first.dataset_type == "bake-political+org/questions"
    assert first.dataset_name == "political+org/questions, held-out topics"


def test_a_card_holds_whatever_a_recipe_says(tmp_path: Path) -> None:
    """Fences, marks of front matter, and a path that is nobody's business but the recipe's."""
    path = tmp_path / "mine.yaml"
    path.write_text(
        "# ````\ndescription: 'a: b | c'\nmodel: org/base\n"
        "prompts: {target: /home/somebody/mine.jsonl}\n"
        "evaluate: {runtimes: [transformers]}\nedits: [{op: add, layer: 1, strength: 2}]\n#---\n"
    )
    loaded = load_recipe(str(path))
    text = card(evidence(loaded), Place("me/mine", base_model=None))
    check_card(text)
    assert "`````yaml\n# ````\n" in text
    assert text.count("/home/somebody") == text.partition("## Recipe")[2].count("/home/somebody")
    assert "The licence of the base is not known to bake" in text
    assert ModelCard(text).data.eval_results[0].dataset_type == "bake-mine.jsonl"


def test_a_token_is_found_wherever_it_lies(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for place in (0, CHUNK - 5, CHUNK + 3):
        path.write_bytes(b" " * place + TOKEN + b" ")
        assert holds_token(path)
    path.write_bytes(b" " * CHUNK + b"hf_short hf_hub_download chf_" + TOKEN[3:])
    assert not holds_token(path)
    assert holds_token(path, ["hub_down"])
