"""Who is evaluated, behind one interface: a live model, hooked or not, a GGUF, a server."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from bake.errors import CheckpointError, InputError
from bake.hooks import Intervention, steered
from bake.judge import Exchange
from bake.judge.cache import Replies
from bake.judge.chat import ChatJudge, Server
from bake.judge.thinking import THINK_TAGS, Thinking, spoken
from bake.llama import LlamaModel
from bake.model import LiveModel, batches, thinking_switch

__all__ = ["Live", "Llama", "Manner", "Reads", "Served", "Subject"]

Update = Callable[[int], None]
# What a template that can think with and without looks for.
SWITCH = "enable_thinking"
SERVER_NAMES = {"who": "server", "url": "--server", "model": "--model", "key": "--key"}


@dataclass(frozen=True)
class Manner:
    """How answers are given: at most `tokens`, after the system's turn, thinking or not.

    `thinking` None leaves that to the chat template; `marks` are those around it.
    """

    tokens: int = 128
    system: str | None = None
    thinking: bool | None = None
    marks: Thinking = THINK_TAGS

    def turns(self, prompt: str) -> list[tuple[str, str]]:
        """The conversation up to the answer."""
        system = [("system", self.system)] if self.system else []
        return [*system, ("user", prompt)]


class Subject(Protocol):
    """A model that answers, greedily.

    `identity` are plain values that decide its answers: hashes of files, versions.
    """

    name: str
    runtime: str
    identity: object

    def answers(self, prompts: Sequence[str], manner: Manner, update: Update) -> list[str]:
        """The answer to each prompt, with the marks of its thinking."""
        ...


@runtime_checkable
class Reads(Protocol):
    """A subject whose distribution over the next token can be read."""

    def render(self, prompt: str, manner: Manner) -> list[int]:
        """The tokens of a prompt up to where the answer begins."""
        ...

    def tokens(self, text: str) -> list[int]:
        """The tokens of plain text."""
        ...

    def logits(self, ids: Sequence[int]) -> Tensor:
        """The logits [n, vocabulary] behind each of n tokens, in float32."""
        ...


@dataclass
class Live:
    """A checkpoint in transformers, with hooks on it where there are `interventions`."""

    name: str
    model: LiveModel
    identity: object
    interventions: Sequence[Intervention] = ()
    batch: int = 32
    runtime: str = "transformers"

    def answers(self, prompts: Sequence[str], manner: Manner, update: Update) -> list[str]:
        """As in `Subject`; raises CheckpointError for a template that cannot be told to think."""
        starts = [self.render(one, manner) for one in prompts]
        with steered(self.model, self.interventions):
            found = self.model.answer(starts, manner.tokens, self.batch, update)
        text = self.model.text
        return [
            spoken(start, ids, text, manner.marks) for start, ids in zip(starts, found, strict=True)
        ]

    def render(self, prompt: str, manner: Manner) -> list[int]:  # noqa: D102 (see Reads)
        if manner.thinking is not None and SWITCH not in str(self.model.tokenizer.chat_template):
            raise _no_switch(self.name)
        model = self.model
        if (model.system, model.thinking) != (manner.system, manner.thinking):
            model = replace(model, system=manner.system, thinking=manner.thinking)
            self.model = model
        return model.render(prompt)

    def tokens(self, text: str) -> list[int]:  # noqa: D102
        return self.model.tokens(text)

    def logits(self, ids: Sequence[int]) -> Tensor:  # noqa: D102
        (batch,) = batches([ids], 0, 1)
        with steered(self.model, self.interventions):
            return self.model.logits(batch)[0]


@dataclass
class Llama:
    """A GGUF in llama.cpp, by the chat template in the file.

    llama.cpp's context is as long as what it has read so far, so `model` is opened again where
    something longer comes.
    """

    name: str
    path: Path
    identity: object
    parallel: int = 8
    runtime: str = "llama.cpp"
    _opened: list[tuple[int, LlamaModel]] = field(default_factory=list)

    def answers(self, prompts: Sequence[str], manner: Manner, update: Update) -> list[str]:
        """As in `Subject`; raises GGUFError for a file without a chat template."""
        starts = [self.render(one, manner) for one in prompts]
        longest = max(map(len, starts), default=0)
        model = self._model(longest + manner.tokens + 1)
        found = model.generate(starts, manner.tokens, update)
        return [
            spoken(start, ids, model.detokenize, manner.marks)
            for start, ids in zip(starts, found, strict=True)
        ]

    def render(self, prompt: str, manner: Manner) -> list[int]:  # noqa: D102 (see Reads)
        if manner.thinking is not None and SWITCH not in self._model(1).template:
            raise _no_switch(self.name)
        return self._model(1).render(manner.turns(prompt), thinking_switch(manner.thinking))

    def tokens(self, text: str) -> list[int]:  # noqa: D102
        return self._model(1).tokenize(text)

    def logits(self, ids: Sequence[int]) -> Tensor:  # noqa: D102
        return torch.from_numpy(self._model(len(ids)).logits(ids))

    def close(self) -> None:
        """Free the model."""
        for _, model in self._opened:
            model.close()
        self._opened.clear()

    def _model(self, room: int) -> LlamaModel:
        if not self._opened or self._opened[0][0] < room:
            self.close()
            # A little more than asked, so that the next one that is longer fits too.
            room = -(-room // 128) * 128
            model = LlamaModel(
                self.path, context=room, parallel=self.parallel, threads=torch.get_num_threads()
            )
            self._opened.append((room, model))
        return self._opened[0][1]


@dataclass
class Served:
    """A model behind a server that speaks OpenAI's chat completions; of it there are no logits.

    What a name stands for only its server knows: answers are kept by the address and the name.
    """

    name: str
    server: Server
    identity: object
    replies: Replies
    runtime: str = "server"

    @classmethod
    def at(cls, url: str, model: str, key: str | None, replies: Replies) -> "Served":
        """A server by its base URL; `key` names the environment variable with the API key."""
        server = Server(url, model, key, names=SERVER_NAMES)
        return cls(f"{model} at {url}", server, {"url": url, "model": model}, replies)

    def answers(self, prompts: Sequence[str], manner: Manner, update: Update) -> list[str]:
        """As in `Subject`; raises JudgeError as a judge's server does, and InputError for a prompt.

        That is one which the server does not take.
        """
        switch = thinking_switch(manner.thinking)
        # As vLLM, SGLang and llama-server take what a chat template reads beside the messages.
        extra = {"chat_template_kwargs": switch} if switch else {}
        server = replace(self.server, tokens=manner.tokens, extra=extra)
        asker = ChatJudge(server, self.replies, manner.marks)

        def question(one: Exchange) -> list[dict[str, str]]:
            return [{"role": role, "content": text} for role, text in manner.turns(one.prompt)]

        found = asker.said([Exchange(one, "") for one in prompts], question)
        for prompt, one in zip(prompts, found, strict=True):
            if one is None:
                raise InputError(
                    f"{SERVER_NAMES['url']}: {self.server.url}: does not take the prompt "
                    f"{prompt[:60]!r}; leave its set out with --sets"
                )
        update(len(prompts))
        return [one or "" for one in found]


def _no_switch(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: its chat template has no {SWITCH}, so it cannot be told to think or not; leave "
        "--thinking out"
    )
