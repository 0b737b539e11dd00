"""The proof that nothing which is asked was seen by the fit or the search."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from bake.errors import ManifestError, PromptError
from bake.evaluation.sets import Asked
from bake.prompts import Prompt, Splits, fingerprint
from bake.prompts.near import plain, repeated

__all__ = ["Proof", "check_splits", "prompt_hash", "proved"]

SEEN = ("fit", "select")


@dataclass(frozen=True)
class Proof:
    """Which prompts were seen and which are asked: fingerprints, and the hash of every prompt.

    Two lists of hashes without a common one are two sets without a common prompt, whoever looks;
    what is nearly the same, and topics, were compared here. `manifest` says whether the
    fingerprints of what was seen are those of a bake's manifest.
    """

    seen: Mapping[str, tuple[str, tuple[str, ...]]]
    asked: Mapping[str, tuple[str, tuple[str, ...]]]
    manifest: bool

    def __str__(self) -> str:
        prompts = len({one for _, found in self.asked.values() for one in found})
        seen = len({one for _, found in self.seen.values() for one in found})
        source = "the manifest's fingerprints" if self.manifest else "the recipe's sets"
        return (
            f"disjoint: none of {prompts} prompts, nor one nearly the same nor its topic, is among "
            f"the {seen} that the fit or the search may have seen ({source})"
        )

    def as_json(self) -> dict[str, Any]:
        """Every hash as plain values."""
        named = {"seen": self.seen, "asked": self.asked}
        return {
            "hash": "SHA-256 of the prompt in lower case without punctuation (bake.prompts.near)",
            "by_manifest": self.manifest,
            **{
                key: {
                    name: {"fingerprint": digest, "prompts": list(hashes)}
                    for name, (digest, hashes) in found.items()
                }
                for key, found in named.items()
            },
        }


def check_splits(splits: Mapping[str, Splits], manifest: Mapping[str, Any], place: str) -> None:
    """Refuse prompt sets that are not those of a bake any more.

    Raises ManifestError, which names the role and the split.
    """
    stated = manifest.get("prompts")
    for role, parts in splits.items():
        for name in (*SEEN, "test"):
            then = stated.get(role, {}).get(name) if isinstance(stated, dict) else None
            if then != fingerprint(getattr(parts, name)):
                raise ManifestError(
                    f"{place}: prompts.{role}.{name}: the set is not what it was, so nothing says "
                    "what the fit has seen; evaluate with the version of bake and the files that "
                    "baked it"
                )


def proved(asked: Sequence[Asked], splits: Mapping[str, Splits], manifest: bool) -> Proof:
    """Compare everything that is asked with everything that may have been seen.

    Seen are the fit and select splits of every role and text. Raises PromptError for the first
    prompt that is among them, or nearly (`bake.prompts.near`), or whose topic is: for a role one
    that its own splits hold, for another set one of any role.
    """
    seen = {
        f"{role}, {name}": tuple(getattr(parts, name))
        for role, parts in splits.items()
        for name in SEEN
    }
    every = [one for found in seen.values() for one in found]
    for one in asked:
        topics = {
            prompt.topic
            for role, parts in splits.items()
            if role == one.name or (one.name not in splits and role != "text")
            for name in SEEN
            for prompt in getattr(parts, name)
        }
        twins = repeated([[p.text for p in every], [p.text for p in one.prompts]])[1]
        for place, prompt in enumerate(one.prompts):
            if place in twins or prompt.topic in topics:
                what = f"the prompt {prompt.text[:60]!r}" if place in twins else ""
                raise PromptError(
                    f"{one.name}: {what or f'the topic {prompt.topic!r}'} is among those that the "
                    "fit or the search may have seen; leave the set out with --sets, or take the "
                    "prompt out of it"
                )
    return Proof(
        {name: (fingerprint(found), _hashes(found)) for name, found in seen.items() if found},
        {one.name: (fingerprint(one.prompts), _hashes(one.prompts)) for one in asked},
        manifest,
    )


def prompt_hash(text: str) -> str:
    """SHA-256 of a prompt, case, spacing and punctuation aside."""
    return sha256(plain(text).encode()).hexdigest()


def _hashes(prompts: Sequence[Prompt]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(prompt_hash(one.text) for one in prompts))
