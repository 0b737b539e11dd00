"""The evidence of a bake, from its folder or from a repository of the Hub."""

from pathlib import Path

from bake.evidence import Evidence
from bake.hub.client import download
from bake.manifest import NAME

__all__ = ["find_evidence"]


def find_evidence(source: str, revision: str | None = None) -> Evidence:
    """The evidence of a baked folder, or of a repository at a commit, branch or tag.

    A folder that exists wins. Raises ManifestError where there is no manifest, HubError where the
    Hub gives none.
    """
    if Path(source).is_dir() or source.count("/") != 1:
        return Evidence.read(Path(source))
    return Evidence.read(download(source, NAME, revision).parent)
