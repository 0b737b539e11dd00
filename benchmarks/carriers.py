"""Parity of every carrier: on real models, and on a tiny model of every row of the table.

    python -m benchmarks.carriers [--only real|tiny] [--json FILE]

Real models are SmolLM2-135M-Instruct and the demo. A random direction, half as long as the
residual stream is on average, is added behind the attention of a layer; the edit of the
`ridge` carrier is laid on the live model in float32. Printed is how far its constant is from
1 (root mean square) and the lost share KL(hooked‖baked) / KL(hooked‖base), in domain (prose
and chats that it was not fitted on) and out of domain: code, other languages, tables and
markup, and one long context, kinds of which the fit saw nothing.

Tiny models are random, of the real classes, and go through the disk. Printed is
max |Δ logit| of baked against hooked over the steering's own effect, for every carrier that
the row offers, and max |r·h| / |h| over layers and positions after an ablation of every
writer, written in float32 and in bfloat16. A ridge carrier's constant is exact there, since
there are fewer tokens than dimensions: what is left is what a post-norm rescales.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from bake.activations import Conversation, Tap, collect
from bake.arch import Arch
from bake.archs import find_arch
from bake.carriers import carry
from bake.checkpoint import Checkpoint
from bake.demo import materialise
from bake.demo.base import write_base
from bake.edits import Edit, apply_all
from bake.errors import ArchitectureError
from bake.fit.constant import constant_error, constant_readout, own_text, with_constants
from bake.hooks import Intervention, on_output, steered
from bake.model import Batch, LiveModel, batches
from bake.ops import OPERATORS, Measured
from bake.ops.add import Add
from bake.plan import make_plan
from bake.prompts import Prompt, load_prompts
from bake.recipe import Add as AddSpec
from bake.recipe import Recipe
from bake.stream import write_checkpoint
from bake.verify import Divergence, check_files
from tests.tiny import TINY, write_tiny

LAYERS = (8, 15, 22)
RIDGE: float = AddSpec.model_fields["ridge"].default
PASSAGES, TOKENS, LONG = 14, 56, 640
# One position in so many is compared: the vocabulary makes comparing as dear as running.
STEP = 3
# Topics of the built-in texts by kind; all others are prose and chats.
KINDS: Mapping[str, tuple[str, ...]] = {
    "code": ("code-",),
    "languages": (
        *("spanish-", "french-", "german-", "chinese-", "arabic-", "hindi-", "japanese-"),
        *("portuguese-", "russian-", "italian-"),
    ),
    "markup": ("table-", "json-", "csv-", "xml-", "yaml-", "markdown-", "timetable", "changelog"),
}
Texts = Mapping[str, Sequence[Conversation]]
Row = dict[str, object]

IDS = torch.tensor([[1, 7, 30, 11, 52, 90, 4, 2], [1, 8, 31, 12, 53, 91, 5, 2]])
BATCH = Batch(IDS, torch.ones_like(IDS), (0, 1))
SPOKEN = [Conversation(tuple(ids.tolist()), 7, (7,)) for ids in IDS]


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--only", choices=("real", "tiny"))
    arguments.add_argument("--json", type=Path)
    chosen = arguments.parse_args()
    torch.set_num_threads(2)
    found: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        if chosen.only != "tiny":
            base = Path(scratch, "base")
            base.mkdir()
            write_base(base)
            models = {"SmolLM2-135M-Instruct": base, "demo": materialise().model}
            rows = (row for name, folder in models.items() for row in real(name, folder))
            found["real"] = printed(rows)
        if chosen.only != "real":
            found["tiny"] = printed(tiny(name, Path(scratch, name)) for name in TINY)
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def printed(rows: Iterator[Row]) -> list[Row]:
    """Print rows as they come, as a Markdown table whose columns are those of the first."""
    found: list[Row] = []
    for row in rows:
        if not found:
            print("\n|", " | ".join(row), "|")
            print("|", " | ".join("---" for _ in row), "|")
        print("|", " | ".join(map(in_words, row.items())), "|", flush=True)
        found.append(row)
    return found


def in_words(cell: tuple[str, object]) -> str:
    """A share in percent, another number with its exponent, what is not there as a dash."""
    name, value = cell
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    if name.startswith(("lost", "constant")):
        return f"{value:.2%}"
    return f"{value:.0e}" if value else "0"


# Real models.


def real(name: str, folder: Path) -> Iterator[Row]:
    """The ridge carrier at the attention of several layers, fitted in one pass for all.

    What a writer reads is the same with and without a vector added behind it, so the
    statistics of an unsteered model are those with the steering in force.
    """
    base = Checkpoint.open(folder)
    arch = find_arch(base.config, str(folder), base.tensors)
    model = LiveModel.load(folder, arch, torch.float32)
    fitted, held_out = texts(model)
    inputs = {layer: carry(base, arch, layer, "mid", "ridge", ())[0] for layer in LAYERS}
    taps = {
        layer: Tap(model.module(one.tensor.removesuffix(".weight")), "input", "decision", "second")
        for layer, one in inputs.items()
    }
    blocks = {
        f"norm {layer}": Tap(model.block(layer), "output", "decision", "second") for layer in LAYERS
    }
    classes = {kind: collect(model, found, taps, 8) for kind, found in fitted.items()}
    measured = {kind: collect(model, found, taps, 8) for kind, found in held_out.items()}
    norms = collect(model, fitted["prose"], blocks, 8)
    adds = []
    for layer, carried in inputs.items():
        readout = constant_readout([found[layer] for found in classes.values()], RIDGE)
        direction = torch.randn(model.model.config.hidden_size, generator=seeded(layer))
        length = 0.5 * float(norms[f"norm {layer}"].gram.trace().sqrt())
        vector = length * direction / direction.norm()
        adds.append(Add(layer, "mid", vector, carried, readout.float()))
    shares = {kind: lost(model, adds, found) for kind, found in held_out.items()}
    for number, add in enumerate(adds):
        assert add.readout is not None
        by_kind = {kind: found[number] for kind, found in shares.items()}
        row: Row = {"model": name, "layer": add.layer}
        for kind, moments in measured.items():
            row[f"constant, {kind}"] = constant_error(add.readout.double(), moments[add.layer])
        row |= {f"lost, {kind}": one.lost_share for kind, one in by_kind.items()}
        outside = [one for kind, one in by_kind.items() if kind != "in domain"]
        row["lost, out of domain"] = sum(one.lost for one in outside) / sum(
            one.effect for one in outside
        )
        yield row


def texts(model: LiveModel) -> tuple[Texts, Texts]:
    """What the constant is fitted on, by class, and what it is measured on, by kind."""
    everything = load_prompts("text", language="any")
    by_kind = {
        kind: [one for one in everything if one.topic.startswith(topics)]
        for kind, topics in KINDS.items()
    }
    others = {one for found in by_kind.values() for one in found}
    prose = [one for one in everything if one not in others]
    general = load_prompts("general")
    fitted = {
        "prose": passages(model, prose[::2], 2 * TOKENS),
        "chats": [spoken(model.render(one.text)) for one in general[::4]],
        "own text": own_text(model),
    }
    inside = passages(model, prose[1::2][:PASSAGES], TOKENS)
    chats = [spoken(model.render(one.text)) for one in general[1::32]]
    context = "\n\n".join(one.text for one in prose[1::2])
    return fitted, {
        "in domain": [*inside, *chats],
        **{kind: passages(model, found[:PASSAGES], TOKENS) for kind, found in by_kind.items()},
        "long context": [spoken(tokens(model, context)[:LONG])],
    }


def passages(model: LiveModel, chosen: Sequence[Prompt], length: int) -> list[Conversation]:
    """The beginnings of texts."""
    return [spoken(tokens(model, one.text)[:length]) for one in chosen]


def tokens(model: LiveModel, text: str) -> list[int]:
    """The ids of a text without a template."""
    found: list[int] = model.tokenizer(text, add_special_tokens=False).input_ids
    return found


def spoken(ids: Sequence[int]) -> Conversation:
    """A conversation of which every token counts."""
    return Conversation(tuple(ids), len(ids) - 1, tuple(range(len(ids))))


def lost(model: LiveModel, adds: Sequence[Add], chosen: Sequence[Conversation]) -> list[Divergence]:
    """How far the model edited for each addition is from the hooked one."""
    totals = [Divergence() for _ in adds]
    for batch in batches([one.ids for one in chosen], model.tokenizer.pad_token_id, 8):
        base = compared(model, batch)
        for add, total in zip(adds, totals, strict=True):
            with steered(model, [add]):
                hooked = compared(model, batch)
            with edited(model, add.edits()):
                total.add(base, hooked, compared(model, batch))
    return totals


def compared(model: LiveModel, batch: Batch) -> Tensor:
    """The logits of a batch [n, vocabulary] at every third real position."""
    return model.logits(batch)[batch.mask.bool()][::STEP]


@contextmanager
def edited(model: LiveModel, edits: Sequence[Edit]) -> Iterator[None]:
    """The live model with the edits in its weights."""
    undo: list[tuple[torch.nn.Parameter, Tensor]] = []
    for edit in edits:
        weight = model.module(edit.tensor.removesuffix(".weight")).weight
        assert isinstance(weight, torch.nn.Parameter)
        undo.append((weight, weight.data))
        weight.data = apply_all([edit], weight.data)
    try:
        yield
    finally:
        for weight, data in undo:
            weight.data = data


# Tiny models.


@dataclass(frozen=True)
class Base:
    """A tiny checkpoint with its row of the table, and its own logits."""

    folder: Path
    checkpoint: Checkpoint
    arch: Arch
    model: LiveModel
    logits: Tensor


def tiny(name: str, folder: Path) -> Row:
    """Every carrier that a row offers, and what an ablation leaves of its direction."""
    write_tiny(name, folder / "base")
    checkpoint = Checkpoint.open(folder / "base")
    arch = find_arch(checkpoint.config, name, checkpoint.tensors)
    model = LiveModel.load(folder / "base", arch)
    base = Base(folder, checkpoint, arch, model, model.logits(BATCH))
    row: Row = {"row": name}
    for carrier in carriers():
        for site in ("in",) if carrier == "embedding" else ("mid", "out"):
            spec = {"op": "add", "layer": 0 if site == "in" else 1, "site": site}
            title = f"{carrier}, {site}"
            row[title] = lost_through_disk(base, title, spec | {"carrier": carrier})
    for site in ("attention", "mlp"):
        spec = {"op": "gate", "layers": [1], "sites": [site]}
        row[f"gate, {site}"] = lost_through_disk(base, f"gate, {site}", spec)
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        row[f"ablated, {kind}"] = left_after_ablation(name, folder / kind, dtype)
    return row


def carriers() -> tuple[str, ...]:
    """The names of all carriers, as recipes have them."""
    named = get_args(AddSpec.model_fields["carrier"].annotation)
    return tuple(one for one in named if one != "auto")


def lost_through_disk(base: Base, title: str, spec: Mapping[str, object]) -> float | None:
    """max |Δ logit| over the steering's own effect; None where the row refuses the edit."""
    recipe = recipe_of({"strength": 0.3, "ridge": 1e-9} | dict(spec))
    try:
        built = interventions(base.checkpoint, base.arch, recipe)
    except ArchitectureError:
        return None
    pairs = [(recipe.edits[0], one) for one in built]
    built, _ = with_constants(base.model, pairs, [SPOKEN], SPOKEN)
    with steered(base.model, built):
        hooked = base.model.logits(BATCH)
    after = written(base.checkpoint, base.arch, recipe, built, base.folder / title).logits(BATCH)
    return float((after - hooked).abs().max() / (hooked - base.logits).abs().max())


def left_after_ablation(name: str, folder: Path, dtype: torch.dtype) -> float:
    """max |r·h| / |h| in float32 arithmetic, of weights written in `dtype`."""
    write_tiny(name, folder / "base", dtype=dtype)
    checkpoint = Checkpoint.open(folder / "base")
    arch = find_arch(checkpoint.config, name, checkpoint.tensors)
    layers = arch.layer_count(checkpoint.config)
    recipe = recipe_of({"op": "ablate", "layers": list(range(layers)), "embeddings": True})
    built = interventions(checkpoint, arch, recipe)
    model = written(checkpoint, arch, recipe, built, folder / "out")
    direction = drawn(layers // 2)
    direction = direction / direction.norm()
    seen: list[float] = []

    def watch(h: Tensor, _: object) -> Tensor:
        seen.append(float(((h @ direction).abs() / h.norm(dim=-1)).max()))
        return h

    handles = [on_output(model.block(layer), watch) for layer in range(layers)]
    model.logits(BATCH)
    for handle in handles:
        handle.remove()
    return max(seen)


def interventions(base: Checkpoint, arch: Arch, recipe: Recipe) -> tuple[Intervention, ...]:
    """What the recipe's operators build from random directions and probes."""
    measured = Measured(
        {layer: drawn(layer) for layer in range(8)},
        lambda module, _: drawn(len(module), base.find(f"{module}.weight").shape[1]),
        base,
        {},
    )
    plan = make_plan(recipe, base, arch)
    return tuple(
        one
        for spec, step in zip(recipe.edits, plan.steps, strict=True)
        for one in OPERATORS[spec.op].build(spec, step, measured, arch)
    )


def written(
    base: Checkpoint, arch: Arch, recipe: Recipe, built: Sequence[Intervention], folder: Path
) -> LiveModel:
    """Write the edits, compare the files, and load them with stock classes in float32."""
    plan = make_plan(recipe, base, arch)
    made: dict[str, list[Edit]] = {}
    for one in built:
        for edit in one.edits():
            made.setdefault(edit.tensor, []).append(edit)
    folder.mkdir()
    write_checkpoint(base, made, plan.created, plan.config, folder)
    check_files(base, Checkpoint.open(folder), made, {one.name for one in plan.created})
    return LiveModel.load(folder, arch, torch.float32)


def recipe_of(spec: Mapping[str, object]) -> Recipe:
    """A recipe of one edit, with what of the given its operator knows."""
    known = {"add": {"strength", "ridge"}, "gate": {"strength"}, "ablate": set[str]()}
    shared = {"strength", "ridge"} - known[str(spec["op"])]
    values = {key: value for key, value in spec.items() if key not in shared}
    return Recipe.model_validate(
        {"name": "benchmark", "edits": [values], "runtimes": ["transformers"]}
        | {"evaluate": {"runtimes": ["transformers"]}}
    )


def drawn(seed: int, width: int = 32) -> Tensor:
    """A random vector."""
    return torch.randn(width, generator=seeded(seed))


def seeded(seed: int) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


if __name__ == "__main__":
    sys.exit(main())
