"""Answers by the hash of who was asked what, so that a run that was cut off asks nothing twice."""

from collections.abc import Sequence

from bake.evaluation.subject import Manner, Subject
from bake.judge.cache import Replies
from bake.progress import progress

__all__ = ["answered"]

# Prompts that are answered between two writes to the cache.
CHUNK = 64


def answered(
    subject: Subject,
    prompts: Sequence[str],
    manner: Manner,
    replies: Replies,
) -> dict[str, str]:
    """The answer to each prompt, from the cache where an equal question was answered before.

    Equal are the subject's identity, the prompt, and all of the manner. Raises OutputError where
    the cache cannot be written, and what a subject raises.
    """
    asked = {prompt: _key(subject, prompt, manner) for prompt in dict.fromkeys(prompts)}
    found = {prompt: replies.get(key) for prompt, key in asked.items()}
    known = {prompt: reply for prompt, reply in found.items() if reply is not None}
    # Prompts of about one length share a batch.
    missing = sorted((one for one in asked if one not in known), key=len)
    if not missing:
        return known
    with progress(f"answers, {subject.name}", len(missing)) as update:
        for start in range(0, len(missing), CHUNK):
            part = missing[start : start + CHUNK]
            for prompt, text in zip(part, subject.answers(part, manner, update), strict=True):
                replies.put(asked[prompt], text)
                known[prompt] = text
    return known


def _key(subject: Subject, prompt: str, manner: Manner) -> dict[str, object]:
    return {
        "answers": subject.identity,
        "prompt": prompt,
        "tokens": manner.tokens,
        "system": manner.system,
        "thinking": manner.thinking,
        "marks": [manner.marks.begin, manner.marks.end],
    }
