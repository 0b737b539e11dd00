"""A baked folder as repositories of the Hub."""

from bake.hub.find import find_evidence
from bake.hub.push import Push, prepare_push

__all__ = ["Push", "find_evidence", "prepare_push"]
