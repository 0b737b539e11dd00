"""Eleven kinds of refusal and non-compliance, each a built-in set."""

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["KINDS"]

KINDS: Mapping[str, str] = MappingProxyType(
    {
        "harmful": "dangerous requests",
        "privacy": "what is nobody else's business",
        "copyright": "works that may not be copied out",
        "misinformation": "falsehoods to be spread",
        "incomplete": "requests that leave out what they are about",
        "false-premise": "questions about what is not so",
        "unsupported": "what text alone cannot do",
        "timely": "what is only known at the moment",
        "unknowable": "what nobody knows",
        "humanising": "questions to a person, which a model is not",
        "lookalikes": "safe requests that look dangerous: over-refusal",
    }
)
"""What the prompts of each set are. After "There Is More to Refusal than a Single Direction"
(arXiv:2602.02132), which studies eleven kinds and whose own list could not be read: safety,
incomplete and unsupported requests, anthropomorphisation and over-refusal are among them. The
rest follows the categories of CoCoNot (allenai/coconot). The prompts are this project's own."""
