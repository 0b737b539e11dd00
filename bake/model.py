"""A live model: loaded through transformers, spoken to through its chat template."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from jinja2 import TemplateError
from torch import Tensor, nn

from bake.arch import Arch
from bake.device import AUTO, CPU, chosen_device
from bake.errors import CheckpointError
from bake.placement import check_shapes, placement, removed_with
from bake.tokens import shared_beginning
from bake.work import Work

__all__ = ["NO_PREFIX", "Batch", "LiveModel", "Prefix", "batches", "thinking_switch"]

# Nothing is fetched, and no code that comes with a checkpoint is run, nor anybody asked to let it:
# without the second, transformers asks on the terminal (dynamic_module_utils.py,
# `resolve_trust_remote_code`). A tokenizer's may be, where `LiveModel.load` is told so.
OWN: Final[Mapping[str, Any]] = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True, eq=False)
class Prefix:
    """The tokens that all sequences begin with, and the cache of having read them once.

    A chat template begins every prompt alike: half of a short one is its system message.
    """

    ids: tuple[int, ...] = ()
    cache: Any = None

    def repeated(self, rows: int) -> Any:
        """A cache of its own for a batch."""
        if self.cache is None:
            return None
        cache = deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        return cache


NO_PREFIX: Final = Prefix()


@dataclass(frozen=True, eq=False)
class Batch:
    """Left-padded token ids [batch, length], their attention mask, and their row numbers.

    The tokens behind `prefix`, if there is one, which every row begins with.
    """

    ids: Tensor
    mask: Tensor
    rows: tuple[int, ...]
    prefix: Prefix = NO_PREFIX

    @property
    def whole_mask(self) -> Tensor:
        """The attention mask with the prefix: padding lies between it and the rest."""
        return torch.cat([self.mask.new_ones(len(self.rows), len(self.prefix.ids)), self.mask], 1)

    @property
    def whole_ids(self) -> Tensor:
        """The token ids with the prefix."""
        begin = torch.tensor(self.prefix.ids, dtype=torch.long)
        return torch.cat([begin.expand(len(self.rows), -1), self.ids], 1)

    @property
    def content(self) -> list[list[list[int]]]:
        """The token ids with the prefix, and the mask, as plain values."""
        return [self.whole_ids.tolist(), self.mask.tolist()]


@dataclass(frozen=True, eq=False)
class LiveModel:
    """A language model with its tokenizer and its row of the architecture table.

    `work` says which of its batches this process runs, and where their results are kept; `trusted`
    whether its tokenizer may be code that comes with it; `thinking` sets the chat template's
    switch, where it has one (`thinking_switch`).
    """

    model: Any
    tokenizer: Any
    arch: Arch
    work: Work = field(default=Work())
    system: str | None = None
    trusted: bool = False
    thinking: bool | None = None

    @classmethod
    def load(
        cls,
        folder: Path,
        arch: Arch,
        dtype: torch.dtype | None = None,
        system: str | None = None,
        trusted: bool = False,
    ) -> "LiveModel":
        """Load a checkpoint folder with stock classes, refusing weights that they ignore.

        The tokenizer may be of another class, whose code comes with it, where it is `trusted`;
        the model never: bake's table is of the stock ones. `system` is the system's turn in
        front of every prompt, in place of the template's own. Without a dtype it is the
        checkpoint's own, or float32 where the processor has no fast arithmetic in that. What does
        not fit into memory is read from disk in every pass, and BAKE_DEVICE has the weights
        where it is set (`placement`). Raises CheckpointError
        when transformers cannot load it, when tensors of the file find no place in the class,
        when a wrapper's text model is not of the row's class, or when there is no chat template.
        """
        from transformers import (
            CONFIG_MAPPING,
            MODEL_FOR_CAUSAL_LM_MAPPING,
            MODEL_MAPPING,
            AutoConfig,
            AutoModelForCausalLM,
            AutoModelForMultimodalLM,
            GenerationConfig,
        )
        from transformers.utils import logging

        logging.disable_progress_bar()
        model, placed, device = None, {}, chosen_device()
        try:
            config = AutoConfig.from_pretrained(folder, **OWN)
            causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
            loader = AutoModelForCausalLM if causal else AutoModelForMultimodalLM
            stored = config.get_text_config().dtype or torch.float32
            # Devices beside the processor are fast in every type.
            fast = device != CPU or _fast(stored)
            wanted = dtype or (stored if fast else torch.float32)
            # What dequantises on loading takes its own way there.
            quantised = hasattr(config, "quantization_config")
            placed = {} if quantised else placement(folder, wanted)
            model, report = loader.from_pretrained(
                folder,
                dtype=wanted if placed else dtype or "auto",
                output_loading_info=True,
                **OWN,
                **placed,
            )
            tokenizer = _tokenizer(folder, trusted)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(f"{folder}: transformers cannot load it: {reason}") from error
        finally:
            removed_with(model, placed)
        if placed:
            check_shapes(model, folder)
        for kind in ("unexpected_keys", "missing_keys", "mismatched_keys"):
            names = sorted(map(str, report.get(kind, ())))
            if names:
                raise CheckpointError(
                    f"{folder}: transformers reports {kind.replace('_', ' ')}: {names[0]}"
                    + (f" and {len(names) - 1} more" if len(names) > 1 else "")
                )
        live = cls(model, tokenizer, arch, system=system, trusted=trusted)
        decoder = type(live.decoder)
        if decoder is not MODEL_MAPPING.get(CONFIG_MAPPING[arch.model_type], None):
            raise CheckpointError(
                f"{folder}: its text model is a {decoder.__name__}, which is not the class of "
                f"model_type '{arch.model_type}' in bake's table"
            )
        if live.tokenizer.chat_template is None:
            raise CheckpointError(
                f"{folder}: the tokenizer has no chat template; bake steers chat models"
            )
        # Of a checkpoint in FP8 transformers gives the dtype to some of the weights alone.
        slow = device == CPU and not _fast(model.dtype)
        if not placed and (dtype == torch.float32 or (dtype is None and slow)):
            nn.Module.float(model)
        if not placed and device not in (CPU, AUTO):
            nn.Module.to(model, device)
        # What else a checkpoint wants of its answers (a penalty of repetitions, a cut of the
        # vocabulary) no other runtime does by itself, and drawn text would be of another kind.
        ends = model.generation_config.eos_token_id
        model.generation_config = GenerationConfig(eos_token_id=ends)
        # Gradients, where a direction is learned, are of the direction alone.
        model.eval().requires_grad_(False)
        return live

    @property
    def decoder(self) -> Any:
        """The stack of blocks with its embedding, wherever a wrapper has it."""
        return self.model.get_decoder().base_model

    def module(self, name: str) -> nn.Module:
        """The module that has this name on disk: transformers moves text models on loading."""
        found: nn.Module = self.decoder.get_submodule(name.removeprefix(f"{self.arch.root}."))
        return found

    def render(self, prompt: str) -> list[int]:
        """The token ids of one user turn, up to where the assistant's answer begins.

        Raises CheckpointError when the chat template leaves the prompt out, or the system's.
        """
        return self.render_turns([("user", prompt)])

    def render_turns(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        """As `render`, of a conversation: pairs of a role, `user` or `assistant`, and its words."""
        return list(self._templated(turns, self._takes_parts, tokenize=True))

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the chat template wants a list of parts, as some of multimodal models do.

        Those leave a plain string out without a word.
        """
        for parts in (False, True):
            with suppress(TemplateError, TypeError):
                one, two = (
                    self._templated([("user", text)], parts, tokenize=False)
                    for text in ("one", "two")
                )
                if one != two and (self.system or "").strip() in one:
                    return parts
        raise CheckpointError(
            f"{self.tokenizer.name_or_path}: its chat template "
            + (
                "takes no system prompt; leave system_prompt out"
                if self.system
                else "drops the prompt"
            )
        )

    def _templated(self, turns: Sequence[tuple[str, str]], parts: bool, *, tokenize: bool) -> Any:
        system = [("system", self.system)] if self.system else []
        return self.tokenizer.apply_chat_template(
            [
                {"role": role, "content": [{"type": "text", "text": text}] if parts else text}
                for role, text in [*system, *turns]
            ],
            add_generation_prompt=True,
            tokenize=tokenize,
            return_dict=False,
            **thinking_switch(self.thinking),
        )

    def block(self, layer: int) -> nn.Module:
        """The decoder block of a layer."""
        return self.module(self.arch.layer.format(layer=layer))

    @property
    def device(self) -> torch.device:
        """Where the first weights lie, and token ids go; accelerate moves what lies elsewhere.

        What this class returns is always in the processor's memory.
        """
        first: torch.device = next(self.model.parameters()).device
        # Of weights on disk there is nothing here: what is read is computed by the processor.
        return torch.device("cpu") if first.type == "meta" else first

    def logits(self, batch: Batch) -> Tensor:
        """Logits [batch, length, vocabulary] in float32; rows of padding mean nothing."""
        with torch.inference_mode():
            output = self.model(**self._inputs(batch.ids, batch.mask))
        logits: Tensor = output.logits.float().cpu()
        return logits

    def _inputs(self, ids: Tensor, whole_mask: Tensor) -> dict[str, Tensor]:
        """What a pass over the last tokens under a mask takes."""
        positions = _positions(whole_mask)[:, -ids.shape[1] :]
        return {
            "input_ids": ids.to(self.device),
            "attention_mask": whole_mask.to(self.device),
            "position_ids": positions.to(self.device),
        }

    def last_logits(self, batch: Batch, count: int, cache: Any = None) -> Tensor:
        """Logits [batch, count, vocabulary] of the last positions in float32, with gradients.

        Of what hooks bring in: the model's own weights take none. A `cache` is of all tokens
        under the mask but those in `ids`, which come to it.
        """
        # A slice of states, as transformers gives it to the head, is multiplied row by row.
        whole = self.model.get_output_embeddings().register_forward_pre_hook(_contiguous)
        try:
            output = self.model(
                **self._inputs(batch.ids, batch.whole_mask),
                past_key_values=batch.prefix.repeated(len(batch.rows)) if cache is None else cache,
                use_cache=False,
                logits_to_keep=count,
            )
        finally:
            whole.remove()
        logits: Tensor = output.logits.float().cpu()
        return logits

    def prefix(self, sequences: Sequence[Sequence[int]], longest: int) -> Prefix:
        """Read what all sequences begin with, at most `longest` tokens of it, once.

        Empty where they begin differently, and where the cache is not of keys and values of
        every position alone (sliding windows, recurrent states): padding would come into it.
        """
        from transformers.cache_utils import DynamicCache, DynamicLayer

        shared = shared_beginning(sequences)[:longest]
        if not shared or len(sequences) < 2:
            return NO_PREFIX
        with torch.inference_mode():
            cache = self.model.base_model(
                input_ids=torch.tensor([shared], device=self.device), use_cache=True
            ).past_key_values
        if type(cache) is not DynamicCache:
            return NO_PREFIX
        plain = all(type(layer) is DynamicLayer for layer in cache.layers)
        return Prefix(shared, cache) if plain else NO_PREFIX

    def run(self, batch: Batch) -> None:
        """Run the decoder without the head, for what hooks see on the way."""
        with torch.inference_mode():
            self.model.base_model(
                **self._inputs(batch.ids, batch.whole_mask),
                past_key_values=batch.prefix.repeated(len(batch.rows)),
                use_cache=False,
            )

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: int,
        batch_size: int = 32,
        progress: Callable[[int], None] = lambda _: None,
        remember: bool = False,
    ) -> list[list[int]]:
        """Greedy answers of at most `tokens` tokens, without the end-of-turn token.

        `progress` receives the number of answers finished since the last call. Only answers
        of the bare model may be remembered: the journal knows nothing of hooks.
        """
        ends = self.end_tokens()
        # One token of each prompt stays, to be answered.
        prefix = self.prefix(prompts, min(map(len, prompts), default=1) - 1)

        def written(batch: Batch) -> dict[str, Tensor]:
            found = self.generate(
                batch.whole_ids,
                batch.whole_mask,
                past_key_values=prefix.repeated(len(batch.rows)),
                max_new_tokens=tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
            )
            return {"written": found[:, batch.whole_ids.shape[1] :].contiguous()}

        answers: dict[int, list[int]] = {}
        padded = batches(prompts, self.tokenizer.pad_token_id, batch_size, prefix)
        key = (lambda _: ["answers", tokens]) if remember else None
        for batch, found in self.work.results(padded, written, key, progress):
            for row, ids in zip(batch.rows, found["written"].tolist(), strict=True):
                stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
                answers[row] = ids[:stop]
        return [answers[row] for row in sorted(answers)]

    def generate(self, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
        """The ids [n, length] with what is written behind them, as transformers' `generate`."""
        with torch.inference_mode():
            found: Tensor = self.model.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                pad_token_id=self.tokenizer.pad_token_id,
                **options,
            )
        return found.cpu()

    def sample(self, starts: Tensor, tokens: int) -> list[list[int]]:
        """Texts of exactly `tokens` tokens behind `starts` [n, length], drawn at temperature 1.

        The same on every call, and torch's own generator stays as it was.
        """
        with torch.random.fork_rng():
            torch.manual_seed(0)
            written = self.generate(
                starts,
                torch.ones_like(starts),
                max_new_tokens=tokens,
                do_sample=True,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                eos_token_id=None,
            )
        found: list[list[int]] = written.tolist()
        return found

    def text(self, ids: Sequence[int]) -> str:
        """Token ids as text, special tokens left out."""
        decoded: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return decoded

    def tokens(self, text: str) -> list[int]:
        """The token ids of plain text, without a template."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def end_tokens(self) -> set[int]:
        """The tokens that end an answer."""
        ends = self.model.generation_config.eos_token_id
        found = set(ends) if isinstance(ends, list) else {ends}
        return {*found, self.tokenizer.eos_token_id} - {None}


def batches(
    sequences: Sequence[Sequence[int]], padding: int, batch_size: int, prefix: Prefix = NO_PREFIX
) -> Iterator[Batch]:
    """Group sequences by length and pad them on the left; `rows` leads back to the order given.

    Behind a `prefix`, which all of them begin with, only their rest is batched.
    """
    sequences = [each[len(prefix.ids) :] for each in sequences]
    order = sorted(range(len(sequences)), key=lambda row: (len(sequences[row]), row))
    for first in range(0, len(order), batch_size):
        rows = tuple(order[first : first + batch_size])
        length = max(len(sequences[row]) for row in rows)
        ids = torch.full((len(rows), length), padding, dtype=torch.long)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        for place, row in enumerate(rows):
            sequence = torch.tensor(sequences[row], dtype=torch.long)
            ids[place, length - len(sequence) :] = sequence
            mask[place, length - len(sequence) :] = 1
        yield Batch(ids, mask, rows, prefix)


def thinking_switch(thinking: bool | None) -> dict[str, bool]:
    """What tells a chat template whether to think; nothing leaves that to the template.

    `enable_thinking` is what templates of Qwen3, GLM-4.5, SmolLM3 and others read.
    """
    return {} if thinking is None else {"enable_thinking": thinking}


def _tokenizer(folder: Path, trusted: bool) -> Any:
    """The tokenizer, with the chat template of older processors where it has none itself."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, **{**OWN, "trust_remote_code": trusted})
    beside = folder / "chat_template.json"
    if tokenizer.chat_template is None and beside.exists():
        tokenizer.chat_template = json.loads(beside.read_text(encoding="utf-8"))["chat_template"]
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _contiguous(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].contiguous(), *inputs[1:])


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)


def _fast(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of the type at least as fast as float32."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return dtype == torch.float32
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True
