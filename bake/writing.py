"""What a bake writes of the model: the checkpoint, the GGUF, LoRAs and vectors, each read back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from bake.checkpoint import Checkpoint
from bake.device import edit_device
from bake.directions import Directions, save_directions
from bake.edits import Edit
from bake.errors import VerificationError
from bake.export.adapter import write_gguf_lora, write_peft
from bake.export.conversion import TEXT, Reference, Road, survivals
from bake.export.gguf import PatchedTensor, patch
from bake.export.inputs import input_moments
from bake.export.layout import gguf_edits, patch_gguf, write_exact
from bake.export.provenance import provenance
from bake.export.requantise import F32, EditedType
from bake.export.split import in_parts
from bake.fit.run import Fitted
from bake.gguf_file import GGUFFile, part_names
from bake.hooks import edits_by_tensor
from bake.imatrix import read_importance
from bake.model import LiveModel
from bake.ops.add import Add
from bake.prepare import Prepared, check_space, in_float32, loaded_model
from bake.progress import progress
from bake.recipe import LoadedRecipe
from bake.staging import journal_of
from bake.stream import write_checkpoint
from bake.verify import check_files
from bake.work import ALONE, Work

__all__ = ["Written", "converted", "edits_of", "reference_of", "road_of", "write_all"]

# An edit that rounds away is not in the file, whatever the file says; auto asks for more.
SURVIVING = 0.9
ADAPTER = Path("adapter")
# Prompts of each set, and texts, that the roundings of a GGUF are weighed by.
SHOWN = 32
PASSAGE_TOKENS = 96


@dataclass(frozen=True)
class Written:
    """What the exporters did: residuals by tensor, the GGUF's name and its patched tensors.

    `said` are the keys of its metadata that say where it comes from, `lora` is the name of the
    LoRA for llama.cpp, `conversion` what the manifest says of one, and `exact` the base GGUF
    with the edits in full, in float32, where that is quantised.
    """

    residuals: Mapping[str, float]
    gguf: str | None
    patched: tuple[PatchedTensor, ...]
    said: tuple[str, ...] = ()
    lora: str | None = None
    conversion: Mapping[str, object] | None = None
    exact: Path | None = None


def edits_of(ready: Prepared, fitted: Fitted) -> dict[str, list[Edit]]:
    """The edits by tensor, which are those of the plan."""
    edits = edits_by_tensor(fitted.interventions)
    if set(edits) != {edit.tensor for edit in ready.plan.edits}:
        raise VerificationError("the fit made other edits than the plan; this is a bug of bake")
    return edits


def write_all(
    loaded: LoadedRecipe,
    ready: Prepared,
    model: LiveModel,
    fitted: Fitted,
    edits: Mapping[str, Sequence[Edit]],
    staging: Path,
    aside: Path,
) -> Written:
    """Write the checkpoint and what is made of the base; read it back: the rest is as it was.

    The model's processes share the checkpoint's tensors; one makes the rest. `aside` is a folder
    for the file that the GGUF is compared with.
    """
    residuals: dict[str, float] = {}
    if ready.recipe.export.safetensors:
        residuals = _write_safetensors(ready, edits, staging, journal_of(staging), model.work)
    alone = replace(model, work=ALONE)
    return model.work.by_main(
        lambda: _write_beside(loaded, ready, alone, fitted, edits, staging, aside, residuals)
    )


def _write_beside(
    loaded: LoadedRecipe,
    ready: Prepared,
    model: LiveModel,
    fitted: Fitted,
    edits: Mapping[str, Sequence[Edit]],
    staging: Path,
    aside: Path,
    residuals: Mapping[str, float],
) -> Written:
    """Write vectors, the patched GGUF and its LoRA."""
    _write_vectors(ready, fitted, edits, staging)
    export = ready.recipe.export.gguf
    if ready.gguf is None or export is None or export.convert:
        return Written(residuals, None, ())
    output = staging / f"{ready.recipe.name}.gguf"
    inputs = _inputs(ready, model, ready.gguf, fitted, edits)
    template = model.tokenizer.chat_template
    said = provenance(ready.gguf, loaded, template if isinstance(template, str) else None)
    patched = _patch(ready, ready.gguf, edits, inputs, said, output)
    name = part_names(output, len(ready.gguf.files))[0].name
    exact = None
    if ready.gguf.is_quantised:
        exact = write_exact(ready.plan, ready.arch, ready.base.config, ready.gguf, edits, aside)
    written = Written(residuals, name, patched, tuple(said), exact=exact)
    if "gguf" not in ready.recipe.export.adapters:
        return written
    lora = staging / f"{ready.recipe.name}.lora.gguf"
    write_gguf_lora(edits, ready.gguf, ready.arch, ready.base.config, ready.recipe.name, lora)
    return replace(written, lora=lora.name)


def _write_safetensors(
    ready: Prepared,
    edits: Mapping[str, Sequence[Edit]],
    folder: Path,
    journal: Path | None = None,
    work: Work = ALONE,
) -> dict[str, float]:
    plan, base = ready.plan, ready.base
    size = sum(info.stop - info.start for info in base.tensors.values())
    with progress("safetensors", size // work.size, work.main) as update:
        write_checkpoint(
            *(base, edits, plan.created, plan.config, folder, update),
            renamed=plan.renamed,
            journal=journal,
            work=work,
            device=edit_device(),
        )
    return check_files(base, Checkpoint.open(folder), edits, plan.created, plan.renamed, work)


def road_of(ready: Prepared, llama_cpp: Path | None) -> Road | None:
    """How the recipe converts, if it does; what can be refused before a model is loaded is."""
    export = ready.recipe.export.gguf
    if export is None or export.convert is None:
        return None
    given = export.convert.imatrix
    if given not in (None, TEXT):
        read_importance(Path(str(given)))
    return Road.planned(ready.recipe, ready.plan, ready.arch, ready.base, ready.gguf, llama_cpp)


def reference_of(ready: Prepared, road: Road, aside: Path) -> Reference:
    """The base through the converter: what that refuses is refused before anything is fitted.

    So is a disk without room for the files on the road, of which the first is made here.
    """
    check_space(ready, [road.size(ready.base)])
    texts = [one.text for one in ready.texts.fit]
    model = loaded_model(ready, torch.float32)
    reference = road.reference(ready.base.folder, model, texts, aside)
    check_space(ready, _to_come(ready, reference))
    return reference


def _to_come(ready: Prepared, reference: Reference) -> list[int]:
    """The bytes of the files beside the checkpoint that `converted` has on the disk at once."""
    export, file = ready.recipe.export.gguf, reference.file
    assert export is not None
    full, whole = (one.path.stat().st_size for one in (reference.full, file))
    edited = {ready.arch.gguf_name(edit.tensor) for edit in ready.plan.edits}
    exact = in_float32(file, edited) if file.is_quantised else 0
    if export.patches_converted:
        return [whole, exact]
    baked = [] if ready.recipe.export.safetensors else [full]
    # The patched base and what it is compared with, then the result and its parts.
    return [*baked, full, full, whole if file.is_quantised else 0]


def converted(
    loaded: LoadedRecipe,
    ready: Prepared,
    road: Road,
    reference: Reference,
    model: LiveModel,
    fitted: Fitted,
    edits: Mapping[str, Sequence[Edit]],
    written: Written,
    staging: Path,
    aside: Path,
) -> Written:
    """Convert what was baked, say where it comes from, and measure every edited matrix.

    Or patch the converted base, where the recipe has it so: then nothing but the edits is
    rounded anew.
    """
    output = staging / f"{ready.recipe.name}.gguf"
    plan, arch, config = ready.plan, ready.arch, ready.base.config
    export = ready.recipe.export.gguf
    assert export is not None
    quantiser = None if road.asked.is_float else "bake (by llama.cpp's quantiser)"
    size, renamed = export.part_size, plan.insertion.of_gguf().renamed(reference.full.tensors)
    if export.patches_converted:
        base = in_parts(reference.file, size) if size else reference.file
        said = provenance(base, loaded, quantised=quantiser)
        inputs = _inputs(ready, model, base, fitted, edits)
        measured = _patch(ready, base, edits, inputs, said, output)
        output = part_names(output, len(base.files))[0]
    else:
        folder = staging
        if not ready.recipe.export.safetensors:
            folder = aside / "baked"
            folder.mkdir()
            written = replace(written, residuals=_write_safetensors(ready, edits, folder))
        made = _converted(ready, road, reference, edits, folder, aside)
        said = provenance(made, loaded, quantised=quantiser)
        laid_out = in_parts(made, size) if size else made
        patch(laid_out, {}, output, edited_type=F32, pairs=said)
        made.path.unlink()
        output = part_names(output, len(laid_out.files))[0]
        moved = gguf_edits(edits, arch, config)
        measured = survivals(reference, GGUFFile.open(output), moved, renamed)
        _check_survival(measured, output.name, "set export.gguf.convert to a larger type")
    exact = None
    if reference.file.is_quantised:
        exact = write_exact(plan, arch, config, reference.file, edits, aside)
    if road.asked.imatrix == TEXT and reference.importance:
        road.save_importance(reference.importance.renamed(renamed), staging)
    conversion = {
        **road.asked.model_dump(),
        "outtype": road.outtype,
        "apart": reference.apart,
    }
    return replace(
        written,
        gguf=output.name,
        patched=measured,
        said=tuple(said),
        conversion=conversion,
        exact=exact,
    )


def _converted(
    ready: Prepared,
    road: Road,
    reference: Reference,
    edits: Mapping[str, Sequence[Edit]],
    folder: Path,
    aside: Path,
) -> GGUFFile:
    """The baked checkpoint in `folder` through the converter, compared with a patched base."""
    plan, arch, patched = ready.plan, ready.arch, aside / "patched.gguf"
    patch_gguf(*(plan, arch, ready.base.config, reference.full, edits, patched), edited_type=F32)
    whole, output = GGUFFile.open(patched), aside / "converted.gguf"
    made = road.baked(folder, output, reference, plan, arch, whole, aside)
    patched.unlink()
    return made


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
