"""`bake verify --runtime`: a baked folder in real runtimes, beside the hooked model."""

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from bake.export.conversion import Road
from bake.export.layout import write_exact
from bake.gguf_file import GGUFFile
from bake.measure import in_turn
from bake.model import LiveModel
from bake.runtimes import Runtime
from bake.runtimes.baked import Baked
from bake.runtimes.check import ANSWER_TOKENS, Finding, check_runtime, check_server
from bake.runtimes.llama_cpp import LlamaCpp
from bake.runtimes.mlx import MLX
from bake.runtimes.torch_model import Transformers
from bake.staging import scratch, staged_file

__all__ = ["verify_runtimes", "write_findings"]


def verify_runtimes(
    folder: Path,
    runtimes: Collection[str],
    base: Path | None = None,
    base_gguf: Path | None = None,
    server: bool = False,
    llama_cpp: Path | None = None,
) -> list[Finding]:
    """Check a baked folder in each of some runtimes, by their names in recipes.

    `base` and `base_gguf` are where the base is, if not where the recipe has it; with `server`
    llama.cpp's server is asked too. Where the GGUF was converted the base is once more, by the
    tree `llama_cpp` (`find_converter`). Raises what `Baked.open`, the conversion and the runtimes
    do where there is nothing to check; what a check finds is in its result.
    """
    baked = Baked.open(folder, base)
    # What is missing is said before anything is loaded.
    named = baked.base_gguf(base_gguf) if "llama.cpp" in runtimes else None
    live = LiveModel.load(
        baked.base.folder, baked.arch, torch.float32, system=baked.recipe.system_prompt
    )
    findings: list[Finding] = []
    for name in runtimes:
        with ExitStack() as stack:
            opened: Runtime
            if name == "llama.cpp":
                room = _room(baked, live)
                opened = stack.enter_context(closing(LlamaCpp(baked.gguf, baked.arch, room)))
                found = stack.enter_context(_references(baked, named, llama_cpp))
                references = [
                    stack.enter_context(closing(LlamaCpp(path, baked.arch, room))) for path in found
                ]
                findings += check_runtime(baked, opened, live, *references)
                if server:
                    findings.append(check_server(baked, opened, live))
            elif name == "mlx":
                opened = stack.enter_context(closing(MLX(baked.checkpoint)))
                findings += check_runtime(baked, opened, live)
            else:
                opened = stack.enter_context(closing(Transformers(baked.checkpoint, baked.arch)))
                findings += check_runtime(baked, opened, live)
    return findings


@contextmanager
def _references(baked: Baked, named: Path | None, llama_cpp: Path | None) -> Iterator[list[Path]]:
    """The base GGUF, and where that is quantised the one with the edits in full.

    `named` is the recipe's. What has to be made lies beside the folder meanwhile.
    """
    with scratch(baked.folder) as aside:
        mix = GGUFFile.open(named) if named else None
        road = Road.planned(baked.recipe, baked.plan, baked.arch, baked.base, mix, llama_cpp)
        gguf = _converted(baked, road, aside) if road else mix
        assert gguf is not None
        found = [gguf.path]
        if gguf.is_quantised:
            config = baked.base.config
            found.append(write_exact(baked.plan, baked.arch, config, gguf, baked.edits, aside))
        yield found


def _converted(baked: Baked, road: Road, aside: Path) -> GGUFFile:
    """The base on the road that the baked checkpoint went."""
    full = road.converted(baked.base.folder, aside / "base.gguf")
    if road.asked.is_float:
        return full
    return road.quantised(full, aside / "base.quantised.gguf", baked.importance(road, full))


def write_findings(findings: Sequence[Finding], path: Path, overwrite: bool) -> None:
    """Write findings as a JSON list; raises OutputError where the file exists."""
    with staged_file(path, overwrite) as staging:
        text = json.dumps([asdict(one) for one in findings], indent=2, ensure_ascii=False) + "\n"
        staging.write_text(text, encoding="utf-8")


def _room(baked: Baked, live: LiveModel) -> int:
    """A context for every prompt with the opening of its answer."""
    prompts = in_turn(baked.prompts, sum(map(len, baked.prompts.values())))
    return max(len(live.render(one.text)) for one in prompts) + ANSWER_TOKENS + 1
