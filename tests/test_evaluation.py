"""`bake eval` through its runtimes, on tiny models: folders, GGUFs, servers, hooks."""

import json
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from bake.archs import find_arch
from bake.card import check_card
from bake.card.evaluation import evaluation_section
from bake.checkpoint import Checkpoint
from bake.demo import Demo
from bake.directions import Directions, save_directions
from bake.edits import RemoveSubspace
from bake.errors import GuardError
from bake.evaluate import with_verdicts
from bake.evaluation.answers import answered
from bake.evaluation.quality import INSTRUCTION as QUALITY
from bake.evaluation.subject import Manner
from bake.evidence import Beside
from bake.evidence.evaluation import Evaluation
from bake.evidence.reading import parsed
from bake.export.gguf import patch
from bake.gguf_file import GGUFFile
from bake.hub import prepare_push
from bake.judge.cache import Replies
from bake.judge.keyword import KeywordJudge
from bake.llama import LlamaModel
from bake.model import LiveModel
from bake.pipeline import bake as bake_recipe
from bake.recipe import load_recipe
from tests.chat_server import Serve, reply
from tests.conftest import Run
from tests.test_report import GEOMETRY
from tests.through_disk import opened
from tests.tiny import TEMPLATE, write_place, write_tokenizer
from tests.tiny_gguf import write_tiny_gguf

ROLES = ("target", "protected", "general", "passages")
RECIPE = """\
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
export: {gguf: {base: base.gguf, edited_type: f32}}
judge: {phrases: [w1, w2, w3]}
verify: {prompts: 2}
evaluate: {runtimes: [transformers], answer_tokens: 3, limit: 3}
guard: {protected_drop: 100, general_rise: 100}
"""
OTHERS = ("--recipe", "recipe.yaml")
ASKED = ("--tokens", "12", "--limit", "4")
Eval = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its GGUF, a recipe, and in `out` the bake of it."""
    folder = write_place(tmp_path_factory.mktemp("place"), RECIPE, ROLES)
    (folder / "facts.jsonl").write_text(
        "".join(
            f'{{"text": "fact {n}", "answers": ["w{n}"], "language": "{language}"}}\n'
            for n, language in enumerate(["en", "de"] * 3)
        )
    )
    base, arch, _ = opened(folder / "model")
    write_tiny_gguf(base, arch, folder / "base.gguf")
    vectors = {1: torch.randn(32, generator=torch.Generator().manual_seed(1))}
    save_directions(Directions(vectors), folder / "vector.safetensors")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        bake_recipe(load_recipe("recipe.yaml", output="out"))
    return folder


@pytest.fixture
def evaluate(
    bake: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Eval]:
    """`bake eval` in the place, with a cache of the test's own; returns its JSON after stdout."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("BAKE_CACHE", str(tmp_path / "cache"))

    def run(*arguments: str) -> tuple[int, str, str]:
        return bake("eval", *arguments)

    yield run


def written(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def live(folder: Path) -> LiveModel:
    base = Checkpoint.open(folder)
    return LiveModel.load(folder, find_arch(base.config, "config.json", base.tensors))


def counts(found: dict[str, Any], when: str) -> dict[str, tuple[int, int]]:
    return {
        one["set"]: (one[when]["refusals"]["refused"], one[when]["refusals"]["total"])
        for one in found["sets"]
        if not one["language"]
    }


def test_a_baked_folder_beside_its_base(
    evaluate: Eval, place: Path, tmp_path: Path, bake: Run
) -> None:
    output = tmp_path / "found.json"
    code, said, err = evaluate(
        *("out", *ASKED, "--sets", "target,protected,general,facts.jsonl", "--output", str(output))
    )
    assert code == 0, err
    found = written(output)
    assert list(counts(found, "after")) == ["target", "protected", "general", "facts.jsonl"]
    # What it says is what the models say, asked one by one.
    manifest = written(place / "out" / "bake.json")
    for when, folder in (("before", "model"), ("after", "out")):
        model = live(place / folder)
        for line in found["answers"]:
            start = model.render(line["prompt"])
            text = model.text(model.answer([start], 12)[0])
            refused = KeywordJudge(("w1", "w2", "w3")).refuses(line["prompt"], text)
            assert line[f"refused_{when}"] == refused
            if line["set"] == "protected":
                assert not {"before", "after"} & line.keys()
            else:
                assert line[when] == text
    assert 0 < sum(one for one, _ in counts(found, "after").values()) < 18
    # The edit moves the model, along the base's answers and on text.
    assert found["divergence"]["answers"] > 1e-3
    assert found["divergence"]["prompts"] == 4
    assert found["perplexity"]["before"] != found["perplexity"]["after"]
    assert [one["language"] for one in found["sets"][-2:]] == ["en", "de"]
    facts = found["facts"][0]["after"]
    assert facts["right"] + facts["wrong"] + facts["refused"] == 6 == len(found["answers"][12:])
    # The proof: fingerprints of the manifest, and no hash in common.
    proof = found["disjoint"]
    assert proof["by_manifest"]
    assert proof["seen"]["target, fit"]["fingerprint"] == manifest["prompts"]["target"]["fit"]
    seen = {one for part in proof["seen"].values() for one in part["prompts"]}
    assert seen.isdisjoint(one for part in proof["asked"].values() for one in part["prompts"])
    assert "disjoint: none of 18 prompts" in said
    # And the report shows it, of this folder and of no other.
    page = tmp_path / "report.html"
    code, _, err = bake("report", "out", "--evaluation", str(output), "--output", str(page))
    assert code == 0, err
    assert '<section id="evaluation">' in page.read_text()
    # A push publishes both, with a card that has their figures.
    mapped = tmp_path / "map.json"
    mapped.write_text(json.dumps({**GEOMETRY, "model": "model"}))
    made = prepare_push(
        place / "out", "me/out", licence="mit", beside=Beside(geometry=mapped, evaluation=output)
    ).repositories[0]
    text = made.files["README.md"]
    assert isinstance(text, bytes)
    check_card(text.decode())
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text.decode())
    assert {"evidence/figures/trades-target.svg", "evidence/figures/cosines-map.svg"} < set(
        pictures
    )
    assert {*pictures, "evidence/report.html", "evidence/geometry.json"} < made.files.keys()
    assert made.files["evidence/evaluation.json"] == output.read_bytes()
    stated = {
        one.metric_type: one
        for one in ModelCard(text.decode()).data.eval_results
        if one.task_name == "Evaluation, facts.jsonl"
    }
    share = 100 * facts["right"] / 6
    assert stated["accuracy"].metric_value == pytest.approx(share, abs=0.01)
    refused, total = counts(found, "after")["facts.jsonl"]
    assert stated["refusal-rate"].metric_args["refused"] == refused
    assert f"({refused}/{total})" in text.decode().partition("## Evaluated")[2]
    output.write_text(json.dumps({**found, "bake": "0" * 64}))
    code, _, err = bake("report", "out", "--evaluation", str(output), "--output", f"{page}2")
    assert (code, "bake: is of another folder than out" in err) == (1, True)


def test_a_language_model_judges_what_is_wrong_with_the_answers(
    evaluate: Eval, serve: Serve, tmp_path: Path
) -> None:
    def judge(number: int, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        system, user = (one["content"] for one in body["messages"])
        if system != QUALITY:
            refused = user.count("w") % 2
            return reply(f"verdict: {'REFUSED' if refused else 'ANSWERED'}\ncategory: lecture")
        return reply("content: yes\nlogic: no\nappropriateness: no")

    output = tmp_path / "found.json"
    chosen = f"judge={{kind: chat, url: '{serve(judge).url}', model: m}}"
    asked = ("--set", chosen, "--sets", "target,general", "--output", str(output))
    code, said, err = evaluate("out", *ASKED, *asked)
    assert code == 0, err
    found = written(output)
    assert [one["set"] for one in found["quality"]] == ["target"]
    for when in ("before", "after"):
        refused, total = counts(found, when)["target"]
        quality = found["quality"][0][when]
        assert (quality["read"], quality["unread"], quality["sound"]) == (total - refused, 0, 0)
        assert quality["errors"]["content"] == total - refused
    assert "errors in what is answered" in said
    assert "not measured" not in said
    card = "\n".join(evaluation_section(parsed(Evaluation, found, output)))
    assert "| answers with an error of |  | content | logic | appropriateness | none |" in card
    row = " | ".join(f"{count} of {total - refused}" for count in (total - refused, 0, 0, 0))
    assert f"| target | after | {row} |" in card


def test_what_was_answered_is_not_asked_again(evaluate: Eval, tmp_path: Path) -> None:
    first = evaluate("out", *ASKED)
    assert "answers, model ..." in first[2]
    again = evaluate("out", *ASKED)
    assert (again[0], again[1]) == (0, first[1])
    assert "answers, " not in again[2]
    assert "answers, model ..." in evaluate("out", *ASKED, "--fresh")[2]
    # Another length is another question.
    assert "answers, model ..." in evaluate("out", "--tokens", "11", "--limit", "4")[2]


def test_hooks_before_a_bake_are_the_folder_after_it(evaluate: Eval, tmp_path: Path) -> None:
    before, after = tmp_path / "hooks.json", tmp_path / "folder.json"
    assert evaluate("--recipe", "recipe.yaml", *ASKED, "--output", str(before))[0] == 0
    assert evaluate("out", *ASKED, "--output", str(after))[0] == 0
    one, other = written(before), written(after)
    assert (one["model"]["runtime"], other["model"]["runtime"]) == ("hooks", "transformers")
    assert one["answers"] == other["answers"]
    for name in ("first_token", "answers"):
        assert one["divergence"][name] == pytest.approx(other["divergence"][name], rel=1e-3)
    assert one["perplexity"]["after"] == pytest.approx(other["perplexity"]["after"], rel=1e-4)


@pytest.mark.slow
def test_a_gguf_beside_another(evaluate: Eval, demo: Demo, tmp_path: Path) -> None:
    """The demo's, and the same with an edit: both say what llama.cpp says to what it renders."""
    gguf, edited, output = GGUFFile.open(demo.gguf), tmp_path / "mine.gguf", tmp_path / "x.json"
    name = "blk.20.ffn_down.weight"
    column = torch.randn(576, generator=torch.Generator().manual_seed(2))
    edits = {name: [RemoveSubspace(name, column[:, None] / column.norm(), 2.0)]}
    patch(gguf, edits, edited, edited_type=GGMLQuantizationType.F16)
    asked = ("--sets", "general", "--limit", "1", "--tokens", "6")
    files = ("--base", str(demo.gguf), "--model", str(edited), *asked, "--output", str(output))
    code, said, err = evaluate(*files)
    assert code == 0, err
    found = written(output)
    assert found["model"]["runtime"] == "llama.cpp"
    (line,) = found["answers"]
    with LlamaModel(edited, context=128, parallel=8, threads=2) as model:
        start = model.render([("user", line["prompt"])])
        assert line["after"] == model.detokenize(model.generate([start], 6)[0])
    assert 0 < found["divergence"]["answers"] < 1
    assert found["perplexity"]["rise"] != 0
    assert "(the recipe's sets)" in said
    code, _, err = evaluate("out", "--runtime", "llama.cpp", *ASKED)
    assert (code, "has no vocabulary; give a GGUF of a chat model" in err) == (1, True)


def test_a_server_is_asked_and_gives_no_logits(
    evaluate: Eval, serve: Serve, tmp_path: Path
) -> None:
    def by_model(number: int, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        assert body["max_tokens"] == 12
        assert body["chat_template_kwargs"] == {"enable_thinking": False}
        return reply("w1 no" if body["model"] == "strict" else "<think>w1</think>w5 yes")

    output, script = tmp_path / "found.json", serve(by_model)
    asked = ("--server", script.url, "--model", "open", "--base", "strict", "--recipe")
    arguments = (*asked, "recipe.yaml", *ASKED, "--thinking", "off", "--output", str(output))
    code, said, err = evaluate(*arguments)
    assert code == 0, err
    found = written(output)
    assert counts(found, "before")["target"] == (4, 4)
    assert counts(found, "after")["target"] == (0, 4)
    assert found["sets"][0]["paired"] == {"opened": 4, "closed": 0, "p": 0.125}
    assert found["sets"][0]["thinking"] is False
    assert "not measured: divergence and perplexity: a server gives no logits" in said
    asked_before = len(script.asked)
    assert evaluate(*arguments, "--overwrite")[0] == 0
    assert len(script.asked) == asked_before
    assert evaluate(*arguments, "--overwrite", "--fresh")[0] == 0
    assert len(script.asked) == 2 * asked_before


def test_a_server_that_is_down_or_refuses(
    evaluate: Eval, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(number: int, body: object) -> tuple[int, dict[str, str], bytes]:
        return 400, {}, b'{"error": "too long"}'

    recipe = ("--recipe", "recipe.yaml", "--sets", "general", *ASKED)
    url = serve(refusing).url
    code, _, err = evaluate("--server", url, "--model", "m", *recipe)
    assert code == 1
    assert f"--server: {url}: does not take the prompt" in err
    code, _, err = evaluate("--server", url, "--model", "m", "--key", "NO_SUCH_KEY", *recipe)
    assert (code, "--key: the environment variable NO_SUCH_KEY is not set" in err) == (1, True)


def test_thinking_needs_a_template_that_has_a_switch(
    evaluate: Eval, place: Path, tmp_path: Path
) -> None:
    code, _, err = evaluate("out", *ASKED, "--thinking", "on")
    assert code == 1
    assert "out: its chat template has no enable_thinking" in err or "model: its chat" in err


def test_thinking_on_and_off_are_asked_apart(evaluate: Eval, place: Path, tmp_path: Path) -> None:
    """A template with the switch: what it renders goes to the model."""
    import shutil

    folder = tmp_path / "thinks"
    shutil.copytree(place / "model", folder)
    switched = TEMPLATE.replace("assistant ", "assistant {% if enable_thinking %}w8 {% endif %}")
    write_tokenizer(folder, switched)
    output = tmp_path / "found.json"
    both = ("--thinking", "on", "--thinking", "off", "--sets", "general")
    code, said, err = evaluate(
        *("--base", "model", "--model", str(folder), "--recipe", "recipe.yaml", *both[4:], *ASKED)
    )
    assert code == 0, err
    assert "the two have other chat templates" not in said
    code, said, err = evaluate(
        *("--base", str(folder), "--model", str(folder), "--recipe", "recipe.yaml", *both, *ASKED),
        *("--output", str(output)),
    )
    assert code == 0, err
    assert "general, thinking " in said
    assert "general, not thinking " in said
    assert written(output)["divergence"]["answers"] == 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = live(folder)
    prompt = written(output)["answers"][0]
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt["prompt"]}],
        add_generation_prompt=True, enable_thinking=True, return_dict=False,
    )  # fmt: skip
    assert prompt["after"] == model.text(model.answer([ids], 12)[0])


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "a baked folder, --model or --recipe is missing"),
        (("out", "--model", "model"), 2, "give a baked folder, or --model"),
        (("--server", "http://x/v1"), 2, "a baked folder, --model or --recipe is missing"),
        (("--server", "ftp://x", "--model", "m"), 2, "--server: "),
        (("--server", "http://me:secret@x/v1", "--model", "m"), 2, "has a name or a password"),
        (("out", "--key", "KEY"), 2, "--key is of a --server"),
        (("out", "--task-limit", "3"), 2, "--task-limit and --task-path are of --tasks"),
        (("model",), 1, "model/bake.json: no such file; give the folder of a bake, or --model"),
        ((*OTHERS, "--model", "none", "--base", "model"), 1, "model: none: no such folder"),
        (
            (*OTHERS, "--model", "base.gguf", "--base", "base.gguf", "--runtime", "transformers"),
            1,
            "base.gguf: transformers reads folders",
        ),
        (("out", "--sets", "targets"), 1, "--sets targets: no role of the recipe and no built-in"),
        (("out", "--base", "out"), 1, "model.safetensors: is not the file that was baked"),
        (("out", "--recipe", "recipe.yaml"), 1, "--recipe: out has its own in bake.json"),
        (("out", "--output", "recipe.yaml"), 1, "recipe.yaml: exists already"),
        (
            ("out", "--set", "judge={kind: local, model: model, tokens: 4}"),
            1,
            "verdicts could not be read",
        ),
        (
            ("out", "--set", "prompts.target=facts.jsonl"),
            1,
            "out/bake.json: prompts.target.fit: the set is not what it was",
        ),
    ],
)
def test_bad_input_is_one_line(
    evaluate: Eval, arguments: tuple[str, ...], code: int, said: str
) -> None:
    found, out, err = evaluate(*arguments, *(ASKED if arguments else ()))
    assert found == code
    assert said in err
    assert "secret" not in err
    assert out == ""


class Counting:
    """A subject that fails after some answers."""

    name = runtime = "counting"

    def __init__(self, identity: str, fails_at: int = 1000) -> None:
        self.identity, self.asked, self._fails_at = identity, 0, fails_at

    def answers(self, prompts: Any, manner: Manner, update: Any) -> list[str]:
        if self.asked >= self._fails_at:
            raise KeyboardInterrupt
        self.asked += len(prompts)
        return [f"answer to {one}" for one in prompts]


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    prompts = [f"question {n}" for n in range(150)] * 2
    cache = Replies(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        answered(Counting("one", fails_at=64), prompts, Manner(), cache)
    rest = Counting("one")
    found = answered(rest, prompts, Manner(), cache)
    assert rest.asked == 150 - 64
    assert found == {one: f"answer to {one}" for one in prompts}
    # Another model, or another way to ask, is asked all of it.
    for subject, manner in (("two", Manner()), ("one", Manner(thinking=True))):
        other = Counting(subject)
        answered(other, prompts, manner, cache)
        assert other.asked == 150
    assert not with_verdicts((), (), KeywordJudge())


# --- a guard that broke


def test_a_broken_guard_leaves_its_evidence_and_is_not_pushed(
    place: Path, tmp_path: Path, bake: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    out = tmp_path / "out"
    limits = ("guard.divergence_at_most=1e-6", "guard.perplexity_rise_at_most=0")
    loaded = load_recipe("recipe.yaml", overrides=limits, output=str(out))
    with pytest.raises(GuardError, match="answers to general prompts begin") as caught:
        bake_recipe(loaded)
    assert str(caught.value).endswith(f"nothing is baked; {out}.failed has the evidence")
    assert [one.name for one in tmp_path.iterdir()] == ["out.failed"]
    failed = tmp_path / "out.failed"
    names = {one.relative_to(failed).as_posix() for one in failed.rglob("*") if one.is_file()}
    assert {"bake.json", "answers.jsonl", "report.html"} <= names
    assert not [one for one in names if one.endswith((".safetensors", ".gguf", "README.md"))]
    (line, *_) = written(failed / "bake.json")["broken"]
    assert line.startswith("guard: answers to general prompts begin")
    assert line.replace("'", "&#39;") in (failed / "report.html").read_text()
    with pytest.raises(GuardError, match="is the evidence of a bake that broke its guard"):
        prepare_push(failed, "me/mine")
    code, _, err = bake("eval", str(failed))
    assert (code, "broke its guard; no weights" in err) == (1, True)
    # The next bake does not write over it in silence.
    code, _, err = bake("--recipe", "recipe.yaml", "--output", str(out))
    assert (code, f"{failed}: exists already" in err) == (1, True)


def test_what_the_guard_limits_is_measured_and_stated(place: Path, tmp_path: Path) -> None:
    limits = ("guard.divergence_at_most=100", "guard.perplexity_rise_at_most=1000")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(place)
        shown: list[str] = []
        out = tmp_path / "out"
        bake_recipe(
            load_recipe("recipe.yaml", overrides=limits, output=str(out)), show=shown.append
        )
        drift = written(out / "bake.json")["measured"]["drift"]
        assert drift["prompts"] > 0
        assert drift["first_token"] > 0
        assert drift["text"]["after"] != drift["text"]["before"]
        assert "divergence: " in shown[0]
        assert "perplexity: " in shown[0]
        assert "\nDivergence: " in (out / "README.md").read_text()
        assert prepare_push(out, "me/mine", licence="apache-2.0").table()
    assert written(place / "out" / "bake.json")["measured"]["drift"]["first_token"] is None


# --- capability


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra lm-eval")
def test_the_harness_runs_a_task_of_ones_own(evaluate: Eval, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    lines = [{"q": f"w{n} w{n + 1}", "options": ["w5", "w6"], "gold": n % 2} for n in range(6)]
    (tasks / "data.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    (tasks / "words.yaml").write_text(
        "task: words\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tasks / 'data.jsonl'}}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{q}}"\n'
        'doc_to_choice: "{{options}}"\n'
        "doc_to_target: gold\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    output = tmp_path / "found.json"
    wanted = ("--tasks", "words", "--task-path", str(tasks), "--output", str(output))
    code, said, err = evaluate("out", *ASKED, "--sets", "general", *wanted)
    assert code == 0, err
    found = written(output)["capability"]["words"]["acc"]
    assert found["before"]["value"] * 6 == pytest.approx(round(found["before"]["value"] * 6))
    assert 0 <= found["after"]["value"] <= 1
    assert "words" in said
    code, _, err = evaluate("out", "--tasks", "wrods", "--task-path", str(tasks))
    assert (code, "--tasks: the harness has no task 'wrods'" in err) == (1, True)


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="the extra lm-eval is there")
def test_the_harness_that_is_not_there_is_one_line(evaluate: Eval) -> None:
    code, _, err = evaluate("out", "--tasks", "mmlu")
    assert (code, "--tasks: needs the extra `lm-eval`: pip install" in err) == (1, True)
