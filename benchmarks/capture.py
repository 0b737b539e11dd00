"""What measuring activations costs over running the model, in time and in memory.

    python -m benchmarks.capture [--only time|memory] [--prompts N] [--rounds N]

The demo model, on prompts of the built-in sets with an opening of an answer. Time: `collect`
beside bare forward passes over the same batches, in turn, so that whatever else the machine
does falls on both; printed is the median over the rounds of the ratio of the two. Memory: each
line is a process of its own, which measures short prompts; printed are the numbers that the
statistics hold in the end, and how far the peak of the process rises above what it had before.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

from bake.activations import Conversation, Tap, collect
from bake.archs import find_arch
from bake.checkpoint import Checkpoint
from bake.demo import materialise
from bake.fit.place import Place
from bake.fit.stream import stream_taps
from bake.model import LiveModel, batches
from bake.prompts import load_prompts
from bake.recipe import Fit

# As political-open.yaml has them.
GATED = range(15, 24)
TEMPLATE, ANSWER = Fit().positions.template, Fit().positions.answer
MEMORY = (("mean-difference", 1), ("mean-difference", 4), ("rmd", 1), ("rmd", 4))
MEMORY += (("logistic", 1), ("logistic", 4))
# Short prompts, so many at a time, and so many in all or four times as many.
SHORT, BATCH, UNIT = 8, 64, 600


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--only", choices=("time", "memory"))
    arguments.add_argument("--prompts", type=int, default=96)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--process", nargs=2, metavar=("ESTIMATOR", "PROMPTS"))
    chosen = arguments.parse_args()
    if chosen.process:
        print(json.dumps(memory(*loaded(), chosen.process[0], int(chosen.process[1]))))
        return
    if chosen.only != "memory":
        model, width, depth = loaded()
        conversations = spoken(model, chosen.prompts)
        taps = tapped(model, width, depth, conversations)
        print(f"{'captured':36}  {'bare s':>7}  {'capture s':>9}  overhead")
        for name, row in times(model, taps, conversations, chosen.rounds):
            print(f"{name:36}  {row[0]:7.2f}  {row[1]:9.2f}  {row[2]:+8.1%}", flush=True)
    if chosen.only != "time":
        print(f"{'estimator':16}  {'prompts':>7}  {'numbers held':>12}  peak rises by")
        for estimator, count in MEMORY:
            one = in_process(estimator, UNIT * count)
            held = f"{one['held'] / 1e6:.1f} M"
            print(
                f"{estimator:16}  {UNIT * count:7}  {held:>12}  {one['rise']:10.0f} MB", flush=True
            )


def loaded() -> tuple[LiveModel, int, int]:
    """The demo model, its width and its number of blocks."""
    base = Checkpoint.open(materialise().model)
    arch = find_arch(base.config, "demo", base.tensors)
    return LiveModel.load(base.folder, arch), arch.width(base.config), arch.layer_count(base.config)


def spoken(model: LiveModel, count: int) -> list[Conversation]:
    """Prompts of three sets with their own first tokens in the place of an answer."""
    sets = [load_prompts(name)[: -(-count // 3)] for name in ("political", "harmful", "general")]
    found = []
    for prompt in [one for chosen in sets for one in chosen][:count]:
        start = model.render(prompt.text)
        opening = model.tokenizer(prompt.text).input_ids[:ANSWER]
        ids = (*start, *opening)
        decision = tuple(range(len(start) - TEMPLATE, len(ids)))
        found.append(Conversation(ids, len(start) - 1, decision))
    return found


def tapped(
    model: LiveModel, width: int, depth: int, conversations: Sequence[Conversation]
) -> Mapping[str, Mapping[Any, Tap]]:
    """The taps of fits, by what they measure."""
    every = range(depth)

    def stream(estimator: str, role: str = "target") -> dict[Any, Tap]:
        fit = Fit.model_validate({"estimator": estimator})
        return stream_taps(Place(model), every, fit, role, conversations, width)

    covariances: dict[Any, Tap] = {
        layer: Tap(model.block(layer), "output", "last", "covariance") for layer in every
    }

    def gates(layers: Sequence[int]) -> dict[Any, Tap]:
        return {
            f"{layer} {name}": Tap(
                model.block(layer).get_submodule(name), "input", "decision", "second"
            )
            for layer in layers
            for name in ("self_attn.o_proj", "mlp.down_proj")
        }

    streams = stream("mean-difference")
    own = {layer: tap for layer, tap in streams.items() if layer in GATED}
    return {
        f"samples behind all {depth} blocks": streams,
        f"covariances behind all {depth} blocks": covariances,
        f"gates in blocks {GATED[0]} to {GATED[-1]}": own | gates(GATED),
        f"gates in blocks {depth - len(GATED)} to {depth - 1}": gates(every[-len(GATED) :]),
    }


def times(
    model: LiveModel,
    taps: Mapping[str, Mapping[Any, Tap]],
    conversations: Sequence[Conversation],
    rounds: int,
) -> Iterator[tuple[str, tuple[float, float, float]]]:
    """Median seconds of bare passes and of captures, and the median of their ratios less 1."""
    sequences = [one.ids for one in conversations]
    first = min(min(one.last, *one.decision) for one in conversations)

    def bare() -> None:
        prefix = model.prefix(sequences, first)
        for batch in batches(sequences, model.tokenizer.pad_token_id, 16, prefix):
            model.run(batch)

    bare()
    for name, chosen in taps.items():
        pairs = []
        for number in range(rounds):
            turns = [bare, partial(collect, model, conversations, chosen)]
            # Whoever comes first may find the processor cooler.
            order = (0, 1) if number % 2 else (1, 0)
            seconds = {turn: timed(turns[turn]) for turn in order}
            pairs.append((seconds[0], seconds[1]))
        plain, captured = (median(column) for column in zip(*pairs, strict=True))
        yield name, (plain, captured, median(other / one for one, other in pairs) - 1)


def timed(turn: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    turn()
    return time.perf_counter() - started


def memory(model: LiveModel, width: int, depth: int, estimator: str, count: int) -> dict[str, Any]:
    """The numbers held behind all blocks for a class of so many short prompts, and the peak."""
    words = len(model.tokenizer)
    chats = [tuple((7 * row + place) % words for place in range(SHORT)) for row in range(count)]
    conversations = [Conversation(ids, SHORT - 1, ()) for ids in chats]
    # What one batch takes, any run takes.
    few = conversations[:BATCH]
    fit = Fit.model_validate({"estimator": estimator})
    collect(model, few, stream_taps(Place(model), range(depth), fit, "target", few, width), BATCH)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    taps = stream_taps(Place(model), range(depth), fit, "target", conversations, width)
    found = collect(model, conversations, taps, BATCH)
    rise = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    held = sum(one.held for one in found.values())
    return {"estimator": estimator, "prompts": count, "held": held, "rise": rise / 1024}


def in_process(estimator: str, count: int) -> dict[str, Any]:
    """The same, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.capture", "--process", estimator, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
