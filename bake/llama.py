"""A live GGUF: tokens, logits and greedy text through llama.cpp itself.

This is the low-level API of llama-cpp-python (`llama_cpp.llama_*`, llama.cpp's
`include/llama.h`), because its high-level class has neither several sequences nor a
control vector. Numbers are made to be reproduced: the CPU, a fixed number of threads,
a key/value cache in float32, and no flash attention.
"""

import ctypes
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from os import PathLike, fspath
from types import MappingProxyType, TracebackType
from typing import Any, Self

import llama_cpp
import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from torch import Tensor

from bake.errors import ArchitectureError, GGUFError, InputError, PromptError
from bake.ggml_graph import TensorsRead
from bake.tokens import shared_beginning

__all__ = ["LlamaModel"]

_BATCH = 512
"""Most tokens of one `llama_decode`."""
NOTHING: Mapping[str, bool] = MappingProxyType({})
_ERROR, _CONTINUED = 4, 5
"""Levels of `enum ggml_log_level` (ggml's include/ggml.h)."""


@dataclass
class _Slot:
    """One sequence of the context and the prompt that it is working on."""

    prompt: int
    pending: Sequence[int]
    position: int = 0
    generated: list[int] = field(default_factory=list)


class LlamaModel:
    """A GGUF loaded by llama.cpp; close it, or use it as a context manager.

    `context` is in tokens for each of the `parallel` sequences; the cache takes
    context x parallel x layers x 2 x key/value width x 4 bytes. `vocabulary_size`,
    `hidden_size` and `layers` are the model's, `beginning` the token that its texts begin with.
    `watch` is a `ggml_backend_sched_eval_callback` (ggml's include/ggml-backend.h), called around
    every operation. Raises `GGUFError` with llama.cpp's own last words when the file or the
    context cannot be loaded.

        with LlamaModel("model.gguf", context=512, threads=2) as model:
            tokens = model.tokenize("The capital of France is")
            print(model.detokenize(model.generate([tokens], 8)[0]))
    """

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        context: int,
        parallel: int = 16,
        threads: int,
        watch: Any = None,
    ) -> None:
        if min(context, parallel, threads) < 1:
            raise InputError(
                f"context {context}, parallel {parallel}, threads {threads}: give 1 or more of each"
            )
        self._path = fspath(path)
        self._context_size = context
        self._model: Any = None
        self._context: Any = None
        self._log = _backend_log()
        self._log.lines.clear()
        self._model = llama_cpp.llama_model_load_from_file(
            self._path.encode(), self._model_parameters()
        )
        if not self._model:
            raise GGUFError(
                f"{self._path}: llama.cpp cannot load it: {self._log.last_words()}; "
                "the file is damaged, or holds what its architecture does not know"
            )
        parameters = self._context_parameters(context, parallel, threads)
        if watch is not None:
            # The context does not keep the callback alive.
            self._watch = parameters.cb_eval = watch
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._context:
            self.close()
            raise GGUFError(
                f"{self._path}: llama.cpp cannot make a context of {parallel} x {context} "
                f"tokens: {self._log.last_words()}; lower one of them"
            )
        self._parallel = parallel
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self.vocabulary_size = int(llama_cpp.llama_vocab_n_tokens(self._vocabulary))
        self.hidden_size = int(llama_cpp.llama_model_n_embd(self._model))
        self.layers = int(llama_cpp.llama_model_n_layer(self._model))
        begins = llama_cpp.llama_vocab_get_add_bos(self._vocabulary)
        self.beginning = llama_cpp.llama_vocab_bos(self._vocabulary) if begins else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model and its context; a second call does nothing."""
        if self._context:
            llama_cpp.llama_free(self._context)
        if self._model:
            llama_cpp.llama_model_free(self._model)
        self._context = self._model = None

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of `text`: special tokens are parsed, none is added in front."""
        encoded = text.encode("utf-8")
        room = len(encoded) + 16
        while True:
            tokens = (llama_cpp.llama_token * room)()
            count = llama_cpp.llama_tokenize(
                self._vocabulary, encoded, len(encoded), tokens, room, False, True
            )
            if count >= 0:
                return list(tokens[:count])
            # A negative count is the room that was needed (llama.h, llama_tokenize).
            room = -count

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens spelled out; broken UTF-8 becomes U+FFFD."""
        self._check_ids(ids)
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        room = 16 * len(ids) + 16
        while True:
            text = ctypes.create_string_buffer(room)
            count = llama_cpp.llama_detokenize(
                self._vocabulary, tokens, len(ids), text, room, False, True
            )
            if count >= 0:
                return text.raw[:count].decode("utf-8", "replace")
            room = -count

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the logits after every token: float32 [tokens, vocabulary].

        Raises `PromptError` when there are more tokens than the context holds.
        """
        self._check_prompt(tokens, 0, "these tokens")
        llama_cpp.llama_memory_clear(self._memory, True)
        result = np.empty((len(tokens), self.vocabulary_size), dtype=np.float32)
        for start in range(0, len(tokens), _BATCH):
            chunk = tokens[start : start + _BATCH]
            self._decode([(token, start + i, 0, True) for i, token in enumerate(chunk)])
            rows = llama_cpp.llama_get_logits(self._context)
            shape = (len(chunk), self.vocabulary_size)
            result[start : start + len(chunk)] = np.ctypeslib.as_array(rows, shape)
        return result

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        """Continue every prompt greedily by up to `max_tokens` tokens.

        A sequence ends before the first end-of-generation token of the vocabulary;
        among equal logits the lowest id wins. All sequences share each step, and one
        that ends makes room for the next prompt; what all prompts begin with is read once.
        So the numbers differ from those of one prompt at a time only by the rounding of
        larger matrix products.
        `progress` receives the number of prompts finished since its last call. Raises
        `PromptError` when a prompt is empty or leaves no room for `max_tokens`.
        """
        for index, prompt in enumerate(prompts):
            self._check_prompt(prompt, max_tokens, f"prompt {index}")
        results: list[list[int]] = [[] for _ in prompts]
        if max_tokens < 1:
            return results
        waiting = deque(enumerate(prompts))
        slots: dict[int, _Slot] = {}
        shared = self._read_shared(prompts)
        while waiting or slots:
            for sequence in range(self._parallel):
                if sequence not in slots and waiting:
                    index, prompt = waiting.popleft()
                    llama_cpp.llama_memory_seq_cp(self._memory, self._parallel, sequence, -1, -1)
                    slots[sequence] = _Slot(index, prompt[shared:], shared)
            for sequence, token in self._step(slots):
                slot = slots[sequence]
                ended = llama_cpp.llama_vocab_is_eog(self._vocabulary, token)
                if not ended:
                    slot.generated.append(token)
                    slot.pending = [token]
                if ended or len(slot.generated) == max_tokens:
                    results[slot.prompt] = slot.generated
                    llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)
                    del slots[sequence]
                    if progress is not None:
                        progress(1)
        return results

    def stream(self, prompt: Sequence[int], max_tokens: int) -> Iterator[int]:
        """Continue one prompt greedily, token by token, as `generate` does.

        Raises `PromptError` as `generate`. Nothing else may be asked of the model meanwhile.
        """
        self._check_prompt(prompt, max_tokens, "the conversation")
        llama_cpp.llama_memory_clear(self._memory, True)
        slot = _Slot(0, prompt)
        for _ in range(max_tokens):
            ready: list[tuple[int, int]] = []
            while not ready:
                ready = self._step({0: slot})
            token = ready[0][1]
            if llama_cpp.llama_vocab_is_eog(self._vocabulary, token):
                return
            yield token
            slot.pending = [token]

    def render(
        self, turns: Sequence[tuple[str, str]], switches: Mapping[str, bool] = NOTHING
    ) -> list[int]:
        """The tokens of a conversation by the file's own chat template, up to the next answer.

        `turns` are pairs of a role and its words, `switches` what the template reads beside them.
        Raises `GGUFError` where the file has no template or no vocabulary, or where the template
        refuses the turns.
        """
        if llama_cpp.llama_vocab_type(self._vocabulary) == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
            raise GGUFError(f"{self._path}: has no vocabulary; give a GGUF of a chat model")
        try:
            messages = [{"role": role, "content": words} for role, words in turns]
            text = self.templated(messages, (), switches)
        except (TemplateError, ValueError, TypeError) as error:
            raise GGUFError(f"{self._path}: its chat template refuses this: {error}") from error
        return self.tokenize(text)

    def templated(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        switches: Mapping[str, bool] = NOTHING,
    ) -> str:
        """A conversation as text, by llama-cpp-python's own formatter, as its server does.

        Messages and tools as in OpenAI's API. Raises `GGUFError` where the file has no template,
        and whatever the template does where it refuses the messages.
        """
        template = self.template
        if not template:
            raise GGUFError(
                f"{self._path}: has no tokenizer.chat_template; give a GGUF of a chat model"
            )
        ends = (
            llama_cpp.llama_vocab_eos(self._vocabulary),
            llama_cpp.llama_vocab_bos(self._vocabulary),
        )
        # A token that the vocabulary has not is -1.
        end, begin = (self.detokenize([token]) if token >= 0 else "" for token in map(int, ends))
        formatter: Any = Jinja2ChatFormatter(template, end, begin)
        turns, given = list(map(dict, messages)), list(tools) or None
        return str(formatter(messages=turns, tools=given, **switches).prompt)

    @property
    def template(self) -> str:
        """The file's own chat template; empty where it has none."""
        found = llama_cpp.llama_model_chat_template(self._model, None)
        return found.decode("utf-8", "replace") if found else ""

    def set_control_vector(self, vectors: Tensor | None) -> None:
        """Add row L of `vectors`, [layers, hidden], to the output of block L; None ends it.

        llama.cpp has no slot for block 0 (llama-adapter.cpp, `llama_adapter_cvec::init`)
        and its buffer starts at block 1 (include/llama.h, `llama_set_adapter_cvec`), so
        row 0 must be zero, else `ArchitectureError`. A few architectures' graphs never
        read a control vector: a test of the logits tells.
        """
        data = None
        length = 0
        if vectors is not None:
            if tuple(vectors.shape) != (self.layers, self.hidden_size):
                raise GGUFError(
                    f"{self._path}: has {self.layers} layers of width {self.hidden_size}; "
                    f"a control vector of shape {list(vectors.shape)} does not fit"
                )
            if vectors[0].any():
                raise ArchitectureError(
                    "llama.cpp cannot steer the output of block 0; choose a layer from 1 on"
                )
            rows = np.ascontiguousarray(vectors[1:].detach().cpu().float().numpy())
            data = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            length = rows.size
        failed = llama_cpp.llama_set_adapter_cvec(
            self._context, data, length, self.hidden_size, 1, self.layers - 1
        )
        if failed:
            raise GGUFError(
                f"{self._path}: llama.cpp refused the control vector: {self._log.last_words()}"
            )

    def tensors_read(self) -> frozenset[str]:
        """The tensors of the file that the graph of its architecture reads, by name.

        Others, which the loader made and nothing adds, are served without an effect. Raises
        GGUFError where this build of llama.cpp cannot tell.
        """
        try:
            read = TensorsRead()
        except NotImplementedError as error:
            raise GGUFError(
                f"{self._path}: which tensors llama.cpp reads cannot be told ({error}); install "
                "the llama-cpp-python of constraints.txt"
            ) from error
        parameters = self._context_parameters(1, 1, 1)
        parameters.cb_eval = read.callback
        context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not context:
            raise GGUFError(
                f"{self._path}: llama.cpp cannot make a context: {self._log.last_words()}"
            )
        try:
            tokens = (llama_cpp.llama_token * 1)(0)
            if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, 1)):
                raise GGUFError(f"{self._path}: llama.cpp cannot decode: {self._log.last_words()}")
        finally:
            llama_cpp.llama_free(context)
        return frozenset(read.names)

    def set_lora(self, path: str | PathLike[str]) -> None:
        """Lay a LoRA's GGUF on the model, with a scale of 1, until the model is closed.

        Raises `GGUFError` with llama.cpp's own last words when it does not fit.
        """
        adapter = llama_cpp.llama_adapter_lora_init(self._model, fspath(path).encode())
        if not adapter:
            raise GGUFError(
                f"{fspath(path)}: llama.cpp cannot lay it on {self._path}: "
                f"{self._log.last_words()}; give a LoRA that was made for it"
            )
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        if llama_cpp.llama_set_adapters_lora(self._context, adapters, 1, (ctypes.c_float * 1)(1.0)):
            raise GGUFError(f"{fspath(path)}: llama.cpp refused it: {self._log.last_words()}")

    def _read_shared(self, prompts: Sequence[Sequence[int]]) -> int:
        """Read what all prompts begin with into the sequence behind the parallel ones.

        Returns how many tokens that is. The last token of a prompt is not among them.
        """
        llama_cpp.llama_memory_clear(self._memory, True)
        shared = shared_beginning([prompt[:-1] for prompt in prompts])
        for start in range(0, len(shared), _BATCH):
            chunk = shared[start : start + _BATCH]
            self._decode(
                [(token, start + i, self._parallel, False) for i, token in enumerate(chunk)]
            )
        return len(shared)

    def _step(self, slots: dict[int, _Slot]) -> list[tuple[int, int]]:
        """Decode what the slots have pending; return (sequence, next token) where all is read."""
        batch: list[tuple[int, int, int, bool]] = []
        ready: list[tuple[int, int]] = []
        for sequence, slot in sorted(slots.items()):
            chunk = slot.pending[: _BATCH - len(batch)]
            slot.pending = slot.pending[len(chunk) :]
            for token in chunk:
                batch.append((token, slot.position, sequence, False))
                slot.position += 1
            if chunk and not slot.pending:
                batch[-1] = (*batch[-1][:3], True)
                ready.append((sequence, len(batch) - 1))
        self._decode(batch)
        return [(sequence, self._best(row)) for sequence, row in ready]

    def _best(self, row: int) -> int:
        """Return the token of the highest logit after row `row` of the last batch."""
        values = llama_cpp.llama_get_logits_ith(self._context, row)
        # argmax returns the first of equal values, which is the lowest id.
        return int(np.ctypeslib.as_array(values, (self.vocabulary_size,)).argmax())

    def _decode(self, entries: Sequence[tuple[int, int, int, bool]]) -> None:
        """Run one batch of (token, position, sequence, whether its logits are wanted)."""
        batch = llama_cpp.llama_batch_init(len(entries), 0, 1)
        try:
            batch.n_tokens = len(entries)
            for i, (token, position, sequence, wanted) in enumerate(entries):
                batch.token[i] = token
                batch.pos[i] = position
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = sequence
                batch.logits[i] = wanted
            code = llama_cpp.llama_decode(self._context, batch)
        finally:
            llama_cpp.llama_batch_free(batch)
        if code:
            raise GGUFError(
                f"{self._path}: llama.cpp cannot decode {len(entries)} tokens "
                f"(code {code}): {self._log.last_words()}"
            )

    def _check_prompt(self, tokens: Sequence[int], more: int, what: str) -> None:
        if not tokens:
            raise PromptError(f"{what}: has no token; give at least one")
        if len(tokens) + more > self._context_size:
            raise PromptError(
                f"{what}: {len(tokens)} tokens and {more} to come exceed the context of "
                f"{self._context_size}; raise the context or shorten it"
            )
        self._check_ids(tokens)

    def _check_ids(self, ids: Sequence[int]) -> None:
        for token in ids:
            if not 0 <= token < self.vocabulary_size:
                raise PromptError(
                    f"{self._path}: has no token {token}; its ids go to {self.vocabulary_size - 1}"
                )

    @staticmethod
    def _model_parameters() -> Any:
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        # Repacked weights (and AMX tiles) round otherwise, and only for some types and
        # sizes, so an edited matrix would differ from its base by its kernel as well.
        # AMX also dies of a signal in virtual machines that advertise it and forbid it.
        parameters.use_extra_bufts = False
        return parameters

    @staticmethod
    def _context_parameters(context: int, parallel: int, threads: int) -> Any:
        parameters = llama_cpp.llama_context_default_params()
        # One sequence more holds what all prompts begin with.
        parameters.n_ctx = context * (parallel + 1)
        parameters.n_seq_max = parallel + 1
        parameters.n_batch = parameters.n_ubatch = _BATCH
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.type_k = parameters.type_v = llama_cpp.GGML_TYPE_F32
        parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        # Each sequence has its own cache, so attention never scans the others' cells.
        parameters.kv_unified = False
        parameters.offload_kqv = parameters.op_offload = False
        parameters.no_perf = True
        return parameters


class _Log:
    """The latest errors of llama.cpp, which has one log for the whole process."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=64)
        self._kept = False
        self.callback = llama_cpp.llama_log_callback(self._receive)

    def _receive(self, level: int, text: bytes, _: object) -> None:
        line = text.decode("utf-8", "replace")
        if level == _CONTINUED:
            if self._kept and self.lines:
                self.lines[-1] += line
            return
        self._kept = level == _ERROR
        if self._kept:
            self.lines.append(line)

    def last_words(self) -> str:
        """Return its last lines, in one line."""
        lines = [line.strip() for line in self.lines if line.strip()]
        return "; ".join(lines[-3:]) or "it gave no reason"


@cache
def _backend_log() -> _Log:
    """Start llama.cpp once, silenced: its lines go to the log that is returned."""
    log = _Log()
    llama_cpp.llama_log_set(log.callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return log
