"""What a bake writes beside the weights: the evidence, and the manifest last."""

import json
from collections.abc import Mapping
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

__all__ = ["DIRECTIONS", "KEPT", "record"]

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
