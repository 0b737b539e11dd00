"""Parity of every carrier: on real models, and on a tiny model of every row of the table.

    python -m benchmarks.carriers [--only real|tiny] [--json FILE]

Real models are SmolLM2-135M-Instruct and the demo. A random direction, half as long as the
residual stream is on average, is added behind the attention of a layer; the edit of the
`ridge` carrier is laid on the live model in float32. Its constant is fitted as a bake fits it
(`as bake`: chats, the fit split of the built-in texts, text that the model draws), and without
the texts of other kinds than prose (`prose`). Printed is how far the constant is from 1 (root
mean square) and the lost share KL(hooked‖baked) / KL(hooked‖base), on passages.jsonl beside
this file and on held-out chats: in domain (prose and chats) and out of domain, which is code,
languages of which the fit has nothing, tables and markup, and one long context. No passage
there was used to choose anything.

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
from bake.prompts import load_prompts, load_splits
from bake.recipe import Add as AddSpec
from bake.recipe import Recipe
from bake.stream import write_checkpoint
from bake.verify import Divergence, check_files
from tests.tiny import TINY, write_tiny

LAYERS = (8, 15, 22)
RIDGE: float = AddSpec.model_fields["ridge"].default
TOKENS, LONG = 96, 640
# One position in so many is compared: the vocabulary makes comparing as dear as running.
STEP = 4
# What the constant is fitted on, by classes of texts.
FITS: Mapping[str, Sequence[str]] = {
    "as bake": ("texts", "chats", "own text"),
    "prose": ("prose", "chats", "own text"),
}
FRESH = Path(__file__).parent / "passages.jsonl"
Texts = Mapping[str, Sequence[Conversation]]
Row = dict[str, object]

# Wide enough for an inserted block.
WIDE = {"intermediate_size": 80, "block_ff_dim": 80}
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
    fitted, held_out = fitting_texts(model), fresh_texts(model)
    inputs = {layer: carry(base, arch, layer, "mid", "ridge", ())[0] for layer in LAYERS}
    taps = {
        layer: Tap(model.module(one.tensor.removesuffix(".weight")), "input", "decision", "second")
        for layer, one in inputs.items()
    }
    blocks = {layer: Tap(model.block(layer), "output", "decision", "second") for layer in LAYERS}
    classes = {kind: collect(model, found, taps, 8) for kind, found in fitted.items()}
    measured = {kind: collect(model, held_out[kind], taps, 8) for kind in ("in domain", "code")}
    norms = collect(model, fitted["prose"], blocks, 8)
    adds: dict[tuple[int, str], Add] = {}
    for layer, carried in inputs.items():
        direction = torch.randn(model.model.config.hidden_size, generator=seeded(layer))
        length = 0.5 * float(norms[layer].gram.trace().sqrt())
        vector = length * direction / direction.norm()
        for fit, kinds in FITS.items():
            readout = constant_readout([classes[kind][layer] for kind in kinds], RIDGE)
            adds[layer, fit] = Add(layer, "mid", vector, carried, readout.float())
    shares = {kind: lost(model, adds, found) for kind, found in held_out.items()}
    for (layer, fit), add in adds.items():
        assert add.readout is not None
        by_kind = {kind: found[layer, fit] for kind, found in shares.items()}
        row: Row = {"model": name, "layer": layer, "fitted": fit}
        for kind, moments in measured.items():
            row[f"constant, {kind}"] = constant_error(add.readout.double(), moments[layer])
        row |= {f"lost, {kind}": one.lost_share for kind, one in by_kind.items()}
        outside = [one for kind, one in by_kind.items() if kind != "in domain"]
        row["lost, out of domain"] = sum(one.lost for one in outside) / sum(
            one.effect for one in outside
        )
        yield row


def fitting_texts(model: LiveModel) -> Texts:
    """The classes of texts that a constant may be fitted on."""
    everything = load_splits("text", language="any").fit
    prose = [one for one in everything if one.extra["kind"] == "prose"]
    return {
        "texts": [passage(model, one.text) for one in everything],
        "prose": [passage(model, one.text) for one in prose],
        "chats": [spoken(model.render(one.text)) for one in load_prompts("general")[::4]],
        "own text": own_text(model),
    }


def fresh_texts(model: LiveModel) -> Texts:
    """What the constant is measured on, by kind: in domain, and kinds out of it."""
    rows = [json.loads(line) for line in FRESH.read_text(encoding="utf-8").splitlines()]
    kinds: dict[str, list[str]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row["text"])
    prose = kinds.pop("prose")
    chats = [spoken(model.render(one.text)) for one in load_prompts("general")[1::32]]
    return {
        "in domain": [*(passage(model, text) for text in prose), *chats],
        **{kind: [passage(model, text) for text in found] for kind, found in kinds.items()},
        "long context": [passage(model, "\n\n".join(prose), LONG)],
    }


def passage(model: LiveModel, text: str, length: int = TOKENS) -> Conversation:
    """The beginning of a text, without a template."""
    ids = model.tokenizer(text, add_special_tokens=False).input_ids
    return spoken(ids[:length])


def spoken(ids: Sequence[int]) -> Conversation:
    """A conversation of which every token counts."""
    return Conversation(tuple(ids), len(ids) - 1, tuple(range(len(ids))))


def lost(
    model: LiveModel, adds: Mapping[tuple[int, str], Add], chosen: Sequence[Conversation]
) -> dict[tuple[int, str], Divergence]:
    """How far the model edited for each addition, by layer and fit, is from the hooked one.

    At one layer the vector is the same for every fit, and so is the hooked model.
    """
    totals = {key: Divergence() for key in adds}
    for batch in batches([one.ids for one in chosen], model.tokenizer.pad_token_id, 8):
        base = compared(model, batch)
        hooked: dict[int, Tensor] = {}
        for (layer, fit), add in adds.items():
            if layer not in hooked:
                with steered(model, [add]):
                    hooked[layer] = compared(model, batch)
            with edited(model, add.edits()):
                totals[layer, fit].add(base, hooked[layer], compared(model, batch))
    return totals


def compared(model: LiveModel, batch: Batch) -> Tensor:
    """The logits of a batch [n, vocabulary] in every fourth column, where there is a token."""
    columns = torch.arange(0, batch.ids.shape[1], STEP)
    with torch.inference_mode():
        logits: Tensor = model.model(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            position_ids=(batch.mask.cumsum(-1) - 1).clamp_min(0),
            logits_to_keep=columns,
        ).logits
    return logits[batch.mask[:, columns].bool()]


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
    write_tiny(name, folder / "base", **WIDE)
    checkpoint = Checkpoint.open(folder / "base")
    arch = find_arch(checkpoint.config, name, checkpoint.tensors)
    model = LiveModel.load(folder / "base", arch)
    base = Base(folder, checkpoint, arch, model, model.logits(BATCH))
    row: Row = {"row": name}
    for carrier in carriers():
        for site in SITES.get(carrier, ("mid", "out")):
            # The first block of a mixture of experts may be a dense one.
            layer = 0 if carrier == "block" or site == "in" else 1
            spec = {"op": "add", "layer": layer, "site": site}
            title = f"{carrier}, {site}"
            row[title] = lost_through_disk(base, title, spec | {"carrier": carrier})
    for site in ("attention", "mlp"):
        spec = {"op": "gate", "layers": [1], "sites": [site]}
        row[f"gate, {site}"] = lost_through_disk(base, f"gate, {site}", spec)
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        row[f"ablated, {kind}"] = left_after_ablation(name, folder / kind, dtype)
    return row


SITES: Mapping[str, Sequence[str]] = {"embedding": ("in",), "block": ("out",)}


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
        lambda layer, _: torch.stack([drawn(40 + layer), drawn(80 + layer)]) / 32**0.5,
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
    write_checkpoint(base, made, plan.created, plan.config, folder, renamed=plan.renamed)
    check_files(base, Checkpoint.open(folder), made, plan.created, plan.renamed)
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
