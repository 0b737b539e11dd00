"""Patched GGUFs: parity by type of the base and of the edited tensors, and speed.

    python -m benchmarks.gguf bias|lost|converted|disk [--folder DIR] [--gib N]
        [--edit gate|ablate] [--base Q8_0|Q4_K_M] [--type TYPE]
    python -m benchmarks.gguf floor --baked DIR [--folder DIR]

`bias` quantises SmolLM2 to each type with llama.cpp, adds a vector behind a block by a bias, and
compares with the base under llama.cpp's own control vector: max |Δ logit|, and on how many
positions all logits are equal to the last bit. Beside it stands the control vector against itself
where the text is read token by token.

`lost` fits political-open's gates on the demo, and ablates the same directions from the same
blocks, patches GGUFs of several types with them, and prints the lost share
KL(hooked‖baked) / KL(hooked‖base). *Moved*: hooked is the base GGUF moved by what the hooks move
in the checkpoint. *Exact*: it is the base GGUF with the edits in float32. *Weights*: the same with
every file's tensors in float32, so that nothing is rounded but what was written. Beside them
stands what the exact file loses against itself where it is read token by token, and the LoRA of
the same edits on the base. What is fitted is kept in the folder for the next time.

`converted` prints the same of the edited checkpoint, converted by llama.cpp and quantised anew,
against the unedited one on the same road.

`floor` takes the edits of a baked folder to its base in F32 and in F16, converted by llama.cpp, and
to its base GGUF: max |Δ logit| and the lost share of what is written in F16, against the edits in
float32. Beside them stands how far the file with the edits in float32 is from itself where nothing
but the rounding of a float32 changes: where it is read token by token, and with the gains of the
first norm one float32 further.

`disk` patches a synthetic Q4_K_M file of N GiB: its time beside that of `cp`, and the memory.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import llama_cpp
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter

from bake import llama
from bake.demo import materialise
from bake.demo.base import base_gguf
from bake.directions import save_directions
from bake.edits import AddVector, CreatedTensor, Edit, LowRank, RemoveSubspace
from bake.errors import VerificationError
from bake.export.adapter import write_gguf_lora
from bake.export.convert import convert
from bake.export.converter import find_converter
from bake.export.gguf import patch
from bake.export.importance import collect_importance
from bake.export.inputs import input_moments
from bake.export.layout import gguf_edits, patch_gguf, write_exact
from bake.export.quantise import Quantisation
from bake.export.quantise import quantise as quantised_anew
from bake.fit.run import fit
from bake.ggml import quantised
from bake.gguf_file import GGUFFile
from bake.hooks import Intervention, edits_by_tensor, steered
from bake.imatrix import read_importance, write_importance
from bake.judge.choice import find_judge
from bake.llama import LlamaModel, _backend_log
from bake.measure import compared_tokens, in_turn
from bake.model import LiveModel
from bake.plan import Plan
from bake.prepare import Prepared, prepare
from bake.recipe import load_recipe
from bake.runtimes.baked import Baked
from bake.stream import write_checkpoint
from bake.verify import Divergence

Kind = GGMLQuantizationType
FILE_TYPES = {
    "F32": llama_cpp.LLAMA_FTYPE_ALL_F32,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q6_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
    "IQ4_XS": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_XS,
    "IQ3_S": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ3_S,
}
LAYERS = (8, 15, 22)
QUESTIONS = (
    "What is the capital of France?",
    "Name three fruits, please, and say which one of them you would eat first.",
    "Who wrote Hamlet, and when?",
    "What is 7 times 8?",
)
CASES = {"Q8_0": ("auto", "q8_0", "f16", "same"), "Q4_K_M": ("auto", "q8_0", "f16", "same")}
EDITS_OF_DEMO = ("gate", "ablate")
OPTIONS = ("converted", "patched, auto", "imatrix", "edited_type: q8_0")
BLOCKS = "15-23"
PROMPTS, SEQUENCES, ANSWER = 40, 16, 16


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("what", choices=("bias", "lost", "converted", "floor", "disk"))
    arguments.add_argument("--folder", type=Path)
    arguments.add_argument("--baked", type=Path)
    arguments.add_argument("--gib", type=float, default=4.0)
    arguments.add_argument("--base", choices=tuple(CASES), action="append")
    arguments.add_argument("--edit", choices=EDITS_OF_DEMO, action="append")
    arguments.add_argument("--type", choices=("auto", "q8_0", "f16", "same"), action="append")
    arguments.add_argument("--option", choices=OPTIONS, action="append")
    chosen = arguments.parse_args()
    torch.set_num_threads(2)
    edits, bases = chosen.edit or EDITS_OF_DEMO, chosen.base or tuple(CASES)
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if chosen.what == "bias":
            bias(folder)
        elif chosen.what == "lost":
            lost(folder, edits, bases, chosen.type)
        elif chosen.what == "converted":
            converted(folder, edits, bases, chosen.option)
        elif chosen.what == "floor":
            floor(folder, chosen.baked)
        else:
            disk(folder, chosen.gib)


def quantise(source: Path, name: str, folder: Path) -> Path:
    """The file of another type by llama.cpp, as llama-quantize makes it."""
    output = folder / f"{source.stem}.{name}.gguf"
    if not output.exists():
        _backend_log()
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype, parameters.nthread = FILE_TYPES[name], 2
        parameters.allow_requantize = True
        made = output.with_suffix(".part")
        failed = llama_cpp.llama_model_quantize(
            str(source).encode(), str(made).encode(), parameters
        )
        if failed:
            raise RuntimeError(f"llama.cpp cannot quantise {source} to {name}")
        made.rename(output)
    return output


def bias(folder: Path) -> None:
    """A bias against llama.cpp's control vector, and that against itself, token by token."""
    print("base | matrices | max abs delta | equal | the same by token | equal | effect")
    for name in FILE_TYPES:
        path = quantise(base_gguf(), name, folder)
        base = GGUFFile.open(path)
        types = Counter(one.type.name for one in base.tensors.values() if len(one.shape) > 1)
        effect = 0.0
        found: dict[str, list[np.ndarray]] = {"bias": [], "token by token": []}
        with LlamaModel(path, context=128, parallel=1, threads=2) as model:
            texts = [
                model.tokenize(f"<|im_start|>user\n{one}<|im_end|>\n<|im_start|>assistant\n")
                for one in QUESTIONS
            ]
            plain = [model.logits(ids) for ids in texts]
            for layer in LAYERS:
                vectors = torch.zeros(model.layers, model.hidden_size)
                generator = torch.Generator().manual_seed(layer)
                drawn = torch.randn(model.hidden_size, generator=generator)
                vectors[layer] = 4 * torch.nn.functional.normalize(drawn, dim=0)
                model.set_control_vector(vectors)
                wanted = [model.logits(ids) for ids in texts]
                for ids, one in zip(texts, wanted, strict=True):
                    alone = one_by_one(model, ids)
                    found["token by token"].append(np.abs(alone - one).max(1))
                model.set_control_vector(None)
                output = folder / "biased.gguf"
                output.unlink(missing_ok=True)
                stem = f"blk.{layer}.ffn_down"
                created = CreatedTensor(
                    f"{stem}.bias", (model.hidden_size,), "F32", f"{stem}.weight"
                )
                edits = {created.name: [AddVector(created.name, vectors[layer])]}
                patch(base, edits, output, edited_type="auto", created=[created])
                with LlamaModel(output, context=128, parallel=1, threads=2) as baked:
                    for ids, one, other in zip(texts, wanted, plain, strict=True):
                        found["bias"].append(np.abs(baked.logits(ids) - one).max(1))
                        effect = max(effect, float(np.abs(one - other).max()))
        shown = ", ".join(f"{count} {kind}" for kind, count in types.most_common())
        columns = [np.concatenate(each) for each in found.values()]
        figures = " | ".join(f"{one.max():.2g} | {(one == 0).mean():.0%}" for one in columns)
        print(f"{name} | {shown} | {figures} | {effect:.3g}", flush=True)


def one_by_one(model: LlamaModel, ids: Sequence[int]) -> np.ndarray:
    """The logits of a text that is read in batches of one token: other sums, the same numbers."""
    whole, llama._BATCH = llama._BATCH, 1
    try:
        return model.logits(ids)
    finally:
        llama._BATCH = whole


@dataclass(frozen=True)
class Steering:
    """Interventions on the demo, and what they move in the checkpoint on some token ids."""

    interventions: Sequence[Intervention]
    sequences: Sequence[Sequence[int]]
    moved: Sequence[torch.Tensor]

    @property
    def edits(self) -> dict[str, list[Edit]]:
        """The edits by tensor."""
        return edits_by_tensor(self.interventions)


def lost(
    folder: Path, edits: Sequence[str], bases: Sequence[str], types: Sequence[str] | None
) -> None:
    """Lost shares of gate and ablation by type."""
    for what, ready, steering, plan, model, prompts in steerings(folder, edits):
        for name in bases:
            base = GGUFFile.open(quantise(materialise().gguf, name, folder))
            compared = Compared.of(ready, plan, base, steering, folder)
            print(f"{what} | {name} | the exact file by token | {compared.itself(folder)}")
            lora = folder / "lora.gguf"
            lora.unlink(missing_ok=True)
            arguments = (steering.edits, base, ready.arch, ready.base.config, "lora", lora)
            write_gguf_lora(*arguments)
            print(f"{what} | {name} | LoRA | {compared.by_lora(base.path, lora)}", flush=True)
            inputs = input_moments(
                *(model, steering.interventions, base, ready.base.config, steering.edits, prompts)
            )
            for kind in types or CASES[name]:
                output = folder / "patched.gguf"
                output.unlink(missing_ok=True)
                began = time.perf_counter()
                try:
                    reports = patch_gguf(
                        *(plan, ready.arch, ready.base.config, base, steering.edits, output),
                        edited_type=kind if kind in ("auto", "same") else Kind[kind.upper()],
                        inputs=inputs,
                    )
                except VerificationError as error:
                    print(f"{what} | {name} | {kind} | refused: {str(error).partition(': ')[2]}")
                    continue
                seconds = time.perf_counter() - began
                types_written = Counter(
                    one.written_type.name + " with feedback" * one.feedback for one in reports
                )
                noise = [one.noise for one in reports]
                shown = ", ".join(f"{count} {kind}" for kind, count in types_written.most_common())
                print(
                    f"{what} | {name} | {kind} | {shown} | "
                    f"{compared.shares(output)} | "
                    f"noise {min(noise):.3f} to {max(noise):.3f} | "
                    f"share {min(one.surviving_share for one in reports):.3f} | "
                    f"{output.stat().st_size / base.path.stat().st_size:.3f} of the size | "
                    f"{seconds:.0f} s",
                    flush=True,
                )


def converted(
    folder: Path, edits: Sequence[str], bases: Sequence[str], options: Sequence[str] | None
) -> None:
    """The same of checkpoints that llama.cpp converts and quantises."""
    tree = find_converter()
    for what, ready, steering, plan, model, prompts in steerings(folder, edits):
        full, edited = folder / "full.f32.gguf", folder / f"{what}.f32.gguf"
        if not full.exists():
            convert(tree, ready.base.folder, full, "f32", "demo")
        if not edited.exists():
            with tempfile.TemporaryDirectory(dir=folder) as checkpoint:
                write_checkpoint(ready.base, steering.edits, (), plan.config, Path(checkpoint))
                convert(tree, Path(checkpoint), edited, "f32", "demo")
        matrix = folder / "text.imatrix.gguf"
        if not matrix.exists():
            texts = [one.text for one in ready.texts.fit]
            write_importance(collect_importance(full, texts, "text", 2), matrix)
        floats = [logits(path, steering.sequences) for path in (full, edited)]
        moved = gguf_edits(steering.edits, ready.arch, ready.base.config)
        larger = tuple(("^" + name.replace(".", r"\.") + "$", Kind.Q8_0) for name in moved)
        base, output = folder / "converted.base.gguf", folder / "converted.gguf"
        for name in bases:
            for option in options or OPTIONS:
                asked = Quantisation(name.lower(), larger if "edited" in option else ())
                importance = read_importance(matrix) if option == "imatrix" else None
                for path in (base, output):
                    path.unlink(missing_ok=True)
                quantised_anew(GGUFFile.open(full), base, asked, 2, importance, "text")
                there = GGUFFile.open(base)
                if option == "patched, auto":
                    arguments = (steering.interventions, there, ready.base.config, steering.edits)
                    inputs = input_moments(model, *arguments, prompts)
                    arguments = (plan, ready.arch, ready.base.config, there, steering.edits, output)
                    patch_gguf(*arguments, edited_type="auto", inputs=inputs)
                else:
                    quantised_anew(GGUFFile.open(edited), output, asked, 2, importance, "text")
                compared = Compared.of(ready, plan, there, steering, folder)
                print(
                    f"{what} | {name} | {option} | {compared.shares(output)} | from the floats "
                    f"{share(*floats, logits(output, steering.sequences))}, exact "
                    f"{share(*floats, compared.exact)} | {output.stat().st_size / 2**20:.0f} MiB",
                    flush=True,
                )


def floor(folder: Path, baked: Path) -> None:
    """How far a baked folder's edits are from themselves in llama.cpp, by the base's type."""
    there = Baked.open(baked)
    model = LiveModel.load(there.base.folder, there.arch, torch.float32)
    asked = in_turn(there.prompts, there.recipe.verify.prompts)
    sequences = compared_tokens(model, there.interventions, asked)
    changes = moves(model, there.interventions, sequences)
    arguments = (there.plan, there.arch, there.base.config)
    print("base | what | max abs delta | of the effect | lost share", flush=True)
    for name in ("f32", "f16", "its GGUF"):
        path = there.base_gguf(None) if name == "its GGUF" else folder / f"base.{name}.gguf"
        if not path.exists():
            convert(find_converter(), there.base.folder, path, name, "demo")
        base = GGUFFile.open(path)
        written, nudged = folder / "written.gguf", folder / "nudged.gguf"
        for one in (folder / "exact.gguf", written, nudged):
            one.unlink(missing_ok=True)
        exact = write_exact(*arguments, base, there.edits, folder)
        patch_gguf(*arguments, base, there.edits, written, edited_type=Kind.F16)
        shutil.copyfile(exact, nudged)
        nudge(nudged, "blk.0.attn_norm.weight")
        plain, wanted = logits(path, sequences), logits(exact, sequences)
        moved = [one + change for one, change in zip(plain, changes, strict=True)]
        print_distance(name, "as the checkpoint is moved", plain, moved, wanted)
        print_distance(name, "written in F16", plain, wanted, logits(written, sequences))
        print_distance(name, "first gains a step further", plain, wanted, logits(nudged, sequences))
        print_distance(name, "by token", plain, wanted, by_token(exact, sequences))
        # The base without any edit, in units of the same effect.
        print_distance(name, "the base by token", wanted, plain, by_token(path, sequences))


def by_token(path: Path, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """The logits of every sequence, each read token by token."""
    with opened(path, sequences) as model:
        return [torch.from_numpy(one_by_one(model, ids)) for ids in sequences]


def nudge(path: Path, name: str) -> None:
    """Write every number of a tensor in float32 as the next larger one."""
    tensor = GGUFFile.open(path).tensors[name]
    assert tensor.type is Kind.F32
    held = np.memmap(path, np.float32, "r+", tensor.offset, tensor.shape)
    held[:] = np.nextafter(held, np.float32(np.inf))
    held.flush()


def print_distance(
    base: str, what: str, plain: "Logits", wanted: "Logits", found: "Logits"
) -> None:
    """How far logits are from those that are wanted, beside how far these are from the base's."""
    total = Divergence()
    for one, hooked, now in zip(plain, wanted, found, strict=True):
        total.add(one, hooked, now)
    share_of_effect = total.largest / total.largest_effect
    print(
        f"{base} | {what} | {total.largest:.2g} | {share_of_effect:.2%} of "
        f"{total.largest_effect:.1f} | {total.lost_share:.2%}",
        flush=True,
    )


Logits: TypeAlias = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Compared:
    """A base GGUF's logits, as it is and with its tensors in float32, and those of the hooked one.

    `exact` and `exact_floats` have the edits in float32.
    """

    steering: Steering
    plain: Logits
    exact: Logits
    plain_floats: Logits
    exact_floats: Logits

    @classmethod
    def of(
        cls, ready: Prepared, plan: Plan, base: GGUFFile, steering: Steering, folder: Path
    ) -> "Compared":
        """Ask llama.cpp; the exact file stays in the folder."""
        sequences, found = steering.sequences, []
        arguments = (plan, ready.arch, ready.base.config)
        with in_floats(base.path) as floats:
            for source in (GGUFFile.open(floats), base):
                (folder / "exact.gguf").unlink(missing_ok=True)
                exact = write_exact(*arguments, source, steering.edits, folder)
                found += [logits(source.path, sequences), logits(exact, sequences)]
        plain_floats, exact_floats, plain, exact_ = found
        return cls(steering, plain, exact_, plain_floats, exact_floats)

    def shares(self, path: Path) -> str:
        """The lost shares of a baked file."""
        found = logits(path, self.steering.sequences)
        with in_floats(path) as floats:
            weights = logits(floats, self.steering.sequences)
        moved = [one + change for one, change in zip(self.plain, self.steering.moved, strict=True)]
        return (
            f"moved {share(self.plain, moved, found)} | "
            f"exact {share(self.plain, self.exact, found)} | "
            f"weights {share(self.plain_floats, self.exact_floats, weights)}"
        )

    def itself(self, folder: Path) -> str:
        """What the exact file loses against itself where other sums are made."""
        sequences = self.steering.sequences
        with opened(folder / "exact.gguf", sequences) as model:
            found = [torch.from_numpy(one_by_one(model, ids)) for ids in sequences]
        return f"exact {share(self.plain, self.exact, found)}"

    def by_lora(self, base: Path, lora: Path) -> str:
        """What the base with a LoRA loses, of which no tensor is written anew."""
        sequences = self.steering.sequences
        with opened(base, sequences) as model:
            model.set_lora(lora)
            found = [torch.from_numpy(model.logits(ids)) for ids in sequences]
        return f"exact {share(self.plain, self.exact, found)}"


@contextmanager
def in_floats(path: Path) -> Iterator[Path]:
    """The file with every tensor in float32, while the body runs."""
    made = quantise(path, "F32", path.parent)
    try:
        yield made
    finally:
        made.unlink()


def share(plain: Logits, wanted: Logits, found: Logits) -> str:
    """KL(wanted‖found) / KL(wanted‖plain)."""
    total = Divergence()
    for one, hooked, baked in zip(plain, wanted, found, strict=True):
        total.add(one, hooked, baked)
    return f"{total.lost_share:.2%}"


def steerings(
    folder: Path, edits: Sequence[str]
) -> Iterator[tuple[str, Prepared, "Steering", Plan, LiveModel, list[list[int]]]]:
    """Gate and ablation, fitted once, with what fits roundings to inputs."""
    gate = load_recipe(
        "political-open",
        overrides=(f"fit.prompts_per_class={PROMPTS}", f"edits.0.layers={BLOCKS}"),
        output="x",
    )
    ready = prepare(gate.recipe)
    model = LiveModel.load(ready.base.folder, ready.arch, torch.float32)
    directions = folder / "directions.safetensors"
    prompts = [model.render(one.text) for role in ready.part("fit", 32).values() for one in role]
    texts = [one.text for one in ready.texts.fit[:32]]
    prompts += [model.tokenizer(one, add_special_tokens=False).input_ids[:96] for one in texts]
    asked = [model.render(one.text) for role in ready.part("test", 4).values() for one in role]
    for what in EDITS_OF_DEMO:
        if what not in edits and (what != "gate" or directions.exists()):
            continue
        kept = folder / f"{what}.pt"
        if kept.exists():
            steering, plan = torch.load(kept, weights_only=False)
        else:
            loaded = gate
            if what == "ablate":
                ablation = f"edits=[{{op: ablate, layers: {BLOCKS}}}]"
                loaded = load_recipe(
                    "political-open", overrides=(ablation, f"directions={directions}"), output="x"
                )
            now = prepare(loaded.recipe)
            fitted = fit(
                *(model, now.base, now.plan, loaded.recipe, now.part("fit", PROMPTS), now.texts),
                find_judge(loaded.recipe.judge),
                directions=now.directions,
            )
            if what == "gate":
                save_directions(fitted.directions, directions)
            steering, plan = moved(model, fitted.interventions, asked[:SEQUENCES]), now.plan
            torch.save((steering, plan), kept)
        if what in edits:
            yield what, ready, steering, plan, model, prompts


def moved(
    model: LiveModel, interventions: Sequence[Intervention], prompts: Sequence[Sequence[int]]
) -> Steering:
    """Prompts with the opening of the hooked model's answers, and what the hooks move there."""
    with steered(model, interventions):
        answers = model.answer(prompts, ANSWER)
    sequences = [[*start, *answer] for start, answer in zip(prompts, answers, strict=True)]
    return Steering(tuple(interventions), sequences, moves(model, interventions, sequences))


def moves(
    model: LiveModel, interventions: Sequence[Intervention], sequences: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """What hooks move in the logits of every sequence."""
    found = []
    for ids in sequences:
        with torch.inference_mode():
            base = model.model(torch.tensor([ids])).logits[0].float()
            with steered(model, interventions):
                found.append(model.model(torch.tensor([ids])).logits[0].float() - base)
    return found


def logits(path: Path, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """llama.cpp's logits of every sequence."""
    with opened(path, sequences) as model:
        return [torch.from_numpy(model.logits(ids)) for ids in sequences]


def opened(path: Path, sequences: Sequence[Sequence[int]]) -> LlamaModel:
    """llama.cpp with room for every sequence."""
    return LlamaModel(path, context=max(map(len, sequences)), parallel=1, threads=2)


def disk(folder: Path, gib: float) -> None:
    """Patching a large file: seconds beside `cp`, and memory; each in a process of its own."""
    source = folder / "large.gguf"
    if not source.exists():
        large(source, gib)
    copy, output = folder / "copy.gguf", folder / "patched.gguf"
    for path in (source, copy, output):
        path.exists() and path is not source and path.unlink()
    size = source.stat().st_size
    print(f"{size / 2**30:.2f} GiB")
    for name, command in (
        ("cp", ["cp", "--reflink=never", str(source), str(copy)]),
        ("cp and sync", ["sh", "-c", f"cp --reflink=never {source} {copy} && sync {copy}"]),
        *((f"patch, {what}", patching(source, output, what)) for what in ("nothing", *EDITS)),
    ):
        os.sync()
        began = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - began
        print(f"{name} | {seconds:.1f} s | {done.stdout.strip()}", flush=True)
        for path in (copy, output):
            path.unlink(missing_ok=True)


EDITS: Mapping[str, Sequence[str]] = {
    "one attention output": ("blk.3.attn_output.weight",),
    "one down projection": ("blk.3.ffn_down.weight",),
    "both in four blocks": tuple(
        f"blk.{layer}.{name}.weight" for layer in range(4) for name in ("attn_output", "ffn_down")
    ),
}


def patching(source: Path, output: Path, what: str) -> list[str]:
    """The command that patches."""
    call = f"patched({str(source)!r}, {str(output)!r}, {what!r})"
    return [sys.executable, "-c", f"from benchmarks.gguf import patched; {call}"]


def patched(source: str, output: str, what: str) -> None:
    """Patch, and print the time without the imports and the memory beside theirs."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    base = GGUFFile.open(source)
    edits: dict[str, list[Edit]] = {}
    for number, name in enumerate(EDITS.get(what, ())):
        rows, columns = base.tensors[name].shape
        generator = torch.Generator().manual_seed(number)
        basis = torch.nn.functional.normalize(torch.randn(rows, 1, generator=generator), dim=0)
        edits[name] = [RemoveSubspace(name, basis)]
        if "attn" in name:
            edits[name] = [LowRank(name, 0.1 * basis, torch.randn(1, columns))]
    reports = patch(base, edits, Path(output), edited_type="auto")
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    largest = max((np.prod(base.tensors[name].shape) for name in edits), default=0) * 4 / 2**20
    types = Counter(one.written_type.name for one in reports)
    print(
        f"{seconds:.1f} s without imports, {(after - before) / 1024:.0f} MiB beside the imports' "
        f"{before / 1024:.0f}, largest tensor {largest:.0f} MiB in float32, {dict(types)}"
    )


def large(path: Path, gib: float) -> None:
    """Write a file shaped as a Llama of width 4096 in Q4_K_M, random but for a few matrices."""
    width, inner, words = 4096, 14336, 32000
    q4, q6, f32 = Kind.Q4_K, Kind.Q6_K, Kind.F32
    shapes = {
        "attn_norm": ((width,), f32),
        "attn_q": ((width, width), q4),
        "attn_k": ((1024, width), q4),
        "attn_v": ((1024, width), q6),
        "attn_output": ((width, width), q4),
        "ffn_norm": ((width,), f32),
        "ffn_gate": ((inner, width), q4),
        "ffn_up": ((inner, width), q4),
        "ffn_down": ((width, inner), q6),
    }
    listed = {"token_embd.weight": ((words, width), q4)}
    made: dict[tuple[tuple[int, ...], Kind], np.ndarray] = {}
    random = np.random.default_rng(0)

    def stored(shape: tuple[int, ...], kind: Kind) -> np.ndarray:
        if (shape, kind) not in made:
            rows = random.standard_normal((min(shape[0], 64), *shape[1:])).astype(np.float32)
            few = quantised(rows.reshape(-1, shape[-1]), kind) if kind is not f32 else rows
            made[shape, kind] = (
                np.resize(few, (shape[0], *few.shape[1:]))
                if kind is not f32
                else (np.ones(shape, np.float32))
            )
        return made[shape, kind]

    def nbytes() -> int:
        return sum(stored(*one).nbytes for one in listed.values())

    layer = 0
    while nbytes() < gib * 2**30:
        for name, (shape, kind) in shapes.items():
            listed[f"blk.{layer}.{name}.weight"] = (shape, kind)
        layer += 1
    writer = GGUFWriter(path, "llama")
    for name, (shape, kind) in listed.items():
        writer.add_tensor(name, stored(shape, kind), raw_dtype=None if kind is f32 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
