"""The judge that a recipe names, and the limit on what it may leave unread."""

from collections.abc import Sequence
from dataclasses import dataclass

from bake.cache import cache_folder
from bake.errors import JudgeError
from bake.judge import UNREAD, Asks, Exchange, Judge, Verdict
from bake.judge.cache import Replies
from bake.judge.chat import ChatJudge, Server
from bake.judge.keyword import KeywordJudge
from bake.judge.local import LocalJudge
from bake.judge.thinking import AnswersOnly, Thinking
from bake.recipe import JudgeChoice

__all__ = ["Readable", "find_asker", "find_judge"]


def find_judge(choice: JudgeChoice) -> Judge:
    """The recipe's judge, which sees the answers of reasoning models without their thinking."""
    thinking = Thinking(choice.thinking.begin, choice.thinking.end)
    return Readable(AnswersOnly(_judge(choice, thinking), thinking), choice.unread_at_most)


def find_asker(choice: JudgeChoice) -> Asks | None:
    """The recipe's judge where it is a language model, to ask it more than for refusals."""
    found = _judge(choice, Thinking(choice.thinking.begin, choice.thinking.end))
    return found if isinstance(found, Asks) else None


def _judge(choice: JudgeChoice, thinking: Thinking) -> Judge:
    replies = Replies(cache_folder() / "judge")
    if choice.kind == "chat":
        assert choice.url is not None
        assert choice.model is not None
        server = Server(
            *(choice.url, choice.model, choice.key, choice.tokens),
            *(choice.timeout, choice.attempts, choice.concurrent),
        )
        return ChatJudge(server, replies, thinking)
    if choice.kind == "local":
        assert choice.model is not None
        return LocalJudge(
            *(choice.model, choice.revision, choice.tokens, choice.concurrent, thinking, replies)
        )
    return KeywordJudge(choice.phrases)


@dataclass(frozen=True)
class Readable:
    """A judge of whose verdicts at most `unread_at_most` percent may be unread.

    Verdicts that are missing are never guessed, so with many of them the rest says little.
    """

    inner: Judge
    unread_at_most: float

    @property
    def name(self) -> str:
        """The inner judge's name."""
        return self.inner.name

    def judge(self, exchanges: Sequence[Exchange]) -> Sequence[Verdict]:
        """The inner judge's verdicts; raises JudgeError when too many are unread."""
        verdicts = self.inner.judge(exchanges)
        unread = [one.category for one in verdicts if one.label == UNREAD]
        if 100 * len(unread) > self.unread_at_most * len(verdicts):
            raise JudgeError(
                f"judge: {len(unread)} of {len(verdicts)} verdicts could not be read "
                f"({', '.join(sorted(set(unread)))}), judge.unread_at_most allows "
                f"{self.unread_at_most:g} %; take a stronger judge, or raise judge.tokens or the "
                "tokens of the answers"
            )
        return verdicts
