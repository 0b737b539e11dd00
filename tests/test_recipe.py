"""Recipes: what is read, what is refused, and where each mistake is said to be."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

import bake.recipe
from bake.errors import RecipeError
from bake.prompts import builtin_sets
from bake.recipe import (
    Ablate,
    Add,
    Gate,
    GGUFExport,
    Kernel,
    PromptSource,
    Recipe,
    load_recipe,
    restore_recipe,
    shipped_recipes,
)
from bake.recipe.yaml import parse

GOOD = """\
# A recipe.
edits:
  - op: gate
    layers: 11-17
    strength: -5
export:
  gguf: {base: demo}
"""
# What a recipe without a GGUF must say, on one line: the tests below add to it.
PLAIN = "evaluate: {runtimes: [transformers]}\n"


def write(folder: Path, text: str | bytes, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def mistakes(folder: Path, text: str | bytes, **options: Any) -> list[str]:
    """The lines of the error, without the file's folder."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), **options)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


# --- what is read


def test_a_small_recipe_gets_every_default(tmp_path: Path) -> None:
    loaded = load_recipe(write(tmp_path, GOOD))
    recipe = loaded.recipe
    assert loaded.text == GOOD
    assert loaded.source == str(tmp_path / "mine.yaml")
    assert loaded.overrides == ()
    assert recipe.edits == (Gate(op="gate", layers=(11, 12, 13, 14, 15, 16, 17), strength=-5.0),)
    assert recipe.edits[0] == Gate(
        op="gate", layers=tuple(range(11, 18)), sites=("attention", "mlp"), strength=-5, ridge=0.01
    )
    assert (recipe.name, recipe.model, recipe.seed) == ("mine", "demo", 0)
    assert (recipe.output, recipe.folder) == (None, Path("mine"))
    assert recipe.prompts.target == PromptSource(set="political", language="en", limit=None)
    assert recipe.prompts.lookalike == PromptSource(set="lookalikes")
    assert recipe.fit.positions.template == 6
    assert recipe.fit.positions.answer == 10
    assert recipe.export.gguf == GGUFExport(base="demo", edited_type="auto")
    assert recipe.verify.lost_share == 1e-3
    assert (recipe.guard.protected_drop, recipe.guard.runtime_gap) == (2.0, 3.0)
    assert recipe.runtimes == ("transformers", "llama.cpp", "ollama")


def test_every_operator_is_read(tmp_path: Path) -> None:
    text = PLAIN + (
        "edits:\n"
        "- {op: add, layer: 15, site: mid, strength: -1.5, carrier: bias}\n"
        "- {op: ablate, layers: [9, 3, 9], strength: 0.5, embeddings: true}\n"
        "- {op: gate, layers: 4, sites: [mlp], strength: 2, ridge: 1e-3}\n"
    )
    assert load_recipe(write(tmp_path, text)).recipe.edits == (
        Add(op="add", layer=15, site="mid", strength=-1.5, carrier="bias"),
        Ablate(op="ablate", layers=(3, 9), strength=0.5, embeddings=True),
        Gate(op="gate", layers=(4,), sites=("mlp",), strength=2.0, ridge=1e-3),
    )


def test_every_variant_of_an_ablation_is_read(tmp_path: Path) -> None:
    text = PLAIN + (
        "edits:\n"
        "- {op: ablate, layers: 3, variant: norm-preserving}\n"
        "- {op: ablate, layers: 3, variant: projected, embeddings: true}\n"
        "- {op: ablate, layers: 3, variant: affine, strength: 0.5}\n"
        "- {op: ablate, layers: 3, variant: plain, kernel: {peak: 4, width: 2}}\n"
        "- {op: ablate, layers: 3, variant: [projected, norm-preserving]}\n"
    )
    assert load_recipe(write(tmp_path, text)).recipe.edits == (
        Ablate(op="ablate", layers=(3,), variant=("norm-preserving",)),
        Ablate(op="ablate", layers=(3,), variant=("projected",), embeddings=True),
        Ablate(op="ablate", layers=(3,), variant=("affine",), strength=0.5),
        Ablate(op="ablate", layers=(3,), kernel=Kernel(peak=4, width=2, edge=0.0)),
        Ablate(op="ablate", layers=(3,), variant=("projected", "norm-preserving")),
    )
    assert Ablate(op="ablate", layers=(3,)).variant == ("plain",)


@pytest.mark.parametrize(
    ("strength", "kernel", "expected"),
    [
        (0.5, None, {2: 0.5, 3: 0.5, 4: 0.5, 5: 0.5, 6: 0.5, 9: 0.5}),
        (0.0, None, {2: 0, 3: 0, 4: 0, 5: 0, 6: 0, 9: 0}),
        # At the edge's own distance nothing is left, so nothing is edited there.
        (1.0, Kernel(peak=4, width=2), {3: 0.5, 4: 1.0, 5: 0.5}),
        (1.0, Kernel(peak=4, width=2, edge=0.5), {2: 0.5, 3: 0.75, 4: 1.0, 5: 0.75, 6: 0.5}),
        # The peak need not be one of the layers, and the edge may be the higher end.
        (0.0, Kernel(peak=7, width=2, edge=1.0), {5: 1.0, 6: 0.5, 9: 1.0}),
        (1.0, Kernel(peak=4, width=2, edge=-1.0), {2: -1.0, 4: 1.0, 6: -1.0}),
    ],
)
def test_the_strength_of_every_layer(
    strength: float, kernel: Kernel | None, expected: dict[int, float]
) -> None:
    layers = (2, 3, 4, 5, 6, 9)
    spec = Ablate(op="ablate", layers=layers, strength=strength, kernel=kernel)
    assert spec.strengths == expected


def test_a_prompt_source_may_be_a_bare_string_or_keep_its_set(tmp_path: Path) -> None:
    text = GOOD + "prompts: {target: mine.jsonl, general: {limit: 40}, lookalike: null}\n"
    prompts = load_recipe(write(tmp_path, text)).recipe.prompts
    assert prompts.target == PromptSource(set="mine.jsonl")
    assert prompts.general == PromptSource(set="general", limit=40)
    assert prompts.lookalike is None


def test_a_role_may_have_several_sets(tmp_path: Path) -> None:
    text = GOOD + "prompts: {target: [mine.jsonl, {set: medical, limit: 3}]}\n"
    target = load_recipe(write(tmp_path, text)).recipe.prompts.target
    assert [(one.set, one.limit) for one in target.sets] == [("mine.jsonl", None), ("medical", 3)]


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ("[medical, harmful]", "prompts.protected: 'harmful' is already prompts.target"),
        ("[medical, medical]", "prompts.target.also.0: 'medical' is already prompts.target"),
        ("[medical, medicine]", "prompts.target.also.0.set: no built-in prompt set 'medicine'"),
        ("[]", "prompts.target: expected a mapping, found a list"),
        ("{set: medical, fit_only: true}", "prompts.target.fit_only: nothing would be left to"),
        ("{set: medical, select_only: true}", "prompts.target.select_only: nothing would be left"),
        (
            "[medical, {set: a.txt, fit_only: true, select_only: true}]",
            "prompts.target.also.0.select_only: contradicts fit_only",
        ),
    ],
)
def test_mistakes_in_several_sets(tmp_path: Path, sets: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(write(tmp_path, GOOD + f"prompts: {{target: {sets}}}\n"))


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4),
        ("-3", -3),
        ("0x10", 16),
        ("010", 10),
        (".5", 0.5),
        ("no", "no"),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("true", True),
        ("~", None),
        ("'1'", "1"),
        ("11-17", "11-17"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(written: str, value: object) -> None:
    read = parse(written).value
    assert (read, type(read)) == (value, type(value))


SCALARS = st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="ascii"))
VALUES = st.recursive(
    SCALARS | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc"), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_values_survive_being_written_and_read(value: object) -> None:
    document = parse(yaml.safe_dump(value, default_style='"') if isinstance(value, str) else
                     yaml.safe_dump(value))  # fmt: skip
    assert not document.problems
    assert document.value == value


@given(st.text())
def test_any_text_is_read_or_has_a_problem_with_a_place(text: str) -> None:
    document = parse(text)
    assert all(problem.line >= 1 and problem.column >= 1 for problem in document.problems)


def test_a_recipe_is_frozen() -> None:
    recipe = load_recipe("political-open").recipe
    with pytest.raises(ValidationError):
        recipe.seed = 3  # type: ignore[misc, unused-ignore]  # pydantic's mypy plugin knows


def test_a_recipe_survives_its_own_dump() -> None:
    recipe = load_recipe("political-open").recipe
    assert Recipe.model_validate(recipe.model_dump()) == recipe
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


# --- mistakes


def test_three_mistakes_give_three_lines_with_positions(tmp_path: Path) -> None:
    text = (
        "# Three mistakes.\n"
        "model: demo\n"
        "edits:\n"
        "  - op: gate\n"
        "    layers: 11-17\n"
        "    strength: -5\n"
        "    strenght: -5\n"
        "guard:\n"
        "  protected_drop: lots\n"
        "export:\n"
        "  gguf: {edited_type: q9_0}\n"
    )
    assert mistakes(tmp_path, text) == [
        "mine.yaml:7:5: edits.0.strenght: unknown key 'strenght'; did you mean 'strength'?",
        "mine.yaml:9:19: guard.protected_drop: expected a number, found text 'lots'",
        "mine.yaml:11:23: export.gguf.edited_type: expected auto, same, f32, f16, bf16, "
        "q8_0, q6_k, q5_k, q5_1, q5_0, q4_k, q4_1, q4_0, iq4_nl, iq4_xs, mxfp4, q3_k, iq3_s or "
        "q2_k, found text 'q9_0'; did you mean 'q8_0'?",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("", "1:1: the recipe is empty", id="empty"),
        pytest.param("# nothing\n", "1:1: the recipe is empty", id="comment"),
        pytest.param("\n- a\n", "2:1: expected keys and values, `key: value`", id="list"),
        pytest.param("text\n", "1:1: expected keys and values, `key: value`", id="text"),
        pytest.param(b"a: 1\nb: \xff\n", "2:4: this is not UTF-8 text", id="latin-1"),
        pytest.param(
            "seed: \x01\n", "1:7: the character U+0001 is not allowed in YAML", id="control"
        ),
        pytest.param("[" * 100_000, "1:1: nested too deeply", id="deep"),
        pytest.param(
            "seed: 1\n  name: x\n",
            "2:7: not valid YAML: mapping values are not allowed here",
            id="indent",
        ),
        pytest.param(
            "seed: 1\n---\nseed: 2\n",
            "2:1: not valid YAML: expected a single document in the stream, "
            "but found another document",
            id="two-documents",
        ),
    ],
)
def test_what_is_no_recipe_at_all(tmp_path: Path, text: str | bytes, expected: str) -> None:
    assert mistakes(tmp_path, text) == [f"mine.yaml:{expected}"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("seed: 1.5", "8:7: seed: expected a whole number, found 1.5"),
        ("seed: true", "8:7: seed: expected a whole number, found true"),
        ("seed: -1", "8:7: seed: expected at least 0, found -1"),
        ("seed: 9e99", "8:7: seed: expected a whole number, found 9e+99"),
        ("seed: 99999999999", "8:7: seed: expected at most 4294967295, found 99999999999"),
        ("seed: !!python/none x", "8:7: seed: the tag 'python/none' is not allowed"),
        ("model: ''", "8:8: model: expected text, found none"),
        ("model:", "8:7: model: expected text, found nothing (null)"),
        ("nmae: x", "8:1: nmae: unknown key 'nmae'; did you mean 'name'?"),
        ("1: x", "8:1: 1: unknown key '1'; the keys here are name, description, model, revision, "
         "trust_remote_code, output, seed, prompts, system_prompt, fit, directions, edits, export, "
         "judge, evaluate, verify, guard, search, runtimes"),
        ("? [a]\n: 1", "8:3: a key must be text"),
        ("export: {}", "8:1: export: duplicate key 'export'; the first is on line 6"),
        ("name: a/b", "8:7: name: a name has letters, digits, '_', '.' and '-' only, found 'a/b'"),
        ("fit: 3", "8:6: fit: expected a mapping, found 3"),
        ("fit: {ridge: 0}", "8:14: fit.ridge: expected more than 0, found 0"),
        ("fit: {ridge: .inf}", "8:14: fit.ridge: expected a finite number, found inf"),
        ("guard: {protected_drop: null}",
         "8:25: guard.protected_drop: expected a number, found nothing (null)"),
        ("guard: {protected_drop: 101}",
         "8:25: guard.protected_drop: expected at most 100, found 101"),
        ("guard: {target_at_most: 10, target_at_least: 20}",
         "8:46: guard.target_at_least: 20 is above target_at_most (10); no bake can meet both"),
        ("judge: {phrases: no comment}", "8:18: judge.phrases: expected a list, found text "
         "'no comment'"),
        ("runtimes: []", "8:11: runtimes: expected at least one item, found none"),
        ("runtimes: [vllm, vllm]", "8:11: runtimes: each may be named once"),
        ("runtimes: [vlm]", "8:12: runtimes.0: expected transformers, llama.cpp, ollama, vllm, "
         "sglang or mlx, found text 'vlm'; did you mean 'vllm'?"),
        ("prompts: {target: politcal}", "8:19: prompts.target.set: no built-in prompt set "
         "'politcal' (a file ends in .jsonl, .txt, .csv, .parquet); did you mean 'political'?"),
        ("prompts: {target: {language: English}}", "8:30: prompts.target.language: expected a "
         "language code like en or zh, or any, found 'English'"),
        ("prompts: {protected: null}",
         "8:22: prompts.protected: expected a mapping, found nothing (null)"),
        ("prompts: {lookalike: harmful}", "8:22: prompts.lookalike: 'harmful' is already "
         "prompts.protected; name another set (or null)"),
        ("prompts: {lookalike: null}\nfit: {contrast: lookalike}",
         "9:17: fit.contrast: prompts.lookalike is null; name a set there"),
        ("fit: {refused: refused}",
         "8:16: fit.refused: prompts.refused is null; name a set there"),
        ("fit: {refused: protected, contrast: protected}",
         "8:37: fit.contrast: fit.refused is protected too; compare it with another class"),
        ("fit: {refused: protected, protect: remove}",
         "8:36: fit.protect: fit.refused is protected; without itself nothing is left of it"),
        ("fit: {concepts: [medical]}",
         "8:17: fit.concepts: fit.protect is none; residual is what protects them"),
        ("fit: {estimator: logistics}",
         "8:18: fit.estimator: expected mean-difference, rmd, wrmd, lda, pca, logistic, safesteer, "
         "category, cosmic, low-rank-mix, som or cone, found text 'logistics'; "
         "did you mean 'logistic'?"),
        ("fit: {answers: {temperature: 0}}",
         "8:30: fit.answers.temperature: expected more than 0, found 0"),
        ("prompts: {target: 'hub:somebody'}",
         "8:19: prompts.target.set: a dataset of the Hub is hub:owner/name, found 'hub:somebody'"),
        ("prompts: {target: 'hub:a/b'}", "8:19: prompts.target.revision: a dataset of the Hub "
         "needs its commit, to stay as is"),
        ("prompts: {target: {set: 'hub:a/b', revision: main}}", "8:46: prompts.target.revision: "
         "expected the 40 digits of a commit, found 'main'; a branch or tag may move"),
        ("prompts: {target: {set: x.csv, split: test}}",
         "8:39: prompts.target.split: is of a Hub dataset, which 'x.csv' is not"),
        ("judge: {kind: chat, url: 'http://h/v1'}",
         "8:8: judge.model: judge.kind chat needs it; give one"),
        ("judge: {kind: local, model: m, key: K}",
         "8:37: judge.key: is of kind chat; judge.kind is local"),
        ("judge: {kind: chat, model: m, url: localhost}", "8:36: judge.url: expected a URL like "
         "http://localhost:8000/v1, found 'localhost'"),
        ("judge: {kind: chat, model: m, url: 'http://h:99999/'}", "8:36: judge.url: expected a "
         "URL like http://localhost:8000/v1, found 'http://h:99999/'"),
        ("judge: {kind: chat, model: m, url: 'http://h', key: sk-123-secret}", "8:53: judge.key: "
         "expected the name of an environment variable, as in OPENAI_API_KEY"),
    ],
)  # fmt: skip
def test_a_mistake_on_line_8(tmp_path: Path, line: str, expected: str) -> None:
    (found,) = mistakes(tmp_path, GOOD + line + "\n")
    assert found.startswith(f"mine.yaml:{expected}")


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        ("gate", "3:3: edits.0: expected a mapping, found text 'gate'"),
        ("{op: gat}", "3:8: edits.0.op: expected add, ablate or gate, found text 'gat'; "
         "did you mean 'gate'?"),
        ("{layers: 3}", "3:3: edits.0.op: this key is required: add, ablate or gate"),
        ("{op: 3}", "3:8: edits.0.op: expected add, ablate or gate, found 3"),
        ("{op: ablate}", "3:3: edits.0.layers: this key is required"),
        ("{op: ablate, layers: 17-11}",
         "3:24: edits.0.layers: a range rises and ends by 999, found '17-11'"),
        ("{op: ablate, layers: 0-999999999}",
         "3:24: edits.0.layers: a range rises and ends by 999, found '0-999999999'"),
        ("{op: ablate, layers: all}", "3:24: edits.0.layers: expected a list of layers or a range "
         'like "11-17", found \'all\''),
        ("{op: ablate, layers: []}",
         "3:24: edits.0.layers: expected at least one item, found none"),
        ("{op: ablate, layers: [1, x]}",
         "3:28: edits.0.layers.1: expected a whole number, found text 'x'"),
        ("{op: ablate, layers: -1}", "3:24: edits.0.layers.0: expected at least 0, found -1"),
        ("{op: ablate, layers: 3, variant: projeted}",
         "3:36: edits.0.variant.0: expected plain, norm-preserving, projected or affine, "
         "found text 'projeted'; did you mean 'projected'?"),
        ("{op: ablate, layers: 3, variant: [affine, projected]}",
         "3:36: edits.0.variant: projected makes the direction orthogonal to the mean, so affine "
         "has nothing of it to put back; leave one out"),
        ("{op: ablate, layers: 3, variant: [plain, affine]}",
         "3:36: edits.0.variant: plain is without the others; leave it out"),
        ("{op: ablate, layers: 3, variant: [affine, affine]}",
         "3:36: edits.0.variant: each may be named once"),
        ("{op: ablate, layers: 3, kernel: 4}",
         "3:35: edits.0.kernel: expected a mapping, found 4"),
        ("{op: ablate, layers: 3, kernel: {peak: 3}}",
         "3:35: edits.0.kernel.width: this key is required"),
        ("{op: ablate, layers: 3, kernel: {peak: 3, width: 0}}",
         "3:52: edits.0.kernel.width: expected at least 1, found 0"),
        ("{op: ablate, layers: 3, kernel: {peak: 3, width: 2, egde: 1}}",
         "3:55: edits.0.kernel.egde: unknown key 'egde'; did you mean 'edge'?"),
        ("{op: ablate, layers: 3, kernel: {peak: 5, width: 2}}",
         "3:35: edits.0.kernel: no strength is left for any of the layers; move the peak or widen "
         "it"),
        ("{op: ablate, layers: 3, variant: affine, kernel: {peak: 3, width: 2}}",
         "3:52: edits.0.kernel: variant: affine puts one constant back, for one strength; leave "
         "this out"),
        ("{op: ablate, layers: 3, embeddings: true, kernel: {peak: 3, width: 2}}",
         "3:39: edits.0.embeddings: the embedding is no block, so the kernel has no strength for "
         "it; set false"),
        ("{op: gate, layers: 3, strength: 1, positions: {templat: 1}}",
         "3:50: edits.0.positions.templat: unknown key 'templat'; did you mean 'template'?"),
        ("{op: gate, layers: 3, strength: 1, positions: {template: 0}}",
         "3:60: edits.0.positions.template: expected at least 1, found 0"),
        ("{op: gate, layers: 3, strength: 1, positions: {direction: -2}}",
         "3:50: edits.0.positions.direction: unknown key 'direction'; the keys here are template, "
         "answer, question"),
        ("{op: gate, form: block, layers: 3, strength: 1, positions: {question: shut}}",
         "3:73: edits.0.positions.question: is of form: rank_one, and form is block; leave it out"),
        ("{op: gate, form: block, layers: 3, strength: 1, null_space: 0.5}",
         "3:63: edits.0.null_space: is of form: rank_one, and form is block; leave it out"),
        ("{op: gate, layers: 3, strength: 1, null_space: 1}",
         "3:50: edits.0.null_space: expected less than 1, found 1"),
        ("{op: gate, layers: 3, strength: 1, probes: f, null_space: 0.5}",
         "3:61: edits.0.null_space: the probes are those of a file, and none is fitted; leave one "
         "out"),
        ("{op: gate, layers: 3, strength: 1, probes: f, positions: {template: 1}}",
         "3:60: edits.0.positions: the probes are those of a file, and none is fitted; leave one "
         "out"),
        ("{op: add, layer: 1, strength: 1, positions: {template: 1}}",
         "3:36: edits.0.positions: unknown key 'positions'; the keys here are op, layer, site, "
         "strength, carrier, ridge, constant_error"),
        ("{op: add, layer: 1, strength: '3'}",
         "3:33: edits.0.strength: expected a number, found text '3'"),
    ],
)  # fmt: skip
def test_a_mistake_in_an_edit(tmp_path: Path, edit: str, expected: str) -> None:
    assert mistakes(tmp_path, f"{PLAIN}edits:\n- {edit}\n") == [f"mine.yaml:{expected}"]


def test_no_edits_and_no_exports(tmp_path: Path) -> None:
    assert mistakes(tmp_path, "edits: []\n") == [
        "mine.yaml:1:8: edits: expected at least one item, found none"
    ]
    text = "edits: [{op: ablate, layers: 3}]\nexport: {safetensors: false}\n"
    assert mistakes(tmp_path, text) == [
        "mine.yaml:1:1: evaluate.runtimes: llama.cpp answers from a GGUF and none is made; "
        "set export.gguf, or evaluate.runtimes to [transformers]",
        "mine.yaml:2:9: export: nothing is exported; set safetensors: true or give a gguf",
    ]


@pytest.mark.parametrize(
    ("edit", "export", "expected"),
    [
        (
            "{op: ablate, layers: 3}",
            "{adapters: [gguf]}",
            "adapters: a LoRA for llama.cpp is of a GGUF; give it as export.gguf.base",
        ),
        (
            "{op: ablate, layers: 3, variant: norm-preserving}",
            "{adapters: [peft]}",
            "adapters: a norm-preserving ablation is of full rank, and a LoRA is not; "
            "leave one out",
        ),
        *(
            (
                edit,
                "{control_vector: true}",
                "control_vector: llama.cpp adds it after blocks from 1 on; leave it out, or use "
                "add, site: out",
            )
            for edit in (
                "{op: ablate, layers: 3}",
                "{op: add, layer: 0, strength: 1}",
                "{op: add, layer: 3, strength: 1, site: mid}",
            )
        ),
    ],
)
def test_what_stands_beside_a_base_has_bounds(
    tmp_path: Path, edit: str, export: str, expected: str
) -> None:
    text = f"{PLAIN}edits: [{edit}]\nexport: {export}\n"
    (found,) = mistakes(tmp_path, text)
    assert found.endswith(f": export.{expected}")


def test_an_alias_in_itself(tmp_path: Path) -> None:
    assert mistakes(tmp_path, GOOD + "judge: {phrases: &a [*a]}\n") == [
        "mine.yaml:8:18: judge.phrases.0: an alias may not contain itself",
    ]


def test_nested_aliases_cost_nothing(tmp_path: Path) -> None:
    laughs = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40)]
    text = "\n".join(["a0: &a0 [x]", *laughs])
    assert all("unknown key" in line for line in mistakes(tmp_path, GOOD + text))


def test_a_file_that_cannot_be_found(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no such file.*did you mean 'political-open'"):
        load_recipe("political-opn.yaml")
    with pytest.raises(RecipeError, match="this is a folder"):
        load_recipe(str(tmp_path))
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe("a" * 5000)


# --- overrides


def test_overrides_win_over_the_file_and_options_over_them(tmp_path: Path) -> None:
    overrides = (
        "edits.0.strength=-3",
        "edits.0.strength=-4",
        "edits.0.layers=[2, 1]",
        "prompts.target.limit=5",
        "export.gguf=null",
        "evaluate.runtimes=[transformers]",
        "model=other",
    )
    text = GOOD + "prompts: {target: medical}\n"
    loaded = load_recipe(write(tmp_path, text), overrides=overrides, model="m", output="o/p")
    recipe = loaded.recipe
    assert recipe.edits == (Gate(op="gate", layers=(1, 2), strength=-4.0),)
    assert recipe.prompts.target == PromptSource(set="medical", limit=5)
    assert recipe.export.gguf is None
    assert (recipe.model, recipe.output, recipe.folder) == ("m", "o/p", Path("o/p"))
    assert loaded.text == text
    # Where the result goes is no change of the recipe.
    assert loaded.overrides == (*(f"--set {o}" for o in overrides), "--model m")


def test_overrides_are_reported_by_their_names(tmp_path: Path) -> None:
    overrides = (
        "edits.0.strnegth=-3",
        "edits.1.op=add",
        "foo",
        "=3",
        "fit.ridge=[",
        "ft.ridge=1",
        "seed=x",
        "guard={protected_drop: x}",
        "name.x=3",
    )
    found = mistakes(tmp_path, GOOD + "verify: 3\n", overrides=overrides, model="")
    assert found[0] == "mine.yaml:8:9: verify: expected a mapping, found 3"
    assert sorted(found[1:]) == sorted(
        [
            "--set edits.0.strnegth: unknown key 'strnegth'; did you mean 'strength'?",
            "--set edits.1.op: no item '1' in edits; the last is 0",
            "--set foo: expected key.path=value",
            "--set =3: expected key.path=value",
            "--set fit.ridge: not valid YAML: while parsing a flow node, "
            "expected the node content, but found '<stream end>'",
            "--set ft.ridge: unknown key 'ft'; did you mean 'fit'?",
            "--set seed: expected a whole number, found text 'x'",
            "--set guard.protected_drop: expected a number, found text 'x'",
            "--set name.x: name holds no further keys",
            "--model: expected text, found none",
        ]
    )


def test_a_loaded_recipe_is_restored_from_its_record(tmp_path: Path) -> None:
    overrides = ("edits.0.strength=-3", "description=a=b --set c", "fit.ridge= 1e-3")
    loaded = load_recipe(write(tmp_path, GOOD), overrides=overrides, model="a b=c", output="o")
    again = restore_recipe(loaded.text, loaded.source, loaded.overrides, "plan.json", "o")
    assert again == loaded
    assert again.recipe.name == "mine"
    elsewhere = restore_recipe(loaded.text, loaded.source, loaded.overrides, "plan.json")
    assert elsewhere.recipe.output is None


def test_a_record_of_a_recipe_that_cannot_be_restored() -> None:
    for override in ("--output x", "edits.0.strength=3", "-set a=b", ""):
        with pytest.raises(RecipeError, match=r"plan\.json: overrides: expected --set or --model"):
            restore_recipe(GOOD, "mine.yaml", [override], "plan.json")
    with pytest.raises(RecipeError, match=r"^plan\.json: mine\.yaml:8:1: sed: unknown key"):
        restore_recipe(GOOD + "sed: 3\n", "mine.yaml", [], "plan.json")
    with pytest.raises(RecipeError, match=r"--set edits\.0\.strength: expected a number"):
        restore_recipe(GOOD, "mine.yaml", ["--set edits.0.strength=x"], "plan.json")


def test_given_directions_ask_nothing_of_the_classes_that_make_one(tmp_path: Path) -> None:
    text = GOOD + "prompts: {lookalike: null}\nfit: {contrast: lookalike}\n"
    assert len(mistakes(tmp_path, text)) == 1
    recipe = load_recipe(write(tmp_path, text + "directions: d.npy\n")).recipe
    assert recipe.directions == "d.npy"
    assert mistakes(tmp_path, GOOD + "directions: ''\n") == [
        "mine.yaml:8:13: directions: expected text, found none"
    ]


def test_an_override_reaches_one_of_two_aliases(tmp_path: Path) -> None:
    text = PLAIN + "edits: [&e {op: ablate, layers: 3}, *e]\n"
    recipe = load_recipe(write(tmp_path, text), overrides=["edits.1.layers=4"]).recipe
    assert [edit.layers for edit in recipe.edits if isinstance(edit, Ablate)] == [(3,), (4,)]


@given(st.sampled_from(["edits.0.strength", "fit.ridge", "guard.general_rise"]), st.floats(0.1, 99))
def test_an_override_equals_the_same_value_in_the_file(key: str, value: float) -> None:
    recipe = load_recipe("political-open", overrides=[f"{key}={value!r}"]).recipe
    found: Any = recipe
    for step in key.split("."):
        found = found[int(step)] if step.isdecimal() else getattr(found, step)
    assert found == value


# --- shipped recipes


def test_the_shipped_recipes() -> None:
    assert [recipe.name for recipe in shipped_recipes()] == [
        "fewer-overrefusals",
        "political-open-block",
        "political-open",
        "refuse-topic-block",
        "refuse-topic",
    ]


@pytest.mark.parametrize("shipped", shipped_recipes(), ids=lambda recipe: recipe.name)
def test_a_shipped_recipe_loads(shipped: Any, tmp_path: Path, monkeypatch: Any) -> None:
    # From any folder, also one where bake's own output has the recipe's name.
    monkeypatch.chdir(tmp_path)
    (tmp_path / shipped.name).mkdir()
    by_name = load_recipe(shipped.name)
    assert by_name == load_recipe(f"{shipped.name}.yaml")
    assert by_name.recipe == load_recipe(str(shipped.path)).recipe
    assert by_name.source == f"{shipped.name}.yaml"
    assert by_name.recipe.name == shipped.name
    assert by_name.recipe.model == "demo"
    assert by_name.recipe.guard.protected_drop <= 2
    assert shipped.description.endswith(".")
    roles = by_name.recipe.prompts
    for source in (roles.target, roles.protected, roles.lookalike, roles.general, roles.text):
        assert source is None or source.set in builtin_sets()


def test_a_file_that_exists_wins_over_a_shipped_name(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, GOOD + "seed: 7\n", "political-open.yaml")
    assert load_recipe("political-open.yaml").recipe.seed == 7
    assert load_recipe("political-open").recipe.seed == 0


# --- the schema itself


def test_every_field_has_a_description_and_every_name_exists() -> None:
    assert all(hasattr(bake.recipe, name) for name in bake.recipe.__all__)
    sections = [getattr(bake.recipe, name) for name in bake.recipe.__all__]
    for section in sections:
        if isinstance(section, type) and issubclass(section, BaseModel):
            assert section.__doc__
            assert all(field.description for field in section.model_fields.values()), section
