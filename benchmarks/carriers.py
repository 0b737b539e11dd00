"""Parity of the carriers of an added vector on a real model, one line a carrier and site.

    python benchmarks/carriers.py [FOLDER]

FOLDER is a llama-like checkpoint; without one it is the demo's. A random direction, half
as long as the residual stream is on average, is added at a site; each carrier's edit is
laid on the live model in float32. Printed is the lost share KL(hooked‖baked) /
KL(hooked‖base) on text of the kinds that the constant of the ridge carrier was fitted on
(prose and chats, held out) and on other kinds (code, other languages, tables).
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from bake.activations import Conversation, Tap, collect
from bake.archs import find_arch
from bake.carriers import carry
from bake.checkpoint import Checkpoint
from bake.demo import materialise
from bake.edits import Edit, apply_all
from bake.fit.constant import constant_error, with_constants
from bake.hooks import steered
from bake.model import LiveModel, batches
from bake.ops.add import Add
from bake.prompts import Prompt, load_prompts
from bake.recipe import Add as Spec
from bake.verify import Divergence

LAYERS = (8, 15, 22)
OTHER = ("code-", "spanish-", "french-", "german-", "chinese-", "arabic-", "hindi-", "japanese-")
OTHER += ("portuguese-", "russian-", "italian-", "table-", "json-", "csv-", "xml-", "yaml-")


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else materialise().model
    base = Checkpoint.open(folder)
    arch = find_arch(base.config, str(folder))
    model = LiveModel.load(folder, arch, torch.float32)
    texts = load_prompts("text")
    prose = [one for one in texts if not one.topic.startswith(OTHER)]
    fitted, inside = (_passages(model, prose[half::2]) for half in (0, 1))
    outside = _passages(model, [one for one in texts if one.topic.startswith(OTHER)])
    print("carrier    site  layer  constant: fitted, in, out   lost share: in, out domain")
    for site in ("mid", "out"):
        for layer in LAYERS:
            norm = _norm(model, layer, inside)
            direction = torch.randn(arch.width(base.config))
            vector = 0.5 * norm * direction / direction.norm()
            for carrier in ("bias", "ridge"):
                found, _ = carry(base, arch, layer, site, carrier, ["transformers"])
                add = Add(layer, site, vector, found)
                spec = Spec(op="add", layer=layer, site=site, strength=1.0, constant_error=10)
                (ready,), errors = with_constants(model, [(spec, add)], fitted, outside)
                shares = [_lost(model, ready, part) for part in (inside, outside)]
                constant = " " * 24
                for name, one in errors.items():
                    assert ready.readout is not None
                    near = _constant_error(model, ready, name, inside)
                    constant = f"{one.fitted:7.1%}{near:7.1%}{one.held_out:7.1%}   "
                print(
                    f"{carrier:<10} {site:<5} {layer:>5}  {constant}  "
                    f"{shares[0]:10.1e} {shares[1]:10.1e}",
                    flush=True,
                )


def _passages(model: LiveModel, texts: Sequence[Prompt]) -> list[Conversation]:
    found = []
    for text in texts:
        ids = tuple(model.tokenizer(text.text, add_special_tokens=False).input_ids[:96])
        found.append(Conversation(ids, len(ids) - 1, tuple(range(len(ids)))))
    return found


def _norm(model: LiveModel, layer: int, texts: Sequence[Conversation]) -> float:
    """The mean norm of the residual stream behind a block."""
    taps = {"h": Tap(model.block(layer), "output", "decision", "second")}
    return float(collect(model, texts, taps)["h"].gram.trace().sqrt())


def _constant_error(
    model: LiveModel, add: Add, tensor: str, texts: Sequence[Conversation]
) -> float:
    module = model.model.get_submodule(tensor.removesuffix(".weight"))
    with steered(model, [add]):
        moments = collect(model, texts, {"a": Tap(module, "input", "decision", "second")})
    assert add.readout is not None
    return constant_error(add.readout.double(), moments["a"])


def _lost(model: LiveModel, add: Add, texts: Sequence[Conversation]) -> float:
    total = Divergence()
    for batch in batches([one.ids for one in texts], model.tokenizer.pad_token_id, 4):
        real = batch.mask.bool()
        base = model.logits(batch)[real]
        with steered(model, [add]):
            hooked = model.logits(batch)[real]
        with _edited(model, add.edits()):
            total.add(base, hooked, model.logits(batch)[real])
    return total.lost_share


@contextmanager
def _edited(model: LiveModel, edits: Sequence[Edit]) -> Iterator[None]:
    """The live model with the edits in its weights; a bias that it lacks is made."""
    undo = []
    for edit in edits:
        name, _, kind = edit.tensor.rpartition(".")
        module = model.model.get_submodule(name)
        old = getattr(module, kind)
        weight = torch.zeros(module.weight.shape[0]) if old is None else old.data
        undo.append((module, kind, old))
        setattr(module, kind, torch.nn.Parameter(apply_all([edit], weight), requires_grad=False))
    try:
        yield
    finally:
        for module, kind, old in undo:
            setattr(module, kind, old)


if __name__ == "__main__":
    main()
