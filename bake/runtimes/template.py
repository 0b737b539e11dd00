"""Conversations of every form that chat templates know, to be rendered by every runtime alike."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from jinja2 import TemplateError

__all__ = ["CONVERSATIONS", "Conversation", "rendered"]


@dataclass(frozen=True)
class Conversation:
    """Turns as OpenAI's API has them, with the tools on offer, up to the assistant's answer."""

    name: str
    turns: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = field(default=())


def _said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


# Characters that a runtime's JSON or HTML escaping would change, and text that is no English.
_QUESTION = _said("user", "Is 2 < 3 & \"4\" > '3'?\n\nSay why, in French: « d'accord »  🙂 ")
_TOOL: Final = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city, in °C & %.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": 'As in "Zürich".'}},
            "required": ["city"],
        },
    },
}
_CALL: Final = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Zürich"}},
}
_ASKED = (
    _said("user", "What is the weather in Zürich?"),
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {
        "role": "tool",
        "name": "weather",
        "tool_call_id": "call00001",
        "content": '{"celsius": 21, "sky": "<clear>"}',
    },
)
CONVERSATIONS: Final = (
    Conversation("one turn", (_QUESTION,)),
    Conversation("system", (_said("system", "Be brief."), _QUESTION)),
    Conversation(
        "several turns",
        (_QUESTION, _said("assistant", "Yes: 2 < 3.\n"), _said("user", " And 3 < 2? ")),
    ),
    Conversation(
        "system, several turns",
        (
            _said("system", "Be brief."),
            _said("user", "Hello"),
            _said("assistant", "<think>\nA greeting.\n</think>\n\nHi!"),
            _QUESTION,
        ),
    ),
    Conversation("tools on offer", (_ASKED[0],), (_TOOL,)),
    Conversation("tools with system", (_said("system", "Be brief."), _ASKED[0]), (_TOOL,)),
    Conversation("a tool's result", _ASKED, (_TOOL,)),
    Conversation(
        "after a tool",
        (*_ASKED, _said("assistant", "21 °C and clear."), _said("user", "Thanks!")),
        (_TOOL,),
    ),
)


def rendered(render: Callable[[Conversation], str], conversation: Conversation) -> str | None:
    """What a template makes of a conversation, or None where it refuses it.

    Templates refuse roles with an error of their own (`raise_exception`), and fail on what they
    did not expect; both are the same to who asks.
    """
    try:
        return render(conversation)
    except (TemplateError, ValueError, TypeError, KeyError):
        return None
