"""Answers by the hash of who was asked what, so that a run that was cut off asks nothing twice."""

from collections.abc import Mapping, Sequence
from itertools import islice

from bake.evaluation.subject import Manner, Subject
from bake.judge.cache import Replies
from bake.progress import progress
from bake.work import ALONE, Work

__all__ = ["answered"]

# Prompts that one process answers between two writes to the cache.
CHUNK = 64


def answered(
    subject: Subject,
    prompts: Sequence[str],
    manner: Manner,
    replies: Replies,
    work: Work = ALONE,
) -> dict[str, str]:
    """The answer to each prompt, from the cache where an equal question was answered before.

    Equal are the subject's identity, the prompt, and all of the manner. The processes of `work`
    take the missing ones in turn, as one process would group them; the main one reads and writes
    the cache. Raises OutputError where the cache cannot be written, and what a subject raises.
    """
    asked = {prompt: _key(subject, prompt, manner) for prompt in dict.fromkeys(prompts)}
    known = work.by_main(lambda: _known(asked, replies))
    # Prompts of about one length share a batch.
    missing = sorted((one for one in asked if one not in known), key=len)
    if not missing:
        return known
    parts = (missing[start : start + CHUNK] for start in range(0, len(missing), CHUNK))
    with progress(f"answers, {subject.name}", len(missing), work.main) as update:
        while turn := list(islice(parts, work.size)):
            own = [subject.answers(part, manner, update) for part in work.own(turn)]
            for rank, (part, found) in enumerate(zip(turn, work.gathered(own), strict=False)):
                for prompt, text in zip(part, *found, strict=True):
                    known[prompt] = text
                    if work.main:
                        replies.put(asked[prompt], text)
                if rank != work.rank:
                    update(len(part))
    return known


def _known(asked: Mapping[str, dict[str, object]], replies: Replies) -> dict[str, str]:
    found = {prompt: replies.get(key) for prompt, key in asked.items()}
    return {prompt: reply for prompt, reply in found.items() if reply is not None}


def _key(subject: Subject, prompt: str, manner: Manner) -> dict[str, object]:
    return {
        "answers": subject.identity,
        "prompt": prompt,
        "tokens": manner.tokens,
        "system": manner.system,
        "thinking": manner.thinking,
        "marks": [manner.marks.begin, manner.marks.end],
    }
