"""The block gate on the demo: what its probes read behind every layer, and what a block costs.

    python -m benchmarks.blocks readings [--layers 12,15,18] [--ridge 0.01] [--template 1]
    python -m benchmarks.blocks cost [--tokens 128] [--rounds 8]

`readings` fits a probe behind every layer as a bake does, on the last tokens of the prompts of
`political-open`, as many as `--template` says, and on text. Of topics that the probe was not fitted
on it prints how far the constant is from 1 and what opens of each class's tokens on average; then,
on the prompts of the select split at their last token, what opens, and how far the weights' ramp is
from a clip with an exact constant.

`cost` patches the demo's GGUF with rank-one gates, with one inserted block and with three, and
prints tokens per second in llama.cpp, of a prompt and of an answer, in the fastest of rounds of all
files in turn, each from another one on. The gates are of random numbers, which take as long. Both
take `--json FILE` for the rows.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from gguf import GGMLQuantizationType

from bake.activations import Conversation, Tap, collect
from bake.carriers.blank import blank_block
from bake.edits import Edit
from bake.export.layout import patch_gguf
from bake.fit.conversations import conversations_of, passages
from bake.fit.labels import Labelled
from bake.fit.ramp import ramps_of, readings, shown_classes
from bake.gguf_file import GGUFFile
from bake.llama import LlamaModel
from bake.model import LiveModel
from bake.ops import OPERATORS, Measured
from bake.ops.block_gate import mlp_input, ramp
from bake.plan import make_plan
from bake.prepare import prepare
from bake.recipe import Gate, load_recipe
from benchmarks.carriers import Row, printed

RECIPE = "political-open"
PROMPT = 256
# The types in which shipped recipes write a gate's matrices.
WRITTEN = {"rank_one": GGMLQuantizationType.Q8_0, "block": GGMLQuantizationType.F16}
THREADS = 2


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("what", choices=("readings", "cost"))
    arguments.add_argument("--layers", default="11,13,15,17,19,21,23")
    arguments.add_argument("--ridge", type=float, default=0.01)
    arguments.add_argument("--template", type=int, default=1)
    arguments.add_argument("--tokens", type=int, default=128)
    arguments.add_argument("--rounds", type=int, default=8)
    arguments.add_argument("--json", type=Path, help="a file for the rows")
    chosen = arguments.parse_args()
    if chosen.what == "readings":
        found = read(chosen.layers, chosen.ridge, chosen.template)
    else:
        found = cost(chosen.tokens, chosen.rounds)
    rows = printed(found)
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=1) + "\n")


def read(layers: str, ridge: float, template: int) -> Iterator[Row]:
    """A row a layer, of probes that are fitted one by one."""
    overrides = [
        f"edits=[{{op: gate, form: block, layers: [{layers}], strength: -1, ridge: {ridge}}}]",
        f"fit.positions={{template: {template}, answer: 0}}",
    ]
    recipe = load_recipe(RECIPE, overrides=overrides).recipe
    ready = prepare(recipe)
    (spec,) = recipe.edits
    assert isinstance(spec, Gate)
    model = LiveModel.load(ready.base.folder, ready.arch)
    limit = recipe.fit.prompts_per_class
    # Nobody asks how they are answered.
    labels = {
        role: [Labelled(one, tuple(model.render(one.text)), (), 0.0, ()) for one in prompts]
        for role, prompts in ready.part("fit", limit).items()
    }
    shown = {role: conversations_of(recipe, role, one) for role, one in labels.items()}
    shown["text"] = passages(model, ready.texts.fit[:limit])
    blanks = {layer: blank_block(ready.base, ready.arch, layer, ()) for layer in spec.layers}
    classes = shown_classes(shown, labels)
    found = readings(model, list(blanks.values()), classes, ["target"], ridge)
    chats = {
        role: [
            Conversation(ids, len(ids) - 1, ())
            for ids in (tuple(model.render(p.text)) for p in prompts)
        ]
        for role, prompts in ready.part("select", limit).items()
    }
    states = {
        role: collect(
            model,
            shown,
            {
                layer: Tap(
                    model.block(layer), "output", "every last", rows=tuple(range(len(shown)))
                )
                for layer in blanks
            },
        )
        for role, shown in chats.items()
    }
    from transformers.activations import ACT2FN

    for layer, blank in blanks.items():
        rows, opened = ramps_of(spec, found[layer])
        row: Row = {"layer": layer, "constant": percent(found[layer].error.held_out)}
        row |= {f"{role}, held out": percent(one) for role, one in opened.items()}
        inputs, farthest = mlp_input(model, blank), 0.0
        for role, moments in states.items():
            x = inputs(moments[layer].values)
            height = ramp(x, rows[:-1], rows[-1], ACT2FN[blank.activation])[:, 0]
            clip = (x @ rows[0] / (x @ rows[-1])).clamp(0, 1)
            farthest = max(farthest, float((height - clip).abs().max()))
            row[f"{role}, select"] = percent(float(height.mean()))
        yield row | {"farthest from a clip": percent(farthest)}


def cost(tokens: int, rounds: int) -> Iterator[Row]:
    """A row a file: the base, the recipe's rank-one gates, one inserted block and three."""
    recipe = load_recipe(RECIPE).recipe
    ready = prepare(recipe)
    assert ready.gguf
    base, arch = ready.base, ready.arch
    depth = arch.layer_count(base.config)
    gates = [Gate(op="gate", layers=tuple(range(13, 25)), strength=-1.0)]
    for layers in ((15,), (12, 15, 18)):
        gates.append(Gate(op="gate", form="block", layers=layers, strength=-1.0))
    with tempfile.TemporaryDirectory() as folder:
        files = {"base": ready.gguf.path}
        inserted = {"base": 0}
        for gate in gates:
            plan = make_plan(recipe.model_copy(update={"edits": (gate,)}), base, arch)
            measured = Measured(
                {layer: drawn(layer, plan.width) for layer in gate.layers},
                lambda module, _: drawn(1, base.tensors[f"{module}.weight"].shape[1]),
                base,
                {},
                lambda layer, _, width=plan.width: torch.stack(
                    [drawn(40 + layer, width), drawn(80 + layer, width)]
                ),
            )
            edits: dict[str, list[Edit]] = {}
            for one in OPERATORS["gate"].build(gate, plan.steps[0], measured, arch):
                for edit in one.edits():
                    edits.setdefault(edit.tensor, []).append(edit)
            name = f"{gate.form}, {', '.join(map(str, gate.layers))}"
            if gate.form == "rank_one":
                name = f"{gate.form}, {len(edits)} matrices"
            inserted[name] = len(gate.layers) if gate.form == "block" else 0
            files[name] = Path(folder) / f"{len(files)}.gguf"
            patch_gguf(
                *(plan, arch, base.config, GGUFFile.open(ready.gguf.path), edits),
                files[name],
                edited_type=WRITTEN[gate.form],
            )
        llamas = {
            name: LlamaModel(path, context=PROMPT + tokens, parallel=1, threads=THREADS)
            for name, path in files.items()
        }
        prompt = torch.randint(
            100, 10_000, (PROMPT,), generator=torch.Generator().manual_seed(0)
        ).tolist()
        reading: dict[str, list[float]] = {name: [] for name in files}
        answering: dict[str, list[float]] = {name: [] for name in files}
        turns = list(llamas.items())
        for turn in range(rounds):
            # Nobody is always the first.
            first = turn % len(turns)
            for name, llama in turns[first:] + turns[:first]:
                start = time.perf_counter()
                llama.logits(prompt)
                reading[name].append(PROMPT / (time.perf_counter() - start))
                start = time.perf_counter()
                written = llama.generate([prompt[:8]], tokens)[0]
                answering[name].append(len(written) / (time.perf_counter() - start))
    for name in files:
        row: Row = {"file": name, "layers": f"{depth / (depth + inserted[name]):.3f}"}
        for what, found in (("prompt", reading), ("answer", answering)):
            best, base_best = max(found[name]), max(found["base"])
            row[f"{what}, tokens/s"] = f"{best:.1f}"
            row[f"{what}, of the base"] = f"{best / base_best:.3f}"
        yield row


def drawn(seed: int, width: int) -> torch.Tensor:
    """A random vector that a probe may be."""
    return torch.randn(width, generator=torch.Generator().manual_seed(seed)) / width**0.5


def percent(share: float) -> str:
    """A share as tables have it."""
    return f"{100 * share:.1f} %"


if __name__ == "__main__":
    main()
