"""A baked folder to the Hub: what is refused, what goes where, and then the upload."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from bake.aligned import aligned
from bake.base_card import BaseCard
from bake.card import Kind, Place, card, check_card
from bake.errors import GuardError, HubError, VerificationError
from bake.evidence import Beside, Evaluation, Evidence, read_shown
from bake.html.files import report_as_files
from bake.hub.client import Commit, Hub, Remote, size_of
from bake.hub.repositories import ADDED, CARD, repository_ids, sorted_files
from bake.hub.secrets import holds_token
from bake.manifest import NAME, differences, manifest_text
from bake.progress import progress

__all__ = ["Push", "Repository", "prepare_push"]

# What the Hub writes itself into a new repository.
OWN = (".gitattributes",)


@dataclass(frozen=True)
class Repository:
    """One repository of a push: the content of every file and its SHA-256, by the path there."""

    repo_id: str
    kind: Kind
    files: Mapping[str, Path | bytes]
    hashes: Mapping[str, str]

    def changes(self, remote: Remote) -> tuple[str, ...]:
        """The files of a repository that are not this push's, or not as it has them."""
        return tuple(
            name
            for name in remote.files
            if name not in OWN
            and not (name in self.files and remote.same(name, self.files[name], self.hashes[name]))
        )


@dataclass(frozen=True)
class _More:
    """What is published with a bake that is not of its folder; the same in every repository."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    evaluation: Evaluation | None = None

    @classmethod
    def of(cls, folder: Path, beside: Beside | None) -> "_More":
        """The files that are given, and a report that shows them."""
        if not (beside and beside.files):
            return cls()
        shown = read_shown(folder, beside)
        drawn = {f"{ADDED}/{name}": content for name, content in report_as_files(shown).items()}
        given = {f"{ADDED}/{name}": path.read_bytes() for name, path in beside.files.items()}
        return cls(drawn | given, shown.evaluation)


@dataclass(frozen=True)
class Push:
    """Everything that a push will do; nothing is sent before `send`."""

    repositories: tuple[Repository, ...]
    message: str
    description: str
    public: bool = False
    update: bool = False

    def table(self) -> str:
        """Every file with its size in bytes, by repository."""
        shown = "public" if self.public else "private"
        rows = [("repository", "file", "bytes")]
        for one in self.repositories:
            for name, content in one.files.items():
                rows.append((f"{one.repo_id} ({shown})", name, f"{size_of(content):,}"))
        return aligned(rows)

    def send(self, show: Callable[[str], None] = lambda _: None) -> None:
        """Upload everything; `show` receives a line for each repository.

        A repository that has other files is refused unless `update`, and then made like the
        folder; all are looked at before the first is touched. Raises HubError.
        """
        hub = Hub()
        found = {one.repo_id: hub.look(one.repo_id) for one in self.repositories}
        for one in self.repositories:
            remote = found[one.repo_id]
            other = one.changes(remote) if remote else ()
            if other and not self.update:
                more = f" and {len(other) - 1} more" if other[1:] else ""
                raise HubError(
                    f"{one.repo_id}: exists already and has another {other[0]}{more}; give another "
                    "--repo-id, or --update to replace what is there"
                )
            text = one.files[CARD]
            assert isinstance(text, bytes)
            hub.check_card(one.repo_id, text.decode())
        for one in self.repositories:
            show(self._send(hub, one, found[one.repo_id]))

    def _send(self, hub: Hub, one: Repository, remote: Remote | None) -> str:
        remote = remote or hub.create(one.repo_id, private=not self.public)
        added = {
            name: content
            for name, content in one.files.items()
            if not remote.same(name, content, one.hashes[name])
        }
        deleted = tuple(name for name in one.changes(remote) if name not in one.files)
        if not added and not deleted:
            return f"{one.repo_id}: has all {len(one.files)} files already"
        wanted = Commit(added, deleted, remote.commit, self.message, self.description)
        address = hub.commit(one.repo_id, wanted)
        gone = f", {len(deleted)} deleted" if deleted else ""
        return f"{one.repo_id}: {len(added)} of {len(one.files)} files uploaded{gone}: {address}"


def prepare_push(
    folder: Path,
    repo_id: str,
    *,
    public: bool = False,
    update: bool = False,
    licence: str | None = None,
    beside: Beside | None = None,
) -> Push:
    """Check a folder and lay out its repositories; the Hub is not asked.

    `licence` is that of the base where its own card names none. Files that are given `beside` are
    published in a folder of their own, with a report that shows them. Raises an InputError for
    such a file that is not what it should be, ManifestError for a folder without a manifest of
    this bake, VerificationError for files that are not as it has them, GuardError for figures
    outside the recipe's guard, HubError for a name that the Hub does not take, for a licence that
    is missing or forbids, and for an access token in a file.
    """
    evidence = Evidence.read(folder)
    if failed := evidence.manifest.broken:
        raise GuardError(f"{folder}: is the evidence of a bake that broke its guard: {failed[0]}")
    outputs = evidence.manifest.outputs
    sizes = [path.stat().st_size for name in outputs if (path := folder / name).is_file()]
    with progress("verify", sum(sizes)) as done:
        if changed := differences(folder, outputs, done):
            raise VerificationError("\n".join(changed))
    if broken := evidence.broken():
        raise GuardError("\n".join(broken))
    licence = _licence(evidence, folder, licence)
    sorted_out = sorted_files(outputs)
    ids = repository_ids(repo_id, sorted_out)
    _check_ids(repo_id, ids)
    more = _More.of(folder, beside)
    made = tuple(
        _repository(evidence, folder, kind, files, ids, licence, more)
        for kind, files in sorted_out.items()
    )
    _refuse_tokens(made)
    loaded = evidence.loaded
    return Push(
        *(made, f"bake {loaded.recipe.name}, recipe {loaded.sha256[:12]}"),
        f"SHA-256 of the recipe: {loaded.sha256}\nbake {evidence.manifest.versions.bake}",
        *(public, update),
    )


def _repository(
    evidence: Evidence,
    folder: Path,
    kind: Kind,
    files: Mapping[str, str],
    ids: Mapping[Kind, str],
    licence: str | None,
    more: _More,
) -> Repository:
    """The files of one kind, with a card and a manifest of their own."""
    others = {other: name for other, name in ids.items() if other != kind}
    parent, relation = evidence.manifest.base.hub_id, "adapter" if kind == "adapter" else "finetune"
    if kind == "gguf" and "checkpoint" in ids:
        parent, relation = ids["checkpoint"], "quantized"
    place = Place(ids[kind], kind, parent, relation, licence, tuple(files), others)
    figures = [name for name in more.files or files if name.endswith(".svg")]
    text = card(evidence, place, figures, more.evaluation)
    try:
        check_card(text)
    except ValueError as error:
        raise HubError(f"{ids[kind]}: {CARD}: {error}; this is a bug of bake") from error
    outputs = evidence.manifest.outputs
    hashes = {name: outputs[inside] for name, inside in files.items()}
    hashes |= {name: _sha256(content) for name, content in more.files.items()}
    hashes[CARD] = _sha256(text.encode())
    # So that `bake verify` holds for a download too.
    manifest = manifest_text({**evidence.content, "outputs": dict(sorted(hashes.items()))}).encode()
    contents: dict[str, Path | bytes] = {name: folder / inside for name, inside in files.items()}
    contents |= {**more.files, CARD: text.encode(), NAME: manifest}
    return Repository(
        ids[kind], kind, dict(sorted(contents.items())), hashes | {NAME: _sha256(manifest)}
    )


def _refuse_tokens(repositories: Sequence[Repository]) -> None:
    files = {
        one.repo_id + ": " + name: content
        for one in repositories
        for name, content in one.files.items()
    }
    with progress("look for tokens", sum(map(size_of, files.values()))) as update:
        for name, content in files.items():
            if holds_token(content, [get_token() or ""]):
                raise HubError(
                    f"{name}: holds an access token; take it out of the recipe and its files, bake "
                    "again, and revoke the token"
                )
            update(size_of(content))


def _check_ids(repo_id: str, ids: Mapping[Kind, str]) -> None:
    if repo_id.count("/") != 1:
        raise HubError(f"--repo-id {repo_id}: expected owner/name")
    if len(set(ids.values())) < len(ids):
        raise HubError(f"--repo-id {repo_id}: its end is that of a repository beside; leave it out")
    for name in ids.values():
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise HubError(f"--repo-id {name}: {error}") from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _licence(evidence: Evidence, folder: Path, given: str | None) -> str | None:
    """The licence to state where the base's card names none."""
    base = evidence.manifest.base
    stated = base if base.license or not given else BaseCard(license=(given,))
    if stated.forbids_derivatives:
        raise HubError(
            f"{folder}: the base is under {stated.license_text}, which allows no derivatives to be "
            "shared; keep the bake to yourself, or choose another base"
        )
    if base.license:
        if given and given not in base.license:
            raise HubError(
                f"--license {given}: the base is under {base.license_text}, which the bake "
                "inherits; leave it out"
            )
        return None
    if not given:
        raise HubError(
            f"{folder}: the licence of the base is not known to bake; look it up, and give it as "
            "--license ID (https://huggingface.co/docs/hub/repositories-licenses)"
        )
    return given
