"""`bake verify --runtime`: what serves as it was baked passes, and what does not is named."""

import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFValueType
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from bake.demo import Demo
from bake.edits import AddVector, CreatedTensor
from bake.errors import (
    CheckpointError,
    GGUFError,
    InputError,
    ManifestError,
    VerificationError,
)
from bake.evidence import MOVED
from bake.export.gguf import patch
from bake.export.gguf_bytes import packed_pair
from bake.export.quantise import Quantisation, quantise
from bake.gguf_file import GGUFFile
from bake.llama import LlamaModel
from bake.manifest import read_manifest, write_manifest
from bake.model import LiveModel
from bake.pipeline import bake
from bake.recipe import load_recipe
from bake.record import KEPT
from bake.runtimes.baked import Baked
from bake.runtimes.check import Finding, check_runtime, first_difference
from bake.runtimes.facts import FACTS, table
from bake.runtimes.llama_cpp import LlamaCpp
from bake.runtimes.server import chat, served_at
from bake.runtimes.template import CONVERSATIONS, Conversation, rendered
from bake.runtimes.torch_model import Transformers, apply_template
from bake.runtimes.verify import verify_runtimes
from tests.conftest import Run
from tests.test_given_directions import ROLES, ByTopic
from tests.through_disk import opened
from tests.tiny import write_place, write_tiny
from tests.tiny_gguf import write_tiny_gguf

# Every operator, and every carrier that has something to be kept.
EDITS = """\
  - {op: gate, layers: [1], sites: [attention], strength: -1}
  - {op: ablate, layers: [2], variant: projected}
  - {op: add, layer: 0, strength: -2, carrier: ridge, constant_error: 9}
  - {op: add, layer: 1, strength: -1.5, carrier: bias}
"""
RECIPE = f"""\
model: model
prompts:
  target: target.txt
  protected: protected.txt
  lookalike: null
  general: general.txt
  text: passages.txt
fit: {{contrast: general}}
edits:
{EDITS}export: {{gguf: {{base: base.gguf, edited_type: f32}}}}
verify: {{prompts: 4, ridge_lost_share: 0.3}}
evaluate: {{runtimes: [transformers], answer_tokens: 3, limit: 3}}
guard: {{protected_drop: 100, lookalike_rise: 100, general_rise: 100}}
runtimes: [transformers, llama.cpp, ollama, vllm, mlx]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a tiny model, its GGUF, and what was baked of them in `out`."""
    folder = write_place(tmp_path_factory.mktemp("place"), RECIPE, ROLES)
    base, arch, _ = opened(folder / "model")
    write_tiny_gguf(base, arch, folder / "base.gguf")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr("bake.pipeline.find_judge", ByTopic)
        bake(load_recipe("recipe.yaml", output="out"))
    yield folder


@pytest.fixture
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def baked(inside: Path) -> Baked:
    return Baked.open(Path("out"))


@pytest.fixture
def live(baked: Baked) -> LiveModel:
    return LiveModel.load(baked.base.folder, baked.arch, torch.float32)


def by_name(findings: Sequence[Finding]) -> Mapping[str, Finding]:
    return {one.check: one for one in findings}


def test_the_kept_fit_makes_the_edits_that_were_written(baked: Baked) -> None:
    written = opened(baked.folder)[0]
    done: dict[str, torch.Tensor] = {}
    for one in baked.interventions:
        for edit in one.edits():
            before = done.get(edit.tensor)
            if before is None:
                there = edit.tensor in baked.base.tensors
                before = baked.base.read(edit.tensor) if there else torch.zeros(32)
            done[edit.tensor] = edit.apply(before)
    assert set(done) == set(baked.edited)
    for name, tensor in done.items():
        torch.testing.assert_close(written.read(name), tensor, atol=1e-6, rtol=1e-6)


def test_the_manifest_says_what_was_verified_and_what_is_by_table(inside: Path) -> None:
    found = read_manifest(Path("out"))["runtimes"]
    assert {name: one["status"] for name, one in found.items()} == {
        "transformers": "verified",
        "llama.cpp": "verified",
        "ollama": "by table",
        "vllm": "by table",
        "mlx": "by table",
    }
    assert any("biases that are created" in one for one in found["vllm"]["trust"])


def test_the_command_checks_a_folder_that_serves(bake: Run, inside: Path, tmp_path: Path) -> None:
    report = tmp_path / "found.json"
    arguments = ("verify", "out", "--runtime", "transformers", "--output", str(report))
    code, out, _ = bake(*arguments)
    assert code == 0, out
    found = json.loads(report.read_text())
    assert [(one["check"], one["passed"]) for one in found] == [
        ("logits", True),
        ("tensors", True),
        ("template", True),
        ("answers", True),
    ]
    assert "5 edited; the logits depend on every edited one" in out
    assert bake(*arguments)[0] == 1


def test_a_checkpoint_without_the_edits_fails(baked: Baked, live: LiveModel) -> None:
    """As of a runtime that serves and edits nothing."""
    with closing(Transformers(baked.base.folder, baked.arch)) as runtime:
        found = by_name(check_runtime(baked, runtime, live))
    assert not found["logits"].passed
    assert "lost share 1.0e+00" in found["logits"].text
    assert found["template"].passed


def test_a_runtime_that_drops_a_bias_without_a_word_fails(
    baked: Baked, live: LiveModel, tmp_path: Path
) -> None:
    """As vLLM and SGLang do with one that their class does not have: the tensor is passed over."""
    tensors = load_file(baked.folder / "model.safetensors")
    (bias,) = (name for name in baked.edited if name.endswith(".bias"))
    tensors[bias].zero_()
    shutil.copytree(baked.folder, tmp_path / "dropped")
    save_file(tensors, tmp_path / "dropped" / "model.safetensors", {"format": "pt"})
    with closing(Transformers(tmp_path / "dropped", baked.arch)) as runtime:
        found = by_name(check_runtime(baked, runtime, live))
    assert not found["logits"].passed


def test_transformers_says_which_tensors_have_no_effect(baked: Baked, tmp_path: Path) -> None:
    """What a block reads is lost where nothing is written: its output projection is zero."""
    tensors = load_file(baked.folder / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"].zero_()
    shutil.copytree(baked.folder, tmp_path / "mute")
    save_file(tensors, tmp_path / "mute" / "model.safetensors", {"format": "pt"})
    with closing(Transformers(tmp_path / "mute", baked.arch)) as runtime:
        lost = "model.layers.1.self_attn.v_proj.weight"
        assert runtime.without_effect([*baked.edited, lost]) == [
            *(name for name in baked.edited if "1.self_attn" in name),
            lost,
        ]


def test_llama_cpp_loads_a_bias_and_never_adds_it(tmp_path: Path) -> None:
    """Fused q, k and v: a bias of v alone loads, and the graph does not know it."""
    write_tiny("phi3", tmp_path / "base")
    base, arch, _ = opened(tmp_path / "base")
    write_tiny_gguf(base, arch, tmp_path / "base.gguf")
    gguf = GGUFFile.open(tmp_path / "base.gguf")
    made = {}
    for name, width in (("blk.1.attn_v.bias", 16), ("blk.1.attn_norm.weight", 32)):
        made[name] = [AddVector(name, torch.ones(width))]
    created = CreatedTensor("blk.1.attn_v.bias", (16,), "F32", "blk.1.attn_qkv.weight")
    output = tmp_path / "out.gguf"
    patch(gguf, made, output, edited_type=GGMLQuantizationType.F32, created=[created])
    with closing(LlamaCpp(output, arch, 16)) as runtime:
        assert runtime.without_effect(["blk.1.attn_v.bias"]) == ["blk.1.attn_v.bias"]
        assert (
            runtime.without_effect([f"model.layers.{n}.mlp.down_proj.weight" for n in (0, 1)]) == []
        )
    with LlamaModel(tmp_path / "base.gguf", context=16, threads=1) as model:
        assert model.tensors_read() >= gguf.tensors.keys()


def test_a_bake_for_such_a_llama_cpp_publishes_nothing(
    inside: Path, bake: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bake.pipeline.find_judge", ByTopic)
    read = LlamaModel.tensors_read
    dropped = "blk.1.ffn_down.bias"
    monkeypatch.setattr(LlamaModel, "tensors_read", lambda self: read(self) - {dropped})
    code, _, err = bake("--recipe", "recipe.yaml", "--output", "never")
    assert code == 4
    assert f"llama.cpp loads {dropped} and never uses it; use carrier: ridge" in err
    assert not Path("never").exists()


def test_llama_cpp_on_a_folder_without_a_vocabulary(baked: Baked, live: LiveModel) -> None:
    """Everything holds in the tiny GGUF but what needs words; llama.cpp would end the process."""
    patched = baked.base_gguf(None)
    assert patched == Path("base.gguf")
    with (
        closing(LlamaCpp(baked.gguf, baked.arch, 64)) as runtime,
        closing(LlamaCpp(patched, baked.arch, 64)) as base,
    ):
        found = by_name(check_runtime(baked, runtime, live, base))
    assert {name for name, one in found.items() if not one.passed} == {"template"}
    assert "has no vocabulary" in found["template"].text
    wanted = read_manifest(baked.folder)["measured"]["parity"]["llama.cpp"]["lost_share"]
    assert float(found["logits"].text.split()[2]) == pytest.approx(wanted, rel=0.05)


def test_a_rounded_gguf_is_compared_with_the_exact_edits(
    inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its types lose, and beside it what the hooks move in the checkpoint; here and there."""
    small = tmp_path / "small.gguf"
    quantise(GGUFFile.open("base.gguf"), small, Quantisation("q4_0"), 1)
    monkeypatch.setattr("bake.pipeline.find_judge", ByTopic)
    shares = {}
    for kind in ("f32", "q8_0"):
        gguf = f"export.gguf={{base: {small}, edited_type: {kind}}}"
        limits = ("verify.gguf_lost_share=1", "verify.gguf_moved_share=1")
        loaded = load_recipe("recipe.yaml", overrides=(gguf, *limits), output=str(tmp_path / kind))
        parity = read_manifest(bake(loaded))["measured"]["parity"]
        shares[kind] = {name: one["lost_share"] for name, one in parity.items()}
    assert shares["f32"]["llama.cpp"] == 0
    assert shares["f32"][MOVED] == pytest.approx(shares["q8_0"][MOVED], rel=0.3)
    assert 0 < 2 * shares["q8_0"]["llama.cpp"] < shares["q8_0"][MOVED]
    found = by_name(verify_runtimes(tmp_path / "q8_0", ["llama.cpp"]))["logits"]
    said = [float(one) for one in re.findall(r"(?:lost share|is moved) (\S+)", found.text)]
    wanted = [shares["q8_0"][name] for name in ("llama.cpp", MOVED)]
    assert said == pytest.approx(wanted, rel=0.05)
    assert {path.name for path in tmp_path.iterdir()} == {"f32", "q8_0", "small.gguf"}


def test_a_base_gguf_is_of_no_use_where_the_checkpoint_was_converted(baked: Baked) -> None:
    loaded = load_recipe("recipe.yaml", overrides=["export.gguf={convert: q4_0}"])
    with pytest.raises(InputError, match=r"was made without a GGUF of the base; leave it out"):
        replace(baked, recipe=loaded.recipe).base_gguf(Path("base.gguf"))


@pytest.fixture(scope="module")
def templates(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[LlamaCpp]]:
    """The demo's GGUF with the template below, and with one that differs by a colon."""
    gguf, (_, arch, _) = GGUFFile.open(demo.gguf), opened(demo.model)
    folder, made = tmp_path_factory.mktemp("templates"), []
    for number, template in enumerate((TOOLS, TOOLS.replace("role }}:", "role }}"))):
        pair = packed_pair("tokenizer.chat_template", GGUFValueType.STRING, template)
        output = folder / f"{number}.gguf"
        patch(gguf, {}, output, edited_type="auto", pairs={"tokenizer.chat_template": pair})
        made.append(LlamaCpp(output, arch, 16))
    yield made
    for runtime in made:
        runtime.close()


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=lambda one: one.name)
def test_conversations_are_rendered_by_llama_cpp_as_by_transformers(
    conversation: Conversation, demo: Demo, templates: Sequence[LlamaCpp]
) -> None:
    """A template that uses tools, trims, escapes JSON, and refuses a system's turn with tools."""
    tokenizer = AutoTokenizer.from_pretrained(demo.model)
    tokenizer.chat_template = TOOLS
    wanted = rendered(lambda one: apply_template(tokenizer, one), conversation)
    same, other = (rendered(one.render, conversation) for one in templates)
    assert same == wanted
    if wanted is None:
        assert conversation.name == "tools with system"
    else:
        assert other != wanted
        assert templates[0].tokenize(wanted) == tokenizer(wanted).input_ids


TOOLS = """\
{%- if tools and messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}
{%- for tool in tools or [] %}{{ tool | tojson }}{{ tool.function.parameters | tojson(indent=2) }}
{% endfor %}
{%- for message in messages %}
{{ bos_token }}{{ message.role }}: {{ message.content | trim }}{{ '\\n' + message.content }}
    {%- for call in message.tool_calls or [] %}
{{ call.function.name }}{{ call.function.arguments | tojson }}
    {%- endfor %}{{ eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}assistant:{% endif %}
"""


def test_another_base_is_refused(inside: Path, bake: Run, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree("model", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(CheckpointError, match=r"config\.json: is not the file that was baked"):
        Baked.open(Path("out"), other)
    code, _, err = bake("verify", "out", "--runtime", "transformers", "--base", "nowhere")
    assert code == 1
    assert "nowhere: no such folder" in err
    Path("model").rename("elsewhere")
    try:
        code, _, err = bake("verify", "out", "--runtime", "transformers")
        assert code == 1
        assert "or name the base's folder with --base" in err
        arguments = ("verify", "out", "--runtime", "transformers", "--base", "elsewhere")
        assert bake(*arguments)[0] == 0
    finally:
        Path("elsewhere").rename("model")


def test_another_base_gguf_is_refused(baked: Baked, tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match="--base-gguf"):
        baked.base_gguf(tmp_path / "none.gguf")
    other = tmp_path / "base.gguf"
    patch(GGUFFile.open("base.gguf"), {}, other, edited_type="auto")
    assert baked.base_gguf(other) == other
    gguf = GGUFFile.open(other)
    with other.open("r+b") as stream:
        stream.seek(gguf.tensors["output_norm.weight"].offset)
        stream.write(b"\0")
    with pytest.raises(GGUFError, match="is not the file that was baked"):
        baked.base_gguf(other)


def test_evidence_that_is_not_whole_is_refused(inside: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree("out", folder)
    kept = load_file(folder / KEPT)
    readout = kept.pop("edits.2.readout")
    save_file(kept, folder / KEPT)
    with pytest.raises(ManifestError, match=r"no edits\.2\.readout, which the recipe's edits need"):
        Baked.open(folder)
    save_file(kept | {"edits.2.readout": readout}, folder / KEPT)
    manifest = read_manifest(folder)
    plan = manifest["plan"] | {"edits": manifest["plan"]["edits"][:-1]}
    write_manifest(folder, manifest | {"plan": plan})
    with pytest.raises(ManifestError, match=r"plan\.edits: this version of bake plans otherwise"):
        Baked.open(folder)
    write_manifest(folder, manifest)
    (folder / "answers.jsonl").write_text("{}\n")
    with pytest.raises(ManifestError, match=r"answers\.jsonl: cannot be read"):
        Baked.open(folder)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--server", "--runtime", "transformers"), "--server is of --runtime llama.cpp"),
        (("--base", "x"), "need a --runtime"),
    ],
)
def test_options_that_say_nothing_alone(
    bake: Run, inside: Path, arguments: tuple[str, ...], said: str
) -> None:
    code, _, err = bake("verify", "out", *arguments)
    assert code == 2
    assert said in err


@pytest.mark.parametrize(
    ("one", "other", "place"),
    [((1, 2), (1, 2), None), ((1, 2), (1, 3), 1), ((1,), (1, 2), 1), ((), (), None)],
)
def test_where_two_answers_part(
    one: Sequence[int], other: Sequence[int], place: int | None
) -> None:
    assert first_difference(one, other) == place


def test_an_answer_of_its_own_is_no_near_tie(baked: Baked, live: LiveModel) -> None:
    """Right logits, and a sampler that takes the least likely token."""

    class Odd(Transformers):
        def generate(self, prompt: Sequence[int], tokens: int) -> list[int]:
            return [int(self.logits(prompt)[-1].argmin())]

    with closing(Odd(baked.folder, baked.arch)) as runtime:
        found = by_name(check_runtime(baked, runtime, live))
    assert found["logits"].passed
    assert not found["answers"].passed


def test_the_table_in_the_documentation_is_the_one_of_the_code() -> None:
    document = Path(__file__).parent.parent / "docs" / "runtimes.md"
    assert table() in document.read_text(encoding="utf-8")
    assert FACTS.keys() == {"transformers", "llama.cpp", "mlx", "ollama", "vllm", "sglang"}


def test_mlx_serves_the_checkpoint_as_the_hooked_model(baked: Baked, live: LiveModel) -> None:
    pytest.importorskip("mlx_lm", reason="the extra mlx is not installed")
    from bake.runtimes.mlx import MLX

    with closing(MLX(baked.folder)) as runtime:
        found = by_name(check_runtime(baked, runtime, live))
        assert all(one.passed for one in found.values()), found
        assert runtime.without_effect([baked.edited[0], "no.such.tensor"]) == []
    with closing(MLX(baked.base.folder)) as runtime:
        assert not by_name(check_runtime(baked, runtime, live))["logits"].passed


def test_mlx_refuses_a_bias_that_its_class_does_not_have(baked: Baked, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm", reason="the extra mlx is not installed")
    from bake.runtimes.mlx import MLX

    tensors = load_file(baked.base.folder / "model.safetensors")
    shutil.copytree(baked.base.folder, tmp_path / "more")
    tensors["model.layers.0.mlp.down_proj.bias"] = torch.ones(32)
    save_file(tensors, tmp_path / "more" / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match=r"mlx-lm cannot load it: .*down_proj\.bias"):
        MLX(tmp_path / "more")


def test_without_mlx_the_extra_is_named(
    bake: Run, inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    code, _, err = bake("verify", "out", "--runtime", "mlx")
    assert code == 1
    assert "pip install -c constraints.txt 'bake[mlx]'" in err


@pytest.mark.slow
def test_an_openai_client_and_ours_get_one_answer_that_begins_as_the_librarys(demo: Demo) -> None:
    openai = pytest.importorskip("openai")
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    with served_at(demo.gguf, 128) as url:
        ours = chat(url, turns, 16)
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            theirs = client.chat.completions.create(
                model="any", messages=turns, temperature=0, max_tokens=16
            )
        assert theirs.choices[0].message.content == ours
        with pytest.raises(VerificationError, match="no chat completion: HTTP Error 4"):
            chat(url, [{"role": "user", "content": "word " * 400}], 16)
    tokenizer = AutoTokenizer.from_pretrained(demo.model)
    start = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    with LlamaModel(demo.gguf, context=128, parallel=1, threads=2) as model:
        assert ours.startswith(model.detokenize(model.generate([start], 2)[0]))


@pytest.mark.slow
def test_a_server_that_does_not_come_up_says_why(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_text("hello")
    with (
        pytest.raises(VerificationError, match=r"does not serve .*no\.gguf: .*install it"),
        served_at(tmp_path / "no.gguf", 16),
    ):
        pass
