"""What a bake writes beside the weights: the evidence, and the manifest last."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from bake.base_card import base_card
from bake.card import card
from bake.directions import save_directions
from bake.evidence import Evidence
from bake.export.conversion import TEXT
from bake.export.ollama import parameters, write_ollama
from bake.export.provenance import write_parity
from bake.export.requantise import LEAST_SHARE, MOST_NOISE, MOST_NOISE_SAME
from bake.fit.kept import write_kept
from bake.fit.readings import HIGH, LOW
from bake.fit.run import Fitted
from bake.gguf_file import GGUFFile
from bake.html.files import write_report
from bake.manifest import NAME, file_hashes, versions, write_manifest
from bake.measure import Measured
from bake.model import LiveModel
from bake.prepare import Prepared
from bake.recipe import LoadedRecipe
from bake.report import write_answers
from bake.runtimes.facts import served
from bake.writing import Written

__all__ = ["DIRECTIONS", "KEPT", "failed_folder", "record", "record_failure"]

# Not beside the weights: vLLM (model_loader/default_loader.py, `_prepare_weights`), SGLang and
# Ollama (convert/reader.go, `parseTensors`) load every *.safetensors of the folder itself.
DIRECTIONS = Path("steering", "directions.safetensors")
KEPT = Path("steering", "fit.safetensors")


def record(
    loaded: LoadedRecipe,
    ready: Prepared,
    model: LiveModel,
    hashes: Mapping[str, str],
    fitted: Fitted,
    written: Written,
    measured: Measured,
    staging: Path,
) -> None:
    """Write what stands beside the weights: answers, card, Modelfile, and the manifest last."""
    write_answers(staging / "answers.jsonl", measured)
    if written.gguf:
        if written.said:
            write_parity(staging / written.gguf, measured.parity["llama.cpp"])
        ends = model.tokenizer.convert_ids_to_tokens(sorted(model.end_tokens()))
        parts = [part.path.name for part in GGUFFile.open(staging / written.gguf).files]
        write_ollama(staging, parts, parameters(ready.base.folder, ends))
    save_directions(fitted.directions, staging / DIRECTIONS)
    if fitted.kept:
        write_kept(fitted.kept, staging / KEPT)
    content = _content(loaded, ready, hashes, fitted, written, measured)
    evidence = _evidence(content, loaded)
    text = card(evidence, figures=write_report(staging, evidence))
    (staging / "README.md").write_text(text, encoding="utf-8")
    _write_manifest(staging, content)


def failed_folder(folder: Path) -> Path:
    """Where the evidence of a bake into `folder` goes whose guard broke."""
    return folder.with_name(f"{folder.name}.failed")


def record_failure(
    loaded: LoadedRecipe,
    ready: Prepared,
    hashes: Mapping[str, str],
    fitted: Fitted,
    written: Written,
    measured: Measured,
    broken: Sequence[str],
    folder: Path,
) -> None:
    """Write the evidence of a bake that broke its guard: no weights, and the manifest says why."""
    write_answers(folder / "answers.jsonl", measured)
    content = _content(loaded, ready, hashes, fitted, written, measured)
    content["broken"] = list(broken)
    write_report(folder, _evidence(content, loaded))
    _write_manifest(folder, content)


def _evidence(content: Mapping[str, object], loaded: LoadedRecipe) -> Evidence:
    """What will be read of the manifest: JSON has no tuples."""
    return Evidence.of(json.loads(json.dumps(content)), loaded, NAME)


def _write_manifest(folder: Path, content: dict[str, object]) -> None:
    """Write the manifest, with the hashes of all that is there."""
    outputs = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    content["outputs"] = {
        path.relative_to(folder).as_posix(): digest for path, digest in file_hashes(outputs).items()
    }
    write_manifest(folder, content)


def _content(
    loaded: LoadedRecipe,
    ready: Prepared,
    hashes: Mapping[str, str],
    fitted: Fitted,
    written: Written,
    measured: Measured,
) -> dict[str, object]:
    """The manifest but for the hashes of what was written."""
    recipe = loaded.recipe
    others = [part.path for part in ready.gguf.files] if ready.gguf else []
    export = recipe.export.gguf
    if export and export.convert and export.convert.imatrix not in (None, TEXT):
        others.append(Path(str(export.convert.imatrix)))
    return {
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
        "probes": ready.given,
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
