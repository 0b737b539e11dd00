"""From a recipe to a published folder: plan, fit, write, verify, judge, publish."""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from bake.arch import Arch
from bake.archs import find_arch
from bake.base_card import base_card
from bake.card import card
from bake.checkpoint import Checkpoint
from bake.directions import Directions, load_directions, save_directions
from bake.edits import Edit
from bake.errors import CheckpointError, GuardError, VerificationError
from bake.evidence import Evidence
from bake.export.adapter import check_adapter, write_gguf_lora, write_peft
from bake.export.conversion import TEXT, Reference, Road, survivals
from bake.export.converter import find_converter
from bake.export.gguf import PatchedTensor, patch
from bake.export.inputs import input_moments
from bake.export.layout import gguf_edits, patch_gguf
from bake.export.ollama import parameters, write_ollama
from bake.export.provenance import provenance, write_parity
from bake.export.requantise import F32, LEAST_SHARE, MOST_NOISE, MOST_NOISE_SAME, EditedType
from bake.export.same_model import check_same_model
from bake.fit.kept import write_kept
from bake.fit.readings import HIGH, LOW
from bake.fit.run import Fitted, fit, needs_prompts
from bake.gguf_file import GGUFFile, part_names
from bake.html.files import write_report
from bake.imatrix import read_importance
from bake.journal import Journal, hashed
from bake.judge import Judge
from bake.judge.choice import find_judge
from bake.manifest import NAME, file_hash, file_hashes, versions, write_manifest
from bake.measure import Artefacts, Measured, measure
from bake.model import LiveModel
from bake.ops.add import Add
from bake.plan import Plan, check_gguf, direction_layers, make_plan
from bake.preflight import check_room
from bake.progress import progress
from bake.prompts import Prompt, Splits, fingerprint, load_splits
from bake.recipe import LoadedRecipe, PromptSource, Recipe
from bake.report import guard_breaches, table, write_answers
from bake.runtimes.facts import served
from bake.saved_plan import SavedPlan, snapshot
from bake.source import Source, find_source
from bake.staging import already_there, check_output, journal_of, staged
from bake.stream import write_checkpoint, written_sizes
from bake.verify import check_files
from bake.work import Work

__all__ = [
    "DIRECTIONS",
    "KEPT",
    "Prepared",
    "bake",
    "base_hashes",
    "prepare",
    "run_of",
    "saved_form",
]

# An edit that rounds away is not in the file, whatever the file says; auto asks for more.
SURVIVING = 0.9
# Not beside the weights: vLLM (model_loader/default_loader.py, `_prepare_weights`), SGLang and
# Ollama (convert/reader.go, `parseTensors`) load every *.safetensors of the folder itself.
DIRECTIONS = Path("steering", "directions.safetensors")
KEPT = Path("steering", "fit.safetensors")
ADAPTER = Path("adapter")
# Prompts of each set, and texts, that the roundings of a GGUF are weighed by.
SHOWN = 32
PASSAGE_TOKENS = 96
ROLES = ("target", "protected", "lookalike", "refused", "general")


@dataclass(frozen=True)
class Prepared:
    """A recipe with its model found, its plan made and its prompts split; nothing loaded yet."""

    recipe: Recipe
    source: Source
    base: Checkpoint
    arch: Arch
    gguf: GGUFFile | None
    plan: Plan
    splits: Mapping[str, Splits]
    texts: Splits
    directions: Directions | None = None
    directions_hash: str | None = None
    concepts: Mapping[str, Splits] = field(default_factory=dict)

    @property
    def fingerprints(self) -> dict[str, dict[str, str]]:
        """The fingerprints of every role's and concept's splits, and of the texts."""
        shields = {f"concept {name}": parts for name, parts in self.concepts.items()}
        return {
            role: {part: fingerprint(getattr(parts, part)) for part in ("fit", "select", "test")}
            for role, parts in {**self.splits, "text": self.texts, **shields}.items()
        }

    @property
    def concept_prompts(self) -> dict[str, tuple[Prompt, ...]]:
        """The fitting prompts of every set without a role: concepts, categories."""
        limit = self.recipe.fit.prompts_per_class
        return {name: parts.fit[:limit] for name, parts in self.concepts.items()}

    def part(self, split: str, limit: int | None = None) -> dict[str, tuple[Prompt, ...]]:
        """The prompts of one split by role."""
        return {role: getattr(parts, split)[:limit] for role, parts in self.splits.items()}


def prepare(recipe: Recipe) -> Prepared:
    """Everything that can be refused from headers and text, before a weight is read."""
    splits = {}
    for role in ROLES:
        chosen = getattr(recipe.prompts, role)
        if chosen is not None:
            splits[role] = _splits(chosen)
    texts = _splits(recipe.prompts.text)
    sets = dict.fromkeys((*recipe.fit.concepts, *recipe.fit.categories))
    concepts = {name: load_splits(name, language="any") for name in sets}
    directions, directions_hash = _directions(recipe)
    source = find_source(recipe)
    base = Checkpoint.open(source.folder)
    arch = find_arch(base.config, str(source.folder / "config.json"), base.tensors)
    plan = make_plan(recipe, base, arch, directions)
    gguf = GGUFFile.open(source.gguf) if source.gguf else None
    if gguf:
        check_gguf(plan, base, arch, gguf)
    if recipe.export.adapters:
        check_adapter(plan, arch)
    return Prepared(
        *(recipe, source, base, arch, gguf, plan, splits, texts),
        *(directions, directions_hash, concepts),
    )


def _splits(source: PromptSource) -> Splits:
    return load_splits(source.set, language=source.language, limit=source.limit, place=source.place)


def _directions(recipe: Recipe) -> tuple[Directions | None, str | None]:
    """The recipe's file of directions, and its hash.

    A bare vector is of the one layer that the edits need.
    """
    if recipe.directions is None:
        return None, None
    path, layers = Path(recipe.directions), direction_layers(recipe)
    found = load_directions(path, layers[0] if len(layers) == 1 else None)
    return found, file_hash(path)


def bake(
    loaded: LoadedRecipe,
    *,
    overwrite: bool = False,
    planned: SavedPlan | None = None,
    llama_cpp: Path | None = None,
    show: Callable[[str], None] = lambda _: None,
) -> Path:
    """Run a recipe to its end and return the output folder, which appears only then.

    `planned` is a saved plan that must be the recipe's still, `llama_cpp` the tree whose
    converter is taken (`find_converter`). `show` receives the table of results, also when the
    guard then refuses them.
    Raises a BakeError of the kind that says what failed: the input, the guard or
    the verification. Nothing is left behind then.
    """
    recipe = loaded.recipe
    check_output(recipe.folder, overwrite)
    torch.manual_seed(recipe.seed)
    ready = prepare(recipe)
    if planned:
        planned.check(saved_form(loaded, ready))
    if ready.gguf:
        check_same_model(ready.gguf, ready.base, ready.arch)
    _check_room(ready)
    road = _road(ready, llama_cpp)
    judge = find_judge(recipe.judge)
    with (
        staged(recipe.folder, overwrite, recipe.export.safetensors) as staging,
        _aside(staging) as aside,
    ):
        stamps, hashes = _stamps(ready), base_hashes(ready)
        journal = Journal.of(run_of(ready, hashes))
        reference = _reference(ready, road, aside) if road else None
        model = LiveModel.load(ready.base.folder, ready.arch, system=ready.recipe.system_prompt)
        fitted = _fit(ready, replace(model, work=Work(journal=journal)), judge)
        edits = _edits(ready, fitted)
        written = _write(loaded, ready, model, fitted, edits, staging)
        if road and reference:
            written = _convert(loaded, ready, road, reference, edits, written, staging, aside)
        base_gguf = reference.file if reference else ready.gguf
        artefacts = Artefacts(
            ready.base.folder,
            staging if recipe.export.safetensors else None,
            base_gguf.path if base_gguf else None,
            staging / written.gguf if written.gguf else None,
            staging / written.lora if written.lora else None,
            tuple(ready.arch.gguf_name(ready.plan.name(edit.tensor)) for edit in ready.plan.edits),
            written.exact,
        )
        prompts = ready.part("test", recipe.evaluate.limit)
        measured = measure(recipe, model, fitted.interventions, artefacts, prompts, judge)
        show(table(measured))
        broken = guard_breaches(recipe, measured)
        if broken:
            raise GuardError("\n".join(broken))
        now = _stamps(ready)
        for path, stamp in stamps.items():
            if now.get(path) != stamp:
                raise CheckpointError(f"{path}: changed while it was baked; bake it again")
        _record(loaded, ready, model, hashes, fitted, written, measured, staging)
    journal.remove()
    return recipe.folder


def _check_room(ready: Prepared) -> None:
    """Refuse a disk on which what is exported has no room."""
    plan, sizes = ready.plan, [0]
    if ready.recipe.export.safetensors:
        edited = (edit.tensor for edit in plan.edits)
        sizes += written_sizes(ready.base, edited, plan.created)
    if ready.gguf:
        sizes += [part.path.stat().st_size for part in ready.gguf.files]
    folder = ready.recipe.folder
    check_room(folder, sizes, already_there(folder))


def _files(ready: Prepared) -> list[Path]:
    """Every file of the base."""
    return [shard.file for shard in ready.base.shards] + list(ready.base.sidecars())


def base_hashes(ready: Prepared) -> dict[str, str]:
    """The SHA-256 of every file of the base."""
    return {path.name: digest for path, digest in file_hashes(_files(ready)).items()}


def _stamps(ready: Prepared) -> dict[Path, tuple[int, int]]:
    """When every file of the base that is there was changed last, and its size."""
    found = {path: path.stat() for path in _files(ready) if path.exists()}
    return {path: (one.st_mtime_ns, one.st_size) for path, one in found.items()}


def run_of(ready: Prepared, hashes: Mapping[str, str]) -> str:
    """A hash of what decides a fit beside its prompts: recipe, model files, versions."""
    return hashed([ready.recipe.model_dump(mode="json"), hashes, versions()])


def saved_form(loaded: LoadedRecipe, ready: Prepared) -> dict[str, object]:
    """The plan with what it was made of, as plain values: what `bake plan --output` saves."""
    return snapshot(
        loaded, ready.plan, ready.base, ready.gguf, ready.fingerprints, ready.directions_hash
    )


@dataclass(frozen=True)
class _Written:
    """What the exporters did: residuals by tensor, the GGUF's name and its patched tensors.

    `said` are the keys of its metadata that say where it comes from, `lora` is the name of the
    LoRA for llama.cpp, `conversion` what the manifest says of one, and `exact` the file of
    unedited weights of its type with the edits in full.
    """

    residuals: Mapping[str, float]
    gguf: str | None
    patched: tuple[PatchedTensor, ...]
    said: tuple[str, ...] = ()
    lora: str | None = None
    conversion: Mapping[str, object] | None = None
    exact: Path | None = None


def _fit(ready: Prepared, model: LiveModel, judge: Judge) -> Fitted:
    recipe, plan = ready.recipe, ready.plan
    limit = recipe.fit.prompts_per_class
    prompts = ready.part("fit", limit)
    count = len(ready.texts.fit[:limit])
    concepts = ready.concept_prompts
    total = 2 * sum(map(len, prompts.values())) + count + sum(map(len, concepts.values()))
    shown = needs_prompts(plan, recipe, ready.directions)
    with progress("fit", total, shown) as update:
        return fit(
            *(model, ready.base, plan, recipe, prompts, ready.texts, judge, update),
            directions=ready.directions,
            concepts=concepts,
        )


def _edits(ready: Prepared, fitted: Fitted) -> dict[str, list[Edit]]:
    """The edits by tensor, which are those of the plan."""
    edits: dict[str, list[Edit]] = {}
    for one in fitted.interventions:
        for edit in one.edits():
            edits.setdefault(edit.tensor, []).append(edit)
    if set(edits) != {edit.tensor for edit in ready.plan.edits}:
        raise VerificationError("the fit made other edits than the plan; this is a bug of bake")
    return edits


def _write(
    loaded: LoadedRecipe,
    ready: Prepared,
    model: LiveModel,
    fitted: Fitted,
    edits: Mapping[str, Sequence[Edit]],
    staging: Path,
) -> _Written:
    """Write the checkpoint and what is made of the base; read it back: the rest is as it was."""
    residuals: dict[str, float] = {}
    if ready.recipe.export.safetensors:
        residuals = _write_safetensors(ready, edits, staging, journal_of(staging))
    _write_vectors(ready, fitted, edits, staging)
    export = ready.recipe.export.gguf
    if ready.gguf is None or export is None or export.convert:
        return _Written(residuals, None, ())
    output = staging / f"{ready.recipe.name}.gguf"
    inputs = _inputs(ready, model, ready.gguf, fitted, edits)
    template = model.tokenizer.chat_template
    said = provenance(ready.gguf, loaded, template if isinstance(template, str) else None)
    patched = _patch(ready, ready.gguf, edits, inputs, said, output)
    name = part_names(output, len(ready.gguf.files))[0].name
    if "gguf" not in ready.recipe.export.adapters:
        return _Written(residuals, name, patched, tuple(said))
    lora = staging / f"{ready.recipe.name}.lora.gguf"
    write_gguf_lora(edits, ready.gguf, ready.arch, ready.base.config, ready.recipe.name, lora)
    return _Written(residuals, name, patched, tuple(said), lora.name)


def _write_safetensors(
    ready: Prepared,
    edits: Mapping[str, Sequence[Edit]],
    folder: Path,
    journal: Path | None = None,
) -> dict[str, float]:
    plan, base = ready.plan, ready.base
    size = sum(info.stop - info.start for info in base.tensors.values())
    with progress("safetensors", size) as update:
        write_checkpoint(
            *(base, edits, plan.created, plan.config, folder, update),
            renamed=plan.renamed,
            journal=journal,
        )
    return check_files(base, Checkpoint.open(folder), edits, plan.created, plan.renamed)


def _road(ready: Prepared, llama_cpp: Path | None) -> Road | None:
    """How the recipe converts, if it does; what can be refused before a model is loaded is."""
    export = ready.recipe.export.gguf
    if export is None or export.convert is None:
        return None
    given = export.convert.imatrix
    if given not in (None, TEXT):
        read_importance(Path(str(given)))
    return Road.of(
        *(find_converter(llama_cpp), export.convert, ready.base, ready.recipe.name),
        mix=ready.gguf,
        edited=_edited_matrices(ready),
        edited_type=export.named_type,
    )


def _edited_matrices(ready: Prepared) -> list[str]:
    """The base's matrices that the plan edits, as a GGUF names them."""
    names = [edit.tensor for edit in ready.plan.edits if len(edit.shape) > 1]
    return sorted({ready.arch.gguf_name(name) for name in names if name in ready.base.tensors})


def _reference(ready: Prepared, road: Road, aside: Path) -> Reference:
    """The base through the converter: what that refuses is refused before anything is fitted."""
    texts = [one.text for one in ready.texts.fit]
    model = LiveModel.load(ready.base.folder, ready.arch, torch.float32)
    return road.reference(ready.base.folder, model, texts, aside)


@contextmanager
def _aside(staging: Path) -> Iterator[Path]:
    """A folder on the output's disk for files of the model that are not published."""
    with tempfile.TemporaryDirectory(dir=staging.parent, prefix=f"{staging.name}.") as folder:
        yield Path(folder)


def _convert(
    loaded: LoadedRecipe,
    ready: Prepared,
    road: Road,
    reference: Reference,
    edits: Mapping[str, Sequence[Edit]],
    written: _Written,
    staging: Path,
    aside: Path,
) -> _Written:
    """Convert what was baked, say where it comes from, and measure every edited matrix."""
    folder, output = staging, staging / f"{ready.recipe.name}.gguf"
    plan, arch, config = ready.plan, ready.arch, ready.base.config
    if not ready.recipe.export.safetensors:
        folder = aside / "baked"
        folder.mkdir()
        written = replace(written, residuals=_write_safetensors(ready, edits, folder))
    patched = aside / "patched.gguf"
    patch_gguf(plan, arch, config, reference.full, edits, patched, edited_type=F32)
    whole, made = GGUFFile.open(patched), aside / "converted.gguf"
    made_file = road.baked(folder, made, reference, plan, arch, whole, aside)
    patched.unlink()
    said = provenance(made_file, loaded, None)
    patch(made_file, {}, output, edited_type=F32, pairs=said)
    made.unlink()
    file = GGUFFile.open(output)
    if reference.file is not reference.full:
        # The hooked model in llama.cpp: the edits in full on the reference's own weights.
        patch_gguf(plan, arch, config, reference.file, edits, patched, edited_type=F32)
    moved = gguf_edits(edits, arch, config)
    renamed = plan.insertion.of_gguf().renamed(reference.full.tensors)
    measured = survivals(reference, file, moved, renamed)
    _check_survival(measured, output.name, "set export.gguf.convert to a larger type")
    if road.asked.imatrix == TEXT and reference.importance:
        road.save_importance(reference.importance.renamed(renamed), staging)
    conversion = {
        **road.asked.model_dump(),
        "outtype": road.outtype,
        "apart": reference.apart,
    }
    exact = patched if patched.exists() else None
    return replace(
        written,
        gguf=output.name,
        patched=measured,
        said=tuple(said),
        conversion=conversion,
        exact=exact,
    )


def _write_vectors(
    ready: Prepared, fitted: Fitted, edits: Mapping[str, Sequence[Edit]], staging: Path
) -> None:
    """Write what stands beside a base that is not changed: a LoRA for PEFT, a control vector."""
    recipe = ready.recipe
    if "peft" in recipe.export.adapters:
        write_peft(edits, ready.base, ready.arch, recipe.model, staging / ADAPTER)
    if recipe.export.control_vector:
        vectors: dict[int, Tensor] = {}
        for one in fitted.interventions:
            assert isinstance(one, Add)
            vectors[one.layer] = vectors.get(one.layer, 0) + one.vector
        save_directions(
            Directions(vectors, fitted.directions.origin), staging / f"{recipe.name}.vector.gguf"
        )


def _inputs(
    ready: Prepared,
    model: LiveModel,
    base: GGUFFile,
    fitted: Fitted,
    edits: Mapping[str, Sequence[Edit]],
) -> dict[str, Tensor]:
    """What the edited matrices read on some fitting prompts and texts, where a rounding asks."""
    assert ready.recipe.export.gguf is not None
    if ready.recipe.export.gguf.edited_type not in ("auto", "same"):
        return {}
    prompts = [model.render(one.text) for role in ready.part("fit", SHOWN).values() for one in role]
    texts = [model.tokenizer(one.text, add_special_tokens=False) for one in ready.texts.fit[:SHOWN]]
    prompts += [one.input_ids[:PASSAGE_TOKENS] for one in texts]
    return input_moments(model, fitted.interventions, base, ready.base.config, edits, prompts)


def _patch(
    ready: Prepared,
    base: GGUFFile,
    edits: Mapping[str, Sequence[Edit]],
    inputs: Mapping[str, Tensor],
    said: Mapping[str, bytes],
    output: Path,
) -> tuple[PatchedTensor, ...]:
    assert ready.recipe.export.gguf is not None
    asked = ready.recipe.export.gguf.edited_type
    kind: EditedType = (
        asked if asked == "auto" or asked == "same" else GGMLQuantizationType[asked.upper()]
    )
    size = sum(tensor.nbytes for tensor in base.tensors.values())
    with progress("gguf", size) as update:
        patched = patch_gguf(
            *(ready.plan, ready.arch, ready.base.config, base, edits, output),
            edited_type=kind,
            inputs=inputs,
            provenance=said,
            progress=update,
        )
    _check_survival(patched, output.name, "set export.gguf.edited_type to auto")
    return patched


def _check_survival(measured: Sequence[PatchedTensor], file: str, remedy: str) -> None:
    for one in measured:
        if one.surviving_share < SURVIVING:
            raise VerificationError(
                f"{file}: {one.name}: {one.surviving_share:.0%} of the edit survives in "
                f"{one.written_type.name}; {remedy}"
            )


def _record(
    loaded: LoadedRecipe,
    ready: Prepared,
    model: LiveModel,
    hashes: Mapping[str, str],
    fitted: Fitted,
    written: _Written,
    measured: Measured,
    staging: Path,
) -> None:
    """Write what stands beside the weights: answers, card, Modelfile, and the manifest last."""
    write_answers(staging / "answers.jsonl", measured)
    if written.gguf:
        if written.said:
            write_parity(staging / written.gguf, measured.parity["llama.cpp"])
        ends = model.tokenizer.convert_ids_to_tokens(sorted(model.end_tokens()))
        write_ollama(staging, written.gguf, parameters(ready.base.folder, ends))
    recipe = loaded.recipe
    save_directions(fitted.directions, staging / DIRECTIONS)
    if fitted.kept:
        write_kept(fitted.kept, staging / KEPT)
    others = [part.path for part in ready.gguf.files] if ready.gguf else []
    export = recipe.export.gguf
    if export and export.convert and export.convert.imatrix not in (None, TEXT):
        others.append(Path(str(export.convert.imatrix)))
    content: dict[str, object] = {
        "format": 1,
        "name": recipe.name,
        "recipe": {
            "text": loaded.text,
            "source": loaded.source,
            "overrides": loaded.overrides,
            "sha256": loaded.sha256,
        },
        "model": recipe.model,
        "base": asdict(base_card(recipe, ready.base.folder)),
        "seed": recipe.seed,
        "versions": versions(),
        "inputs": {
            **hashes,
            **{path.name: digest for path, digest in file_hashes(others).items()},
        },
        "prompts": ready.fingerprints,
        "near_duplicates": {
            role: parts.removed for role, parts in ready.splits.items() if parts.removed
        },
        "directions": {
            "file": recipe.directions,
            "sha256": ready.directions_hash,
            **fitted.directions.origin.as_json(),
        },
        "plan": ready.plan.as_json(),
        "fit": {
            "classes": {role: asdict(one) for role, one in fitted.classes.items()},
            "gaps": {
                str(layer): float(fitted.directions.basis(layer)[0].norm())
                for layer in fitted.directions.layers
            },
            "figures": {
                str(layer): dict(found) for layer, found in fitted.directions.figures.items()
            },
            "readings": {
                "low": LOW,
                "high": HIGH,
                "layers": {
                    str(layer): {role: list(counts) for role, counts in found.items()}
                    for layer, found in fitted.directions.readings.items()
                },
            },
            "openings": fitted.openings,
            "constants": {name: asdict(one) for name, one in fitted.constants.items()},
        },
        "residuals": dict(written.residuals),
        "gguf": [
            {
                "tensor": one.name,
                "base_type": one.base_type.name if one.base_type is not None else None,
                "written_type": one.written_type.name,
                "surviving_share": one.surviving_share,
                "noise": one.noise,
                "by_inputs": one.by_inputs,
                "feedback": one.feedback,
                "residual": one.residual,
            }
            for one in written.patched
        ],
        "conversion": written.conversion,
        "gguf_bounds": {
            "auto": {"surviving_share": LEAST_SHARE, "noise": MOST_NOISE},
            "same": {"noise": MOST_NOISE_SAME},
        },
        "gguf_metadata": list(written.said),
        "measured": measured.as_json(),
        "runtimes": served(recipe, ready.plan, measured),
        "guard": recipe.guard.model_dump(),
    }
    text = card(Evidence.of(content, loaded, NAME))
    (staging / "README.md").write_text(text, encoding="utf-8")
    write_report(staging, json.loads(json.dumps(content)))
    outputs = [path for path in sorted(staging.rglob("*")) if path.is_file()]
    content["outputs"] = {
        path.relative_to(staging).as_posix(): digest
        for path, digest in file_hashes(outputs).items()
    }
    write_manifest(staging, content)
