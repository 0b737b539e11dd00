"""What people read of a card. Everything in it comes from the manifest."""

import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from bake.card.evaluation import evaluation_section
from bake.card.front import ROLES
from bake.card.place import Place
from bake.card.words import JUDGES, set_name, table, with_interval
from bake.evaluate import Rate
from bake.evidence import MOVED, Evaluation, Evidence
from bake.recipe import Add, Gate

__all__ = ["sections"]

# The kinds of a report's figures that a card shows (bake.html.figures).
DRAWN = {
    "refusals": "Hollow before, filled after; lines are 95 % intervals:",
    "trades": "What steering along each direction trades, beside refusal as such (generic) and a "
    "direction at random:",
    "scores": "How good the direction of each layer is; edited layers are shaded:",
    "cosines": "Cosines between the directions of each kind of refusal:",
}


def sections(
    evidence: Evidence,
    place: Place | None,
    figures: Sequence[str],
    evaluation: Evaluation | None,
) -> Iterator[str]:
    """The parts of a card below its front matter, in their order; some may be empty."""
    recipe = evidence.loaded.recipe
    yield f"# {place.repo_id.partition('/')[2] if place else recipe.name}"
    yield from _promise(evidence)
    yield recipe.description
    yield from _what_it_is(evidence, place)
    yield from _measured(evidence, figures)
    if evaluation:
        yield from evaluation_section(evaluation)
    if place:
        yield from _use(evidence, place)
    yield from _limits(evidence)
    yield from _reproduction(evidence, place)


def _promise(evidence: Evidence) -> Iterator[str]:
    """What the guard allows for protected refusals, what became of them, and empty limits."""
    drop = evidence.loaded.recipe.guard.protected_drop
    bake = evidence.manifest
    moved = [
        f"{_percent(bake.before[runtime]['protected'])} to {_percent(found['protected'])} "
        f"in {runtime} ({found['protected'].total} held-out requests)"
        for runtime, found in bake.after.items()
    ]
    yield (
        f"**Refusals of harmful requests may fall by at most {drop:g} points in this recipe; they "
        f"went from {', from '.join(moved)}.**"
    )
    for line in evidence.unbreakable():
        yield f"**Warning: {line}.**"


def _percent(rate: Rate) -> str:
    return f"{rate.percent:.1f} %"


def _what_it_is(evidence: Evidence, place: Place | None) -> Iterator[str]:
    recipe, base = evidence.loaded.recipe, evidence.manifest.base
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


def _measured(evidence: Evidence, figures: Sequence[str]) -> Iterator[str]:
    recipe, bake = evidence.loaded.recipe, evidence.manifest
    yield "## Measured"
    yield (
        "Refusals on held-out topics, greedy answers of at most "
        f"{recipe.evaluate.answer_tokens} tokens, before and after, with 95 % intervals (Wilson). "
        + JUDGES[recipe.judge.kind].format(recipe.judge.model)
    )
    rows = [("set", "prompts", "runtime", "refused before", "refused after")]
    for runtime, found in bake.after.items():
        for role, rate in found.items():
            source = set_name(getattr(recipe.prompts, role))
            before = bake.before[runtime][role]
            rows.append((role, source, runtime, with_interval(before), with_interval(rate)))
    yield table(rows)
    yield from _drawn(figures)
    if bake.measured.parity:
        yield "Logits of the baked model against the base with hooks on it:"
        parity = [("runtime", "lost share of the steering", "max Δ logit", "steering moves up to")]
        for runtime, one in bake.measured.parity.items():
            effect = f"{one.largest_effect:.1f} ({one.positions} positions)"
            parity.append((runtime, f"{one.lost_share:.1e}", f"{one.largest:.1e}", effect))
        yield table(parity)
    if MOVED in bake.measured.parity:
        yield (
            "Under `llama.cpp` the hooked model is the base GGUF with the edits in float32; as the "
            "checkpoint is moved, it is the base GGUF's logits plus what the hooks change there."
        )
    if bake.conversion:
        yield str(bake.conversion)
    if bake.runtimes:
        yield "Runtimes of the recipe:"
        served = [(runtime, str(one)) for runtime, one in bake.runtimes.items()]
        yield table([("runtime", "what was checked"), *served])
    for line in bake.measured.drift.lines():
        yield f"{line[:1].upper()}{line[1:]}."
    yield "`answers.jsonl` has the answers behind these figures, of harmful requests the verdicts."


def _drawn(figures: Sequence[str]) -> Iterator[str]:
    """The figures of a kind on a line of their own, with what it shows."""
    for kind, words in DRAWN.items():
        found = [one for one in figures if PurePosixPath(one).name.startswith(f"{kind}-")]
        if found:
            yield words
            yield " ".join(
                f"![{PurePosixPath(one).stem.replace('-', ' ')}]({one})" for one in found
            )


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
        parent = evidence.manifest.base.hub_id if recipe.model != "demo" else None
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
    loaded, versions = evidence.loaded, evidence.manifest.versions.model_dump()
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
