"""Where a card will stand."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Kind", "Place"]

Kind = Literal["checkpoint", "gguf", "adapter"]


@dataclass(frozen=True)
class Place:
    """The repository of the Hub that a card is written for, and those that are pushed with it.

    `base_model` and `relation` are what the Hub's tree of models is made of; `license` is what
    whoever pushes says where the base does not; `files` are the names in the repository.
    """

    repo_id: str
    kind: Kind = "checkpoint"
    base_model: str | None = None
    relation: str = "finetune"
    license: str | None = None
    files: tuple[str, ...] = ()
    others: Mapping[Kind, str] = field(default_factory=dict)
