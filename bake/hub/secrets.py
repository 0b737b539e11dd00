"""Access tokens in files that are about to be published."""

import re
from collections.abc import Iterable
from pathlib import Path

__all__ = ["holds_token"]

# What the Hub's tokens look like (https://huggingface.co/docs/hub/security-tokens).
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
LONGEST = 512
CHUNK = 8 << 20


def holds_token(content: Path | bytes, known: Iterable[str] = ()) -> bool:
    """Whether a file or its bytes hold a token of the Hub, or one of the secrets given."""
    secrets = [one.encode() for one in known if one]
    for piece in [content] if isinstance(content, bytes) else _pieces(content):
        if TOKEN.search(piece) or any(secret in piece for secret in secrets):
            return True
    return False


def _pieces(path: Path) -> Iterable[bytes]:
    """A file in pieces that overlap, so that nothing is cut in two."""
    kept = b""
    with path.open("rb") as stream:
        while data := stream.read(CHUNK):
            yield kept + data
            kept = data[-LONGEST:]
