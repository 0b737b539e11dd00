"""What the base's own model card states and a bake's card takes over: licence and task."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bake.recipe import Recipe
from bake.source import base_model

__all__ = ["BaseCard", "base_card", "licence_of"]

UNKNOWN = ("unknown", "")


@dataclass(frozen=True)
class BaseCard:
    """A base model as cards name it; None and nothing where it is not known.

    `commit` is of the Hub. `license` are identifiers of the Hub, for `other` with a name and a
    link (https://huggingface.co/docs/hub/repositories-licenses).
    """

    hub_id: str | None = None
    commit: str | None = None
    license: tuple[str, ...] = ()
    license_name: str | None = None
    license_link: str | None = None
    pipeline_tag: str | None = None

    @property
    def forbids_derivatives(self) -> bool:
        """Whether the licence is one without derivatives, as CC BY-ND and CC BY-NC-ND are."""
        names = [*self.license, self.license_name or ""]
        return any(re.search(r"(^|[-_ ])nd([-_ ]|$)", name.casefold()) for name in names)

    @property
    def license_text(self) -> str:
        """The licence as people read it; empty where it is not known."""
        return self.license_name or ", ".join(self.license)


def base_card(recipe: Recipe, folder: Path) -> BaseCard:
    """What is known of the recipe's model, whose checkpoint lies in `folder`."""
    hub_id = base_model(recipe).hub_id or None
    if recipe.model == "demo":
        from bake.demo.base import LICENSE

        return BaseCard(hub_id, license=(LICENSE,))
    front = _front_matter(folder / "README.md")
    licence = licence_of(front)
    link = licence.license_link
    if hub_id and link and not re.match(r"https?://", link):
        # A path inside the base's own repository.
        link = f"https://huggingface.co/{hub_id}/blob/main/{link}"
    task = front.get("pipeline_tag")
    return BaseCard(
        *(hub_id, _commit(folder), licence.license, licence.license_name, link),
        task if isinstance(task, str) else None,
    )


def licence_of(front: Mapping[str, Any]) -> BaseCard:
    """The licence that a card's front matter names, and nothing else."""
    named = front.get("license")
    ids = named if isinstance(named, list) else [named]
    known = tuple(one for one in ids if isinstance(one, str) and one not in UNKNOWN)
    name, link = front.get("license_name"), front.get("license_link")
    return BaseCard(
        license=known,
        license_name=name if isinstance(name, str) and known else None,
        license_link=link if isinstance(link, str) and known else None,
    )


def _front_matter(path: Path) -> Mapping[str, Any]:
    """The values above a card's text; none for a file that has none, or nothing readable."""
    from huggingface_hub import metadata_load

    try:
        return metadata_load(path) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _commit(folder: Path) -> str | None:
    """The commit of a folder in the Hub's cache, whose name it is."""
    cached = folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name)
    return folder.name if cached else None
