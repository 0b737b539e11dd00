"""Measure a bake in its runtimes: parity with the hooked model, and behaviour."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path

import torch
from torch import Tensor

from bake.errors import VerificationError
from bake.evaluate import Answer, judged, paired, rates
from bake.evaluation.drift import UNMEASURED, Drift, of_models
from bake.evidence import MOVED
from bake.hooks import Intervention, steered
from bake.judge import Exchange, Judge, Verdict
from bake.judge.thinking import Thinking
from bake.llama import LlamaModel
from bake.model import Batch, LiveModel, batches
from bake.ops.add import Add
from bake.progress import progress
from bake.prompts import Prompt
from bake.recipe import Recipe
from bake.verify import Divergence
from bake.work import Work

__all__ = [
    "Artefacts",
    "Measured",
    "compared_tokens",
    "in_turn",
    "measure",
    "share_allowed",
]

CONTROL_VECTOR = "llama.cpp, its own control vector"
LORA = "llama.cpp, the LoRA on the base GGUF"
# How much of each answer takes part in the comparison of logits.
ANSWER_TOKENS = 16
Answers = Mapping[str, tuple[Answer, ...]]


@dataclass(frozen=True)
class Artefacts:
    """What is compared: base and baked folder, base and baked GGUF; None where none is written.

    `lora` is a LoRA for the base GGUF, `edited` are the baked GGUF's edited tensors, `exact` is
    the base GGUF with the edits in float32.
    """

    base: Path
    baked: Path | None
    base_gguf: Path | None
    baked_gguf: Path | None
    lora: Path | None = None
    edited: tuple[str, ...] = ()
    exact: Path | None = None


@dataclass(frozen=True)
class Measured:
    """Answers before and after by runtime and role; parity by reference; what the guard limits.

    The references are the hooked model, for each runtime, and for a recipe that only
    adds at `out` also llama.cpp's own control vector on the base GGUF.
    """

    before: Mapping[str, Answers]
    after: Mapping[str, Answers]
    parity: Mapping[str, Divergence]
    drift: Drift = UNMEASURED

    def as_json(self) -> dict[str, object]:
        """Every figure as plain values."""

        def counted(answers: Mapping[str, Answers]) -> dict[str, object]:
            return {
                runtime: {
                    role: {**vars(rate), "interval": list(rate.interval)}
                    for role, rate in rates(found).items()
                }
                for runtime, found in answers.items()
            }

        return {
            "refusals": {"before": counted(self.before), "after": counted(self.after)},
            "paired": {
                runtime: {
                    role: {**vars(one), "p": one.p}
                    for role, one in paired(self.before[runtime], found).items()
                }
                for runtime, found in self.after.items()
            },
            "parity": {
                runtime: {"lost_share": one.lost_share, **vars(one)}
                for runtime, one in self.parity.items()
            },
            "drift": self.drift.as_json(),
        }


def measure(
    recipe: Recipe,
    model: LiveModel,
    interventions: Sequence[Intervention],
    artefacts: Artefacts,
    prompts: Mapping[str, Sequence[Prompt]],
    texts: Sequence[Prompt],
    judge: Judge,
) -> Measured:
    """Compare base, hooked and baked model on the test split's prompts by role, and its texts.

    The model's processes share the prompts, but llama.cpp's answers are of one.

    Logits are compared in float32, answers are given in the written type. Without a
    baked folder the hooked model answers for transformers. Raises VerificationError
    when a runtime's logits are further from the hooked model's than the recipe allows.
    """
    longest = max(len(model.render(one.text)) for one in chain.from_iterable(prompts.values()))
    room = longest + max(recipe.evaluate.answer_tokens, ANSWER_TOKENS) + 1
    with ExitStack() as stack:
        llamas: dict[str, LlamaModel] = {}
        if artefacts.base_gguf and artefacts.baked_gguf:
            files = {"base": artefacts.base_gguf, "baked": artefacts.baked_gguf}
            if artefacts.exact:
                files["exact"] = artefacts.exact
            for name, path in files.items():
                llama = LlamaModel(path, context=room, threads=torch.get_num_threads())
                llamas[name] = stack.enter_context(llama)
            if artefacts.lora:
                llama = LlamaModel(
                    artefacts.base_gguf, context=room, parallel=1, threads=torch.get_num_threads()
                )
                llamas["lora"] = stack.enter_context(llama)
                llama.set_lora(artefacts.lora)
            _check_read(llamas["baked"], artefacts)
        compared = compared_tokens(model, interventions, in_turn(prompts, recipe.verify.prompts))
        parity = _parity(model, interventions, artefacts, llamas, compared)
        _check(recipe, interventions, parity)
        before, after = _behaviour(recipe, model, interventions, artefacts, llamas, prompts, judge)
    drift = _drift(recipe, model, interventions, artefacts, prompts, texts)
    return Measured(before, after, parity, drift)


def compared_tokens(
    model: LiveModel, interventions: Sequence[Intervention], prompts: Sequence[Prompt]
) -> list[list[int]]:
    """Each prompt with the opening of the hooked model's answer, where steering shows most."""
    starts = [model.render(prompt.text) for prompt in prompts]
    with steered(model, interventions):
        answers = model.answer(starts, ANSWER_TOKENS)
    return [[*start, *answer] for start, answer in zip(starts, answers, strict=True)]


def _parity(
    model: LiveModel,
    interventions: Sequence[Intervention],
    artefacts: Artefacts,
    llamas: Mapping[str, LlamaModel],
    compared: Sequence[Sequence[int]],
) -> dict[str, Divergence]:
    """Logits of every baked form against its hooked base, all in float32.

    A GGUF's hooked base has the logits of the base GGUF with the edits in full, where there is
    such a file: what is lost is what the written types lose. Under MOVED, and where there is no
    such file, they are those of the base GGUF moved by what the hooks move in the checkpoint,
    exact to first order in the quantisation of the base: what the edits are worth there.
    """
    found: defaultdict[str, Divergence] = defaultdict(Divergence)
    load = partial(LiveModel.load, trusted=model.trusted)
    single = load(artefacts.base, model.arch, torch.float32)
    baked = None
    if artefacts.baked:
        baked = load(artefacts.baked, model.arch, torch.float32)

    def of(batch: Batch) -> dict[str, Tensor]:
        now: defaultdict[str, Divergence] = defaultdict(Divergence)
        real = batch.mask.bool()
        base = single.logits(batch)[real]
        with steered(single, interventions):
            hooked = single.logits(batch)[real]
        if baked:
            now["transformers"].add(base, hooked, baked.logits(batch)[real])
        if llamas:
            there = {name: _llama_logits(llama, batch) for name, llama in llamas.items()}
            plain = there["base"]
            # What the hooks change, laid on the base GGUF: its quantisation is not the bake's.
            moved = plain + hooked - base
            wanted = there.get("exact", moved)
            now["llama.cpp"].add(plain, wanted, there["baked"])
            if "exact" in there:
                now[MOVED].add(plain, moved, there["baked"])
            if "lora" in there:
                now[LORA].add(plain, wanted, there["lora"])
        return {runtime: one.as_tensor() for runtime, one in now.items()}

    padded = batches(compared, model.tokenizer.pad_token_id, 4)
    with progress("parity", len(compared), model.work.main) as update:
        for _, parts in model.work.results(padded, of, progress=update):
            for runtime, part in parts.items():
                found[runtime].join(part)
    if llamas and model.work.main:
        _control_vector(found, llamas, interventions, compared)
    return model.work.by_main(lambda: dict(found))


def _check_read(llama: LlamaModel, artefacts: Artefacts) -> None:
    """Refuse a GGUF with an edit that llama.cpp loads and never uses."""
    assert artefacts.baked_gguf is not None
    without = sorted(set(artefacts.edited) - llama.tensors_read())
    if without:
        raise VerificationError(
            f"{artefacts.baked_gguf.name}: llama.cpp loads {without[0]} and never uses it"
            + (f", nor {len(without) - 1} more" if len(without) > 1 else "")
            + "; use carrier: ridge or carrier: block"
        )


def _behaviour(
    recipe: Recipe,
    model: LiveModel,
    interventions: Sequence[Intervention],
    artefacts: Artefacts,
    llamas: Mapping[str, LlamaModel],
    prompts: Mapping[str, Sequence[Prompt]],
    judge: Judge,
) -> tuple[dict[str, Answers], dict[str, Answers]]:
    """The answers before and after, by runtime."""
    before: dict[str, Answers] = {}
    after: dict[str, Answers] = {}
    count = 2 * sum(map(len, prompts.values()))
    size, tokens = recipe.evaluate.batch, recipe.evaluate.answer_tokens

    def ask(
        answer: Callable[[list[list[int]]], Sequence[Sequence[int]]], by: Judge = judge
    ) -> Answers:
        marks = Thinking(recipe.judge.thinking.begin, recipe.judge.thinking.end)
        return judged(prompts, model.render, answer, model.text, by, marks)

    if "transformers" in recipe.evaluate.runtimes:
        one = _AskedByMain(judge, model.work)
        with progress("answers, transformers", count, model.work.main) as update:
            before["transformers"] = ask(
                partial(model.answer, tokens=tokens, batch_size=size, progress=update), one
            )
            baked = model
            if artefacts.baked:
                baked = LiveModel.load(artefacts.baked, model.arch, trusted=model.trusted)
                baked = replace(baked, work=model.work)
            with steered(baked, () if artefacts.baked else interventions):
                after["transformers"] = ask(
                    partial(baked.answer, tokens=tokens, batch_size=size, progress=update), one
                )
    if llamas and "llama.cpp" in recipe.evaluate.runtimes:
        with progress("answers, llama.cpp", count, model.work.main) as update:
            for name, into in (("base", before), ("baked", after)):
                said = partial(llamas[name].generate, max_tokens=tokens, progress=update)
                into["llama.cpp"] = model.work.by_main(partial(ask, said))
    return before, after


@dataclass(frozen=True)
class _AskedByMain:
    """A judge that one process asks for all."""

    asked: Judge
    work: Work

    @property
    def name(self) -> str:
        """See `Judge`."""
        return self.asked.name

    def judge(self, exchanges: Sequence[Exchange]) -> Sequence[Verdict]:
        """See `Judge`."""
        return self.work.by_main(lambda: self.asked.judge(exchanges))


def _drift(
    recipe: Recipe,
    model: LiveModel,
    interventions: Sequence[Intervention],
    artefacts: Artefacts,
    prompts: Mapping[str, Sequence[Prompt]],
    texts: Sequence[Prompt],
) -> Drift:
    """What the guard limits of it, in transformers and the written type, and nothing else.

    One process measures it for all.
    """
    guard = recipe.guard
    general = [model.render(one.text) for one in prompts["general"]]
    passages = [model.tokens(one.text) for one in texts]
    if guard.divergence_at_most is None:
        general = []
    if guard.perplexity_rise_at_most is None:
        passages = []
    if not general and not passages:
        return UNMEASURED

    def measured() -> Drift:
        baked = model
        if artefacts.baked:
            baked = LiveModel.load(artefacts.baked, model.arch, trusted=model.trusted)
        hooks = () if artefacts.baked else interventions
        with progress("drift", len(general) + len(passages)) as update:
            return of_models(model, baked, hooks, general, passages, update)

    return model.work.by_main(measured)


def in_turn(prompts: Mapping[str, Sequence[Prompt]], count: int) -> list[Prompt]:
    """`count` prompts, one of each role in turn."""
    turns = chain.from_iterable(zip_longest(*prompts.values()))
    return [prompt for prompt in turns if prompt is not None][:count]


def _llama_logits(llama: LlamaModel, batch: Batch) -> Tensor:
    """llama.cpp's logits at the real positions of a padded batch, row after row."""
    rows = [
        llama.logits(ids[mask.bool()].tolist())
        for ids, mask in zip(batch.ids, batch.mask, strict=True)
    ]
    return torch.cat([torch.from_numpy(row) for row in rows])


def _control_vector(
    found: dict[str, Divergence],
    llamas: Mapping[str, LlamaModel],
    interventions: Sequence[Intervention],
    compared: Sequence[Sequence[int]],
) -> None:
    """Compare the patched GGUF with the base GGUF under llama.cpp's own control vector.

    It adds behind the block what the bias adds inside it, so the logits are mostly
    equal to the last bit; where a rounding of an 8-bit activation flips they are not.
    """
    adds = [
        one
        for one in interventions
        if isinstance(one, Add)
        and one.carried.carrier in ("bias", "block")
        and one.site == "out"
        and one.layer
    ]
    if len(adds) != len(interventions):
        return
    base, baked = llamas["base"], llamas["baked"]
    vectors = torch.zeros(base.layers, base.hidden_size)
    for one in adds:
        vectors[one.layer] += one.vector
    total = found.setdefault(CONTROL_VECTOR, Divergence())
    for ids in compared:
        plain = torch.from_numpy(base.logits(ids))
        base.set_control_vector(vectors)
        steered_logits = torch.from_numpy(base.logits(ids))
        base.set_control_vector(None)
        total.add(plain, steered_logits, torch.from_numpy(baked.logits(ids)))


def share_allowed(
    recipe: Recipe, interventions: Sequence[Intervention], of_gguf: bool, moved: bool = False
) -> tuple[str, float]:
    """The key of `verify` that limits the lost share, and its value; `moved` as MOVED has it."""
    ridge = any(isinstance(one, Add) and one.carried.carrier == "ridge" for one in interventions)
    exact = "ridge_lost_share" if ridge else "lost_share"
    key = exact
    if of_gguf:
        key = "gguf_moved_share" if moved else "gguf_lost_share"
    return key, getattr(recipe.verify, key)


def _check(
    recipe: Recipe, interventions: Sequence[Intervention], found: Mapping[str, Divergence]
) -> None:
    for runtime, parity in found.items():
        of_gguf = runtime != "transformers"
        key, limit = share_allowed(recipe, interventions, of_gguf, runtime == MOVED)
        if not parity.lost_share <= limit:
            raise VerificationError(
                f"parity, {runtime}: the baked model lost {parity.lost_share:.1e} of the steering, "
                f"verify.{key} allows {limit:g}"
            )
