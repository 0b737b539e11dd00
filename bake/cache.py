"""The user's cache folder: what bake keeps there it can make again."""

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """Where bake keeps what it can make again: $BAKE_CACHE, or ~/.cache/bake."""
    chosen = os.environ.get("BAKE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bake"
