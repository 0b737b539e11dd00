"""The local judge: any causal language model with a chat template, through transformers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from bake.device import CPU, chosen_device
from bake.errors import JudgeError
from bake.judge import Exchange, Question, Verdict
from bake.judge.cache import Replies
from bake.judge.instruction import messages, read_verdict
from bake.judge.thinking import THINK_TAGS, Thinking
from bake.progress import progress

__all__ = ["LocalJudge"]


@dataclass(frozen=True)
class LocalJudge:
    """Verdicts of a model in this process, greedily, `batch` at a time.

    `model` is a folder or a Hub id; it is loaded when the first verdict is asked for that is
    not among the `replies`, which are kept by the folder's files or the Hub's revision.
    """

    model: str
    revision: str | None = None
    tokens: int = 512
    batch: int = 8
    thinking: Thinking = THINK_TAGS
    replies: Replies | None = None
    name: ClassVar[str] = "local"

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """One verdict an exchange, unread where the reply states none.

        Raises JudgeError when the model cannot be loaded.
        """
        return [read_verdict(one) for one in self.ask(exchanges, messages)]

    def ask(self, exchanges: Sequence[Exchange], question: Question) -> list[str]:
        """What the model says to a question about each, without its thinking; as `judge` raises."""
        requests = [self._request(one, question) for one in exchanges]
        replies = [self.replies.get(one) if self.replies else None for one in requests]
        missing = [row for row, reply in enumerate(replies) if reply is None]
        if missing:
            for place, reply in self._written([question(exchanges[row]) for row in missing]):
                replies[missing[place]] = reply
                if self.replies:
                    self.replies.put(requests[missing[place]], reply)
        return [self.thinking.answer(reply or "") or "" for reply in replies]

    def _request(self, exchange: Exchange, question: Question) -> dict[str, object]:
        """What is asked of which model; the cache goes by all of it."""
        folder = Path(self.model)
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        stamps = [[one.name, one.stat().st_size, one.stat().st_mtime_ns] for one in files]
        return {
            "local": self.model,
            "revision": self.revision,
            "files": stamps,
            "messages": question(exchange),
            "tokens": self.tokens,
        }

    def _written(self, asked: Sequence[list[dict[str, str]]]) -> Iterator[tuple[int, str]]:
        """What the model writes to each, with its place, as batches are done."""
        import torch

        from bake.model import batches

        model, tokenizer = self._loaded
        chats = [self._rendered(tokenizer, one) for one in asked]
        with progress("judge", len(chats)) as update:
            for part in batches(chats, tokenizer.pad_token_id, self.batch):
                with torch.inference_mode():
                    written = model.generate(
                        input_ids=part.ids.to(model.device),
                        attention_mask=part.mask.to(model.device),
                        max_new_tokens=self.tokens,
                        do_sample=False,
                        temperature=None,
                        top_p=None,
                        top_k=None,
                        pad_token_id=tokenizer.pad_token_id,
                    )
                replies = written[:, part.ids.shape[1] :].tolist()
                for row, ids in zip(part.rows, replies, strict=True):
                    yield row, tokenizer.decode(ids, skip_special_tokens=True)
                update(len(part.rows))

    def _rendered(self, tokenizer: Any, chat: list[dict[str, str]]) -> list[int]:
        """The token ids of the chat; its system message goes first where templates have none."""
        from jinja2 import TemplateError

        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        try:
            return list(tokenizer.apply_chat_template(chat, **options))
        except TemplateError:
            joined = "\n\n".join(one["content"] for one in chat)
            single = [{"role": "user", "content": joined}]
            return list(tokenizer.apply_chat_template(single, **options))

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        local, device = Path(self.model).is_dir(), chosen_device()
        where = {"revision": self.revision, "local_files_only": local, "trust_remote_code": False}
        try:
            model = AutoModelForCausalLM.from_pretrained(
                self.model, dtype="auto", device_map=None if device == CPU else device, **where
            )
            tokenizer = AutoTokenizer.from_pretrained(self.model, **where)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise JudgeError(
                f"judge.model: {self.model}: transformers cannot load it: {reason}; give a local "
                "folder or a Hub id of a causal language model"
            ) from error
        if tokenizer.chat_template is None:
            raise JudgeError(
                f"judge.model: {self.model}: the tokenizer has no chat template; give a chat model"
            )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return model.eval(), tokenizer
