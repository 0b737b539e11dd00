"""The Hub through its own client, with every failure as one line that holds no token.

Large files go up one after another before the one commit that names them, so that a repository
is never half of a bake, and a push that broke off sends no finished file again.
"""

import hashlib
import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars, logging

from bake.errors import HubError
from bake.manifest import CHUNK
from bake.progress import progress

__all__ = ["Commit", "Hub", "Remote", "download", "size_of"]

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
AGAIN = "push again: what is there already is not sent again"
LOOK = "check its name and --revision, and log in for a private one"
REMEDIES = {
    401: LOG_IN,
    403: "use a token that may write there",
    404: "check --repo-id, and that the token may write there",
    409: "give another --repo-id, or " + AGAIN,
    412: "somebody else has changed it meanwhile; " + AGAIN,
    429: "wait, then " + AGAIN,
}


@dataclass(frozen=True)
class Remote:
    """What a repository holds: its last commit, and the hash of every file.

    Large files have a SHA-256 of 64 digits, others git's SHA-1 of 40.
    """

    commit: str
    files: Mapping[str, str]

    def same(self, name: str, content: Path | bytes, sha256: str) -> bool:
        """Whether the repository's file of this name is this one."""
        found = self.files.get(name, "")
        return found == (sha256 if len(found) == 64 else _git_hash(content)) if found else False


@dataclass(frozen=True)
class Commit:
    """Files to add to a repository and names to delete, on top of one commit."""

    added: Mapping[str, Path | bytes]
    deleted: tuple[str, ...]
    parent: str
    message: str
    description: str


class Hub:
    """The Hub for whoever is logged in.

    Raises HubError where nobody is.
    """

    def __init__(self) -> None:
        token = get_token()
        if not token:
            raise HubError(f"the Hub: there is no token; {LOG_IN}")
        self._api = HfApi(token=token)
        # Its warnings name addresses that are signed, and so are secrets for a while.
        logging.set_verbosity(logging.CRITICAL)
        disable_progress_bars()

    def look(self, repo_id: str) -> Remote | None:
        """What a repository holds; None where there is none."""
        with _asked(repo_id):
            try:
                info = self._api.model_info(repo_id, files_metadata=True)
            except RepositoryNotFoundError:
                return None
        files = {one.rfilename: one.lfs.sha256 if one.lfs else one.blob_id for one in info.siblings}
        return Remote(info.sha, files)

    def check_card(self, repo_id: str, text: str) -> None:
        """Let the Hub say what it thinks of a card's front matter, before anything is sent."""
        with _asked(f"{repo_id}: README.md", "correct --license, or the recipe and bake again"):
            ModelCard(text).validate(repo_type="model")

    def create(self, repo_id: str, private: bool) -> Remote:
        """Make an empty repository."""
        with _asked(repo_id):
            self._api.create_repo(repo_id, private=private)
        made = self.look(repo_id)
        if made is None:
            raise HubError(f"{repo_id}: was made and cannot be seen; {AGAIN}")
        return made

    def commit(self, repo_id: str, wanted: Commit) -> str:
        """Upload and commit; returns the address of the commit."""
        with _asked(repo_id):
            additions = [CommitOperationAdd(*pair) for pair in wanted.added.items()]
            size = sum(one.upload_info.size for one in additions)
            with progress(f"upload {repo_id}", size) as update:
                for one in additions:
                    self._api.preupload_lfs_files(repo_id, additions=[one], free_memory=False)
                    update(one.upload_info.size)
            made = self._api.create_commit(
                repo_id,
                [*additions, *map(CommitOperationDelete, wanted.deleted)],
                commit_message=wanted.message,
                commit_description=wanted.description,
                parent_commit=wanted.parent,
            )
        return str(made.commit_url)


def download(repo_id: str, name: str, revision: str | None) -> Path:
    """One file of a repository, in the Hub's cache; raises HubError."""
    with _asked(repo_id, LOOK):
        return Path(hf_hub_download(repo_id, name, revision=revision))


@contextmanager
def _asked(what: str, remedy: str = AGAIN) -> Iterator[None]:
    """Turn what the client raises into one line."""
    try:
        yield
    # Of the Hub's answer, of the network, of LFS, of checks of its own.
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        cause, root = _answer(error), error.__cause__ or error
        said = str(cause.server_message or error) if cause else str(root)
        # A server may repeat what it was sent.
        text = re.sub(r"\s+", " ", said.replace(get_token() or said, "…")).strip()[:300]
        status = cause.response.status_code if cause else 0
        cut = any(isinstance(one, HTTPError | OSError) for one in (error, root))
        broken = "broke off" if cut else "refused"
        kind = f"the Hub says {status}" if cause else broken
        raise HubError(f"{what}: {kind}: {text}; {REMEDIES.get(status, remedy)}") from error


def _answer(error: BaseException) -> HfHubHTTPError | None:
    """The Hub's refusal behind an error of the client."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    return cause


def size_of(content: Path | bytes) -> int:
    """Bytes in a file, or in what will be one."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _git_hash(content: Path | bytes) -> str:
    """SHA-1 under which git has a file that is not large."""
    digest = hashlib.sha1(b"blob %d\0" % size_of(content))
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as stream:
        while data := stream.read(CHUNK):
            digest.update(data)
    return digest.hexdigest()
