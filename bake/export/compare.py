"""Is a patched GGUF its base but for what was planned? Compared byte by byte."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from types import MappingProxyType

from bake.errors import VerificationError
from bake.export.gguf_bytes import Files, chunks, open_base, pairs_of_part, span_of
from bake.gguf_file import GGUFFile, GGUFTensor, Span

__all__ = ["compare"]


def compare(
    base: GGUFFile,
    patched: GGUFFile,
    touched: AbstractSet[str],
    renamed: Mapping[str, str] = MappingProxyType({}),
    pairs: Mapping[str, bytes] = MappingProxyType({}),
) -> tuple[str, ...]:
    """Return every tensor outside `touched`, in file order; both files agree on its bytes.

    `renamed` and `pairs` are those of `patch`. Names are those of the base; what is returned has
    those of the patched file. Raises `VerificationError` when such a tensor differs in type,
    shape, part or bytes, when a tensor of the base or of `touched` is missing, when there is
    another new one, or when a metadata pair is not the base's, or the one of `pairs`.
    """
    if len(base.files) != len(patched.files):
        raise VerificationError(
            f"{patched.path}: has {len(patched.files)} parts, and the base {len(base.files)}"
        )
    planned = {renamed.get(name, name) for name in base.tensors.keys() | touched}
    for name in sorted(planned - patched.tensors.keys()):
        raise VerificationError(f"{patched.path}: lost the tensor {name!r}")
    for name in sorted(patched.tensors.keys() - planned):
        raise VerificationError(f"{patched.path}: has a tensor that was not planned, {name!r}")
    new = len(planned) - len(base.tensors)
    untouched: list[str] = []
    for number, (old, now) in enumerate(zip(base.files, patched.files, strict=True)):
        with open_base(old.path) as source, open_base(now.path) as target:
            files = Files(old.path, source, now.path, target)
            _compare_pairs(files, old, now, pairs_of_part(base, number, pairs, new))
            for before in old.tensors.values():
                if before.name not in touched:
                    name = renamed.get(before.name, before.name)
                    _compare_tensors(files, before, patched.tensors[name], number)
                    untouched.append(name)
    return tuple(untouched)


def _compare_pairs(
    files: Files, base: GGUFFile, patched: GGUFFile, pairs: Mapping[str, bytes]
) -> None:
    for key in sorted(base.pairs.keys() | pairs.keys()):
        if key not in patched.pairs:
            raise VerificationError(f"{patched.path}: lost the metadata key {key!r}")
        now = patched.pairs[key]
        if key in pairs:
            same = b"".join(chunks(files.target, files.output, now)) == pairs[key]
        else:
            same = _same_bytes(files, base.pairs[key], now)
        if not same:
            raise VerificationError(f"{patched.path}: the metadata of {key!r} changed")
    for key in sorted(patched.pairs.keys() - base.pairs.keys() - pairs.keys()):
        raise VerificationError(f"{patched.path}: has a metadata key not planned, {key!r}")


def _compare_tensors(files: Files, before: GGUFTensor, after: GGUFTensor, part: int) -> None:
    if (before.type, before.shape, part) != (after.type, after.shape, after.part):
        was, now = (f"{t.type.name} {list(t.shape)}" for t in (before, after))
        place = f" in part {after.part + 1}" if after.part != part else ""
        raise VerificationError(
            f"{files.output}: tensor {after.name!r} was {was} and is {now}{place}"
        )
    if not _same_bytes(files, span_of(before), span_of(after)):
        raise VerificationError(f"{files.output}: tensor {after.name!r} changed without an edit")


def _same_bytes(files: Files, one: Span, other: Span) -> bool:
    if one.nbytes != other.nbytes:
        return False
    pairs = zip(
        chunks(files.source, files.path, one),
        chunks(files.target, files.output, other),
        strict=True,
    )
    return all(first == second for first, second in pairs)
