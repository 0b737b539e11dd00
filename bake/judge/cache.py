"""Judges' replies by the hash of what was asked, so that a rerun asks nothing twice."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bake.errors import OutputError

__all__ = ["Replies"]


@dataclass(frozen=True)
class Replies:
    """A folder of replies, a file each; several processes may use it at once.

    Where not `read`, what is there is asked for again, and written.
    """

    folder: Path
    read: bool = True

    def get(self, request: Mapping[str, object]) -> str | None:
        """The reply to an equal request; None where there is none that can be read."""
        if not self.read:
            return None
        try:
            found = json.loads(self._file(request).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        reply = found.get("reply") if isinstance(found, dict) else None
        return reply if isinstance(reply, str) else None

    def put(self, request: Mapping[str, object], reply: str) -> None:
        """Keep a reply; raises OutputError where the folder cannot be written."""
        file = self._file(request)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=".reply-")
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                    json.dump({"reply": reply}, stream)
                Path(name).replace(file)
            finally:
                Path(name).unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(
                f"{file.parent}: {error.strerror}; BAKE_CACHE names another cache folder"
            ) from error

    def _file(self, request: Mapping[str, object]) -> Path:
        text = json.dumps(request, sort_keys=True, ensure_ascii=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.json"
