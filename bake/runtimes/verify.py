"""`bake verify --runtime`: a baked folder in real runtimes, beside the hooked model."""

import json
from collections.abc import Collection, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path

import torch

from bake.measure import in_turn
from bake.model import LiveModel
from bake.runtimes import Runtime
from bake.runtimes.baked import Baked
from bake.runtimes.check import ANSWER_TOKENS, Finding, check_runtime, check_server
from bake.runtimes.llama_cpp import LlamaCpp
from bake.runtimes.mlx import MLX
from bake.runtimes.torch_model import Transformers
from bake.staging import staged_file

__all__ = ["verify_runtimes", "write_findings"]


def verify_runtimes(
    folder: Path,
    runtimes: Collection[str],
    base: Path | None = None,
    base_gguf: Path | None = None,
    server: bool = False,
) -> list[Finding]:
    """Check a baked folder in each of some runtimes, by their names in recipes.

    `base` and `base_gguf` are where the base is, if not where the recipe has it; with `server`
    llama.cpp's server is asked too. Raises what `Baked.open` and the runtimes do where there is
    nothing to check; what a check finds is in its result.
    """
    baked = Baked.open(folder, base)
    # What is missing is said before anything is loaded.
    patched = baked.base_gguf(base_gguf) if "llama.cpp" in runtimes else None
    live = LiveModel.load(
        baked.base.folder, baked.arch, torch.float32, system=baked.recipe.system_prompt
    )
    findings: list[Finding] = []
    for name in runtimes:
        with ExitStack() as stack:
            opened: Runtime
            original: Runtime | None = None
            if name == "llama.cpp":
                room = _room(baked, live)
                opened = stack.enter_context(closing(LlamaCpp(baked.gguf, baked.arch, room)))
                if patched:
                    original = stack.enter_context(closing(LlamaCpp(patched, baked.arch, room)))
                findings += check_runtime(baked, opened, live, original)
                if server:
                    findings.append(check_server(baked, opened, live))
            elif name == "mlx":
                opened = stack.enter_context(closing(MLX(baked.checkpoint)))
                findings += check_runtime(baked, opened, live)
            else:
                opened = stack.enter_context(closing(Transformers(baked.checkpoint, baked.arch)))
                findings += check_runtime(baked, opened, live)
    return findings


def write_findings(findings: Sequence[Finding], path: Path, overwrite: bool) -> None:
    """Write findings as a JSON list; raises OutputError where the file exists."""
    with staged_file(path, overwrite) as staging:
        text = json.dumps([asdict(one) for one in findings], indent=2, ensure_ascii=False) + "\n"
        staging.write_text(text, encoding="utf-8")


def _room(baked: Baked, live: LiveModel) -> int:
    """A context for every prompt with the opening of its answer."""
    prompts = in_turn(baked.prompts, sum(map(len, baked.prompts.values())))
    return max(len(live.render(one.text)) for one in prompts) + ANSWER_TOKENS + 1
