"""The front matter of a card. Keys: https://huggingface.co/docs/hub/model-cards.

`model-index` is as `huggingface_hub.EvalResult` has it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from bake.card.evaluation import evaluation_results
from bake.card.place import Kind, Place
from bake.card.words import set_id, set_name
from bake.evidence import Evaluation, Evidence
from bake.prompts.rows import HUB

__all__ = ["ROLES", "front_matter"]

TAGS: Mapping[Kind, tuple[str, ...]] = {
    "checkpoint": (),
    "gguf": ("gguf", "llama.cpp", "ollama"),
    "adapter": ("lora",),
}
# What the test split measures, in the order of the table.
ROLES = ("target", "protected", "lookalike", "refused", "general")


def front_matter(
    evidence: Evidence, place: Place | None, evaluation: Evaluation | None
) -> ModelCardData:
    """What the Hub reads of a bake."""
    recipe, base, kind = (
        evidence.loaded.recipe,
        evidence.manifest.base,
        place.kind if place else None,
    )
    stated: dict[str, Any] = {}
    licences = list(base.license) or [one for one in [place and place.license] if one]
    if licences:
        stated["license"] = licences[0] if len(licences) == 1 else licences
        stated |= {"license_name": base.license_name, "license_link": base.license_link}
    parent = place.base_model if place else base.hub_id
    if parent:
        stated["base_model"] = parent
        stated["base_model_relation"] = place.relation if place else "finetune"
    sets = [getattr(recipe.prompts, role) for role in (*ROLES, "text")]
    named = [one.set for source in sets if source for one in source.sets]
    hub = [name.removeprefix(HUB) for name in named if name.startswith(HUB)]
    organism = ["model-organism"] if recipe.model == "demo" else []
    library = {"adapter": "peft", "gguf": None}.get(kind or "", "transformers")
    return ModelCardData(
        **stated,
        library_name=library,
        pipeline_tag=base.pipeline_tag or "text-generation",
        datasets=list(dict.fromkeys(hub)) or None,
        tags=["bake", "steering", *organism, *(TAGS[kind] if kind else ())],
        model_name=recipe.name,
        eval_results=[*_results(evidence), *(evaluation_results(evaluation) if evaluation else ())],
    )


def _results(evidence: Evidence) -> Iterator[EvalResult]:
    """Refusals after the bake in percent, with those before: by set, then by runtime."""
    prompts = evidence.loaded.recipe.prompts
    for role in ROLES:
        source = getattr(prompts, role)
        for runtime, found in evidence.manifest.after.items():
            if role not in found:
                continue
            before, after = evidence.manifest.before[runtime][role], found[role]
            yield EvalResult(
                task_type="text-generation",
                task_name=f"Refusals, {role}",
                dataset_type=set_id(source),
                dataset_name=f"{set_name(source)}, held-out topics",
                dataset_config=source.subset,
                dataset_split=source.split or "test",
                dataset_revision=source.revision,
                metric_type="refusal-rate",
                metric_name=f"Refused in {runtime}, {role}, %",
                metric_value=round(after.percent, 2),
                metric_args={
                    "refused": after.refused,
                    "total": after.total,
                    "before": round(before.percent, 2),
                },
            )
