"""What stands in front of the tokens where a gate decides, as classes that it is shut on.

A rank-one gate acts on every token, and what it adds at a question's own tokens reaches the
decision through the attention of the blocks behind. No other class holds its probe there.
"""

from collections.abc import Mapping, Sequence

from bake.activations import Conversation
from bake.tokens import shared_beginning

__all__ = ["questions"]


def questions(conversations: Mapping[str, Sequence[Conversation]]) -> dict[str, list[Conversation]]:
    """Of every role's chats the tokens in front of `decision`, and once what all begin with.

    The classes are called `question, ROLE` and `beginning`; prompts without such a token are in
    none.
    """
    first = min(one.decision[0] for found in conversations.values() for one in found)
    every = [one.ids for found in conversations.values() for one in found]
    beginning = shared_beginning(every)[:first]
    begun = len(beginning)
    found = {
        f"question, {role}": [_in_front(one, begun) for one in chats if one.decision[0] > begun]
        for role, chats in conversations.items()
    }
    if beginning:
        found["beginning"] = [Conversation(beginning, begun - 1, tuple(range(begun)), 0.0)]
    return {role: each for role, each in found.items() if each}


def _in_front(one: Conversation, begun: int) -> Conversation:
    """The tokens from `begun` to where the gate decides, none of which is a direction's."""
    end = one.decision[0]
    return Conversation(one.ids[:end], end - 1, tuple(range(begun, end)), 0.0)
