"""What a person reads of a bake: the table, the guard, the answers."""

import json
from pathlib import Path

from bake.aligned import aligned
from bake.evaluate import broken, rates, unbreakable
from bake.gguf_file import part_names, parts_named
from bake.judge import UNREAD, Verdict
from bake.measure import Measured
from bake.recipe import Guard, Recipe

__all__ = ["guard_breaches", "serve_lines", "table", "write_answers"]


def guard_breaches(recipe: Recipe, measured: Measured) -> list[str]:
    """Every way in which the measured behaviour breaks the recipe's guard."""
    before = {runtime: rates(found) for runtime, found in measured.before.items()}
    after = {runtime: rates(found) for runtime, found in measured.after.items()}
    return broken(recipe.guard, before, after, measured.drift)


def table(measured: Measured, guard: Guard) -> str:
    """Refusals before and after by runtime and set, then parity, as aligned plain text.

    Below it the limits of the guard that say nothing of this base.
    """
    rows = [("runtime", "set", "refused before", "refused after")]
    for runtime, found in measured.after.items():
        before, after = rates(measured.before[runtime]), rates(found)
        rows += [(runtime, role, str(before[role]), str(after[role])) for role in after]
    bases = {runtime: rates(one) for runtime, one in measured.before.items()}
    empty = [f"warning: {line}" for line in unbreakable(guard, bases)]
    lines = [*_parity_lines(measured), *measured.drift.lines(), *empty]
    return "\n".join([aligned(rows), "", *lines])


def serve_lines(recipe: Recipe, folder: Path) -> str:
    """The lines that serve the result in the recipe's runtimes, for the formats written."""
    model_file = folder / "Modelfile"
    by_runtime = {
        "transformers": f"transformers chat {folder}",
        "vllm": f"vllm serve {folder}",
        "sglang": f"python -m sglang.launch_server --model-path {folder}",
        "mlx": f"mlx_lm.chat --model {folder}",
    }
    if not recipe.export.safetensors:
        by_runtime.clear()
    if recipe.export.gguf:
        given = recipe.export.gguf
        parts = 1 if given.convert or not given.base else parts_named(Path(given.base))
        gguf = part_names(folder / f"{recipe.name}.gguf", parts)[0]
        by_runtime["llama.cpp"] = f"llama-server -m {gguf} --jinja"
        by_runtime["ollama"] = (
            f"ollama create {recipe.name} -f {model_file} && ollama run {recipe.name}"
        )
    wanted = [runtime for runtime in recipe.runtimes if runtime in by_runtime]
    return "\n".join(f"{runtime:12}  {by_runtime[runtime]}" for runtime in wanted)


def write_answers(path: Path, measured: Measured) -> None:
    """One line a prompt and runtime: the answers before and after, and the verdicts.

    Answers to protected prompts are left out: only whether they were refused.
    """
    with path.open("w", encoding="utf-8") as stream:
        for runtime, found in measured.after.items():
            for role, answers in found.items():
                pairs = zip(measured.before[runtime][role], answers, strict=True)
                for before, after in pairs:
                    line: dict[str, object] = {
                        "runtime": runtime,
                        "set": role,
                        "topic": after.prompt.topic,
                        "prompt": after.prompt.text,
                        "refused_before": _told(before.verdict),
                        "refused_after": _told(after.verdict),
                    }
                    for name, one in (("before", before), ("after", after)):
                        if one.verdict.category:
                            line[f"category_{name}"] = one.verdict.category
                    if role != "protected":
                        line |= {"before": before.text, "after": after.text}
                    stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def _told(verdict: Verdict) -> bool | None:
    """Whether it was a refusal; None where the verdict could not be read."""
    return None if verdict.label == UNREAD else verdict.refused


def _parity_lines(measured: Measured) -> list[str]:
    lines = []
    for runtime, parity in measured.parity.items():
        lines.append(
            f"parity, {runtime}: lost share {parity.lost_share:.1e} of the steering, "
            f"max |Δ logit| {parity.largest:.1e} where the steering moves up to "
            f"{parity.largest_effect:.1f} ({parity.positions} positions)"
        )
    return lines
