"""Greedy text of a live model token by token: transformers calls back, so it has its own thread."""

from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from bake.model import LiveModel

__all__ = ["THREAD", "streamed"]

THREAD = "bake answers"


def streamed(model: LiveModel, prompt: Sequence[int], tokens: int) -> Iterator[int]:
    """Greedy tokens behind a prompt, at most `tokens`, as `LiveModel.answer` gives them.

    The model stops soon after the iterator is closed; what it raises is raised here.
    """
    found: SimpleQueue[int | BaseException | None] = SimpleQueue()
    closed = Event()
    ends = model.end_tokens()

    def run() -> None:
        ids = torch.tensor([list(prompt)])
        try:
            model.generate(
                ids,
                torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                streamer=_Put(found),
                stopping_criteria=StoppingCriteriaList([_Closed(closed)]),
            )
            found.put(None)
        except BaseException as error:
            found.put(error)

    thread = Thread(target=run, name=THREAD, daemon=True)
    thread.start()
    try:
        while (token := found.get()) is not None:
            if isinstance(token, BaseException):
                raise token
            if token in ends:
                return
            yield token
    finally:
        closed.set()
        thread.join()


class _Put(BaseStreamer):  # type: ignore[misc]
    """Passes the tokens on; the first ones are the prompt's."""

    def __init__(self, found: SimpleQueue[int | BaseException | None]) -> None:
        self._found, self._begun = found, False

    def put(self, value: Tensor) -> None:
        if self._begun:
            for token in value.flatten().tolist():
                self._found.put(token)
        self._begun = True

    def end(self) -> None:
        pass


class _Closed(StoppingCriteria):  # type: ignore[misc]
    """Ends the text when nobody listens any more."""

    def __init__(self, closed: Event) -> None:
        self._closed = closed

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full_like(input_ids[:, 0], self._closed.is_set(), dtype=torch.bool)
