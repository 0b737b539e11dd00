"""The model card of a bake: front matter as the Hub reads it, then what people read.

Everything in it comes from the manifest, so a card says nothing that was not measured. Keys:
https://huggingface.co/docs/hub/model-cards, `model-index` as `huggingface_hub.EvalResult` has it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from bake.evaluate import Rate
from bake.evidence import MOVED, Evidence
from bake.prompts.rows import HUB
from bake.recipe import Add, Gate, PromptSource

__all__ = ["JUDGES", "Kind", "Place", "card", "check_card"]

Kind = Literal["checkpoint", "gguf", "adapter"]
TAGS: Mapping[Kind, tuple[str, ...]] = {
    "checkpoint": (),
    "gguf": ("gguf", "llama.cpp", "ollama"),
    "adapter": ("lora",),
}
# What the test split measures, in the order of the table.
ROLES = ("target", "protected", "lookalike", "refused", "general")
JUDGES = {
    "keyword": "The judge is a list of phrases: it reads words, not meaning.",
    "chat": "The judge is the model {} behind a server.",
    "local": "The judge is the model {}.",
}


@dataclass(frozen=True)
class Place:
    """The repository of the Hub that a card is written for, and those that are pushed with it.

    `base_model` and `relation` are what the Hub's tree of models is made of; `license` is what
    whoever pushes says where the base does not; `files` are the names in the repository.
    """

    repo_id: str
    kind: Kind = "checkpoint"
    base_model: str | None = None
    relation: str = "finetune"
    license: str | None = None
    files: tuple[str, ...] = ()
    others: Mapping[Kind, str] = field(default_factory=dict)


def card(evidence: Evidence, place: Place | None = None) -> str:
    """The card of a bake, for its own folder or for a repository of the Hub."""
    recipe = evidence.loaded.recipe
    front = _front_matter(evidence, place).to_yaml()
    parts = [
        f"---\n{front}\n---",
        f"# {place.repo_id.partition('/')[2] if place else recipe.name}",
        _promise(evidence),
        recipe.description,
        *_what_it_is(evidence, place),
        *_measured(evidence),
        *(_use(evidence, place) if place else ()),
        *_limits(evidence),
        *_reproduction(evidence, place),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def check_card(text: str) -> None:
    """Read a card as `huggingface_hub` does, without a network.

    Raises ValueError where its metadata are not what the client understands.
    """
    data = ModelCard(text).data
    if not data.pipeline_tag or not data.eval_results or data.to_yaml() not in text:
        raise ValueError("its metadata do not read back as they were written")


def _front_matter(evidence: Evidence, place: Place | None) -> ModelCardData:
    recipe, base, kind = evidence.loaded.recipe, evidence.base, place.kind if place else None
    stated: dict[str, Any] = {}
    licences = list(base.license) or [one for one in [place and place.license] if one]
    if licences:
        stated["license"] = licences[0] if len(licences) == 1 else licences
        stated |= {"license_name": base.license_name, "license_link": base.license_link}
    parent = place.base_model if place else base.hub_id
    if parent:
        stated["base_model"] = parent
        stated["base_model_relation"] = place.relation if place else "finetune"
    sets = [getattr(recipe.prompts, role) for role in (*ROLES, "text")]
    named = [one.set for source in sets if source for one in source.sets]
    hub = [name.removeprefix(HUB) for name in named if name.startswith(HUB)]
    organism = ["model-organism"] if recipe.model == "demo" else []
    library = {"adapter": "peft", "gguf": None}.get(kind or "", "transformers")
    return ModelCardData(
        **stated,
        library_name=library,
        pipeline_tag=base.pipeline_tag or "text-generation",
        datasets=list(dict.fromkeys(hub)) or None,
        tags=["bake", "steering", *organism, *(TAGS[kind] if kind else ())],
        model_name=recipe.name,
        eval_results=list(_results(evidence)),
    )


def _results(evidence: Evidence) -> Iterator[EvalResult]:
    """Refusals after the bake in percent, with those before: by set, then by runtime."""
    prompts = evidence.loaded.recipe.prompts
    for role in ROLES:
        source = getattr(prompts, role)
        for runtime, found in evidence.after.items():
            if role not in found:
                continue
            before, after = evidence.before[runtime][role], found[role]
            yield EvalResult(
                task_type="text-generation",
                task_name=f"Refusals, {role}",
                dataset_type=_set_id(source),
                dataset_name=f"{_set_name(source)}, held-out topics",
                dataset_config=source.subset,
                dataset_split=source.split or "test",
                dataset_revision=source.revision,
                metric_type="refusal-rate",
                metric_name=f"Refused in {runtime}, {role}, %",
                metric_value=round(after.percent, 2),
                metric_args={
                    "refused": after.refused,
                    "total": after.total,
                    "before": round(before.percent, 2),
                },
            )


def _set_name(source: PromptSource) -> str:
    """The sets that figures are of, without the folders of whoever baked."""
    names = [one.set for one in source.sets if not one.fit_only]
    return "+".join(
        name.removeprefix(HUB) if name.startswith(HUB) else PurePath(name).name for name in names
    )


def _set_id(source: PromptSource) -> str:
    """A Hub dataset's id; what is none must not look like one."""
    name = _set_name(source)
    return name if source.set.startswith(HUB) and not source.also else f"bake-{name}"


def _promise(evidence: Evidence) -> str:
    """What the guard allows for protected refusals, and what became of them."""
    drop = evidence.loaded.recipe.guard.protected_drop
    moved = [
        f"{_percent(evidence.before[runtime]['protected'])} to {_percent(found['protected'])} "
        f"in {runtime} ({found['protected'].total} held-out requests)"
        for runtime, found in evidence.after.items()
    ]
    return (
        f"**Refusals of harmful requests may fall by at most {drop:g} points in this recipe; they "
        f"went from {', from '.join(moved)}.**"
    )


def _percent(rate: Rate) -> str:
    return f"{rate.percent:.1f} %"


def _what_it_is(evidence: Evidence, place: Place | None) -> Iterator[str]:
    recipe, base = evidence.loaded.recipe, evidence.base
    linked = f"[{base.hub_id}](https://huggingface.co/{base.hub_id})"
    if recipe.model == "demo":
        yield (
            f"The base is bake's demo, a model organism: {linked} with refusals that were trained "
            "in for demonstration. It is no model for real use."
        )
    elif base.hub_id:
        at = f" at commit `{base.commit}`" if base.commit else ""
        yield f"The base is {linked}{at}."
    else:
        yield "The base is a checkpoint in a folder; `bake.json` has the hashes of its files."
    if place and place.kind == "adapter":
        yield "The edits are here as a LoRA, exactly; it is loaded on top of the base."
    else:
        yield "The weights were edited by bake; no hook or adapter is needed."
    yield "\n".join(f"- {_edit(one)}" for one in recipe.edits)
    if not (base.license or (place and place.license)):
        yield "The licence of the base is not known to bake; ask for it before you share this."


def _edit(edit: Any) -> str:
    """One edit of the recipe in a line."""
    if isinstance(edit, Add):
        return f"`add` at block {edit.layer} ({edit.site}), strength {edit.strength:g}"
    layers = ", ".join(map(str, edit.layers))
    if isinstance(edit, Gate) and edit.form == "block":
        return f"`gate` in a block behind each of blocks {layers}, strength {edit.strength:g}"
    return f"`{edit.op}` at blocks {layers}, strength {edit.strength:g}"


def _measured(evidence: Evidence) -> Iterator[str]:
    recipe = evidence.loaded.recipe
    yield "## Measured"
    yield (
        "Refusals on held-out topics, greedy answers of at most "
        f"{recipe.evaluate.answer_tokens} tokens, before and after, with 95 % intervals (Wilson). "
        + JUDGES[recipe.judge.kind].format(recipe.judge.model)
    )
    rows = [("set", "prompts", "runtime", "refused before", "refused after")]
    for runtime, found in evidence.after.items():
        for role, rate in found.items():
            source = _set_name(getattr(recipe.prompts, role))
            before = evidence.before[runtime][role]
            rows.append((role, source, runtime, _with_interval(before), _with_interval(rate)))
    yield _table(rows)
    if evidence.parity:
        yield "Logits of the baked model against the base with hooks on it:"
        parity = [("runtime", "lost share of the steering", "max Δ logit", "steering moves up to")]
        for runtime, one in evidence.parity.items():
            effect = f"{one.largest_effect:.1f} ({one.positions} positions)"
            parity.append((runtime, f"{one.lost_share:.1e}", f"{one.largest:.1e}", effect))
        yield _table(parity)
    if MOVED in evidence.parity:
        yield (
            "Under `llama.cpp` the hooked model is the base GGUF with the edits in float32; as the "
            "checkpoint is moved, it is the base GGUF's logits plus what the hooks change there."
        )
    if evidence.conversion:
        yield str(evidence.conversion)
    if evidence.runtimes:
        yield "Runtimes of the recipe:"
        served = [(runtime, str(one)) for runtime, one in evidence.runtimes.items()]
        yield _table([("runtime", "what was checked"), *served])
    for line in evidence.drift.lines():
        yield f"{line[:1].upper()}{line[1:]}."
    yield "`answers.jsonl` has the answers behind these figures, of harmful requests the verdicts."


def _with_interval(rate: Rate) -> str:
    low, high = rate.interval
    return f"{rate}, {low:.0f} to {high:.0f} %"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _use(evidence: Evidence, place: Place) -> Iterator[str]:
    """How the files of one repository are run."""
    recipe = evidence.loaded.recipe
    ggufs = [name for name in place.files if name.endswith(".gguf")]
    served = [name for name in ggufs if not name.endswith((".lora.gguf", ".vector.gguf"))]
    lines = {
        "checkpoint": [f"transformers chat {place.repo_id}", f"vllm serve {place.repo_id}"],
        "gguf": [
            f"llama-server -hf {place.repo_id} --jinja",
            f"ollama run hf.co/{place.repo_id}",
        ],
        "adapter": [],
    }[place.kind]
    if place.kind == "checkpoint" and "vllm" not in recipe.runtimes:
        lines.pop()
    yield "## Use"
    if place.kind == "gguf" and not served:
        lines = []
    if lines:
        yield "```sh\n" + "\n".join(lines) + "\n```"
    if place.kind == "adapter":
        # The demo itself is in no repository.
        parent = evidence.base.hub_id if recipe.model != "demo" else None
        yield (
            f'`PeftModel.from_pretrained(base, "{place.repo_id}")` puts it on {parent}, and so '
            "does vLLM's `--lora-modules`."
        )
    for name in ggufs:
        if name.endswith(".lora.gguf"):
            yield f"`{name}` is a LoRA for the base's GGUF (`llama-server --lora`)."
        if name.endswith(".vector.gguf"):
            yield f"`{name}` is a control vector for it (`llama-server --control-vector`)."
    what = {"checkpoint": "the checkpoint", "gguf": "GGUF", "adapter": "a LoRA"}
    for kind, other in place.others.items():
        yield f"As {what[kind]}: [{other}](https://huggingface.co/{other})."


def _limits(evidence: Evidence) -> Iterator[str]:
    recipe = evidence.loaded.recipe
    languages = sorted(
        {source.language for role in ROLES if (source := getattr(recipe.prompts, role)) is not None}
    )
    yield "## Intended use and limits"
    lines = [
        "For use and study of the base with the behaviour above changed; nothing else was aimed "
        "at, and every other limit is that of the base.",
        f"Measured were single questions (language: {', '.join(languages)}) without a system "
        "prompt, as many as the table says: other wordings, languages and long conversations "
        "were not.",
        "A refusal that is gone says nothing of what is said instead: answers may be wrong.",
        "What the base answered, harmful or not, this model answers too; it is no safer.",
    ]
    if recipe.system_prompt:
        lines[1] = lines[1].replace("without a system", "with the recipe's system")
    yield "\n".join(f"- {line}" for line in lines)


def _reproduction(evidence: Evidence, place: Place | None) -> Iterator[str]:
    loaded, versions = evidence.loaded, evidence.content["versions"]
    yield "## Recipe"
    longest = max(map(len, re.findall("`+", loaded.text)), default=0)
    fence = "`" * max(3, longest + 1)
    yield f"{fence}yaml\n{loaded.text.rstrip()}\n{fence}"
    if loaded.overrides:
        yield "with\n\n" + "\n".join(f"- `{override}`" for override in loaded.overrides)
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    again = f"bake reproduce {place.repo_id if place else 'FOLDER'}"
    yield (
        f"SHA-256 of the recipe: `{loaded.sha256}`. Baked with {made}. `{again}` bakes it again "
        "and compares hashes and figures; `bake.json` has every one of them."
    )
