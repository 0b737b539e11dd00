"""The checks of a baked model in a runtime, each against the hooked model in transformers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from bake.errors import VerificationError
from bake.hooks import Intervention, steered
from bake.measure import compared_tokens, in_turn, share_allowed
from bake.model import LiveModel, batches
from bake.progress import progress
from bake.prompts import Prompt
from bake.runtimes import Runtime
from bake.runtimes.baked import Baked
from bake.runtimes.facts import FACTS
from bake.runtimes.llama_cpp import LlamaCpp
from bake.runtimes.server import chat, served_at
from bake.runtimes.template import CONVERSATIONS, rendered
from bake.runtimes.torch_model import apply_template
from bake.verify import Divergence

__all__ = ["Finding", "check_runtime", "check_server", "first_difference"]

# Prompts whose answers stand side by side, and their tokens.
ANSWERS, ANSWER_TOKENS = 4, 24


@dataclass(frozen=True)
class Finding:
    """What one check of a runtime found, and whether that is what was promised.

    `shown` are lines for a person: the answers side by side.
    """

    runtime: str
    check: str
    passed: bool
    text: str
    shown: tuple[str, ...] = ()

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "FAILED"
        first = f"{self.runtime:12}  {self.check:9}  {verdict:6}  {self.text}"
        return "\n".join([first, *(f"{'':14}{line}" for line in self.shown)])


@dataclass(frozen=True)
class _Logits:
    """How far logits are from the hooked model's, as `measure` has it of a bake.

    `moved` is None where there is no other reference than that of `parity`; `apart` is
    max |Δ logit| of baked and hooked with nothing laid on.
    """

    parity: Divergence
    moved: Divergence | None
    apart: float


def check_runtime(
    baked: Baked,
    runtime: Runtime,
    live: LiveModel,
    base: Runtime | None = None,
    exact: Runtime | None = None,
) -> list[Finding]:
    """Every check of a runtime. `live` is the base checkpoint in float32.

    `base` is the same runtime with the base file, where that is quantised otherwise than the
    checkpoint: logits are then those of the base, moved by what the hooks move. `exact` is it
    with the base file and the edits in full: what the types have lost is then measured too.
    """
    prompts = in_turn(baked.prompts, baked.recipe.verify.prompts)
    sequences = compared_tokens(live, baked.interventions, prompts)
    found = _logits(runtime, live, baked.interventions, (base, exact), sequences)
    return [
        Finding(runtime.name, "logits", *_parity(baked, runtime, found)),
        Finding(runtime.name, "tensors", *_tensors(baked, runtime, sequences)),
        Finding(runtime.name, "template", *_checked(lambda: _template(runtime, live))),
        _answers(baked, runtime, live, found.apart),
    ]


def check_server(baked: Baked, runtime: LlamaCpp, live: LiveModel) -> Finding:
    """An OpenAI client's answer from `python -m llama_cpp.server`, beside the library's own.

    The server renders and tokenises by itself and keeps its cache in float16, so after the first
    token a near tie may turn.
    """
    (prompt,) = in_turn(_shown(baked), 1)
    turns = [("system", live.system)] if live.system else []
    messages = [{"role": role, "content": text} for role, text in [*turns, ("user", prompt.text)]]
    start = live.render(prompt.text)
    own = runtime.generate(start, ANSWER_TOKENS)
    with served_at(baked.gguf, len(start) + 4 * ANSWER_TOKENS) as url:
        said = chat(url, messages, ANSWER_TOKENS)
    wanted = live.text(own)
    shared = first_difference(wanted.strip(), said.strip())
    passed = shared is None or shared >= len(live.text(own[:1]).strip()) > 0
    equal = "equal to" if shared is None else f"{shared} characters like"
    return Finding(
        *(runtime.name, "server", passed),
        f"an OpenAI client's answer is {equal} the library's: {said.strip()[:40]!r}",
    )


def first_difference(one: Sequence[object], other: Sequence[object]) -> int | None:
    """The first place where two answers differ, the end of one counting; None where nowhere."""
    pairs = zip_longest(one, other)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), None)


def _parity(baked: Baked, runtime: Runtime, found: _Logits) -> tuple[bool, str]:
    of_gguf, parity = FACTS[runtime.name].reads == "GGUF", found.parity
    key, limit = share_allowed(baked.recipe, baked.interventions, of_gguf)
    passed = parity.lost_share <= limit
    text = (
        f"lost share {parity.lost_share:.1e} of the steering (verify.{key} allows {limit:g}), "
        f"max |Δ logit| {parity.largest:.1e} where the steering moves up to "
        f"{parity.largest_effect:.1f} ({parity.positions} positions)"
    )
    if found.moved:
        key, limit = share_allowed(baked.recipe, baked.interventions, of_gguf, moved=True)
        share = found.moved.lost_share
        text += f"; as the checkpoint is moved {share:.1e} (verify.{key} allows {limit:g})"
        passed &= share <= limit
    return passed, text


def _logits(
    runtime: Runtime,
    live: LiveModel,
    interventions: Sequence[Intervention],
    references: tuple[Runtime | None, Runtime | None],
    sequences: Sequence[Sequence[int]],
) -> _Logits:
    base, exact = references
    parity, apart = Divergence(), 0.0
    moved = Divergence() if exact else None
    with progress(f"logits, {runtime.name}", len(sequences)) as update:
        for ids in sequences:
            (batch,) = batches([ids], 0, 1)
            plain = live.logits(batch)[0]
            with steered(live, interventions):
                hooked = live.logits(batch)[0]
            now = runtime.logits(ids)
            # Some runtimes pad the vocabulary.
            words = min(now.shape[-1], plain.shape[-1])
            plain, hooked, now = (each[:, :words] for each in (plain, hooked, now))
            apart = max(apart, float((now - hooked).abs().max()))
            if base:
                there = base.logits(ids)[:, :words]
                plain, hooked = there, there + hooked - plain
            if exact and moved is not None:
                moved.add(plain, hooked, now)
                hooked = exact.logits(ids)[:, :words]
            parity.add(plain, hooked, now)
            update(1)
    return _Logits(parity, moved, apart)


def _tensors(
    baked: Baked, runtime: Runtime, sequences: Sequence[Sequence[int]]
) -> tuple[bool, str]:
    lost = runtime.without_effect(baked.edited, sequences)
    said = f"{runtime.tensors()} loaded, {len(baked.edited)} edited; "
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        return False, f"{said}{lost[0]}{more} loaded and never used"
    return True, f"{said}the logits depend on every edited one"


def _checked(check: Callable[[], tuple[bool, str]]) -> tuple[bool, str]:
    """What a check says, or what it could not do: the others go on."""
    try:
        return check()
    except VerificationError as error:
        return False, str(error)


def _template(runtime: Runtime, live: LiveModel) -> tuple[bool, str]:
    """Texts and tokens of every conversation; one that both refuse is equal."""
    refused = 0
    for conversation in CONVERSATIONS:
        wanted = rendered(lambda one: apply_template(live.tokenizer, one), conversation)
        found = rendered(runtime.render, conversation)
        if wanted is None or found is None:
            if wanted is not found:
                who = "transformers" if wanted is None else runtime.name
                return False, f"{conversation.name}: {who} alone refuses it"
            refused += 1
        elif wanted != found:
            place = first_difference(wanted, found) or 0
            shown = (text[max(0, place - 10) : place + 20] for text in (wanted, found))
            return False, f"{conversation.name}: {' is not '.join(map(repr, shown))}"
        else:
            tokens = live.tokenizer(wanted, add_special_tokens=False).input_ids
            if list(tokens) != runtime.tokenize(found):
                return False, f"{conversation.name}: the same text becomes other tokens"
    both = f", {refused} refused by both" if refused else ""
    return True, f"{len(CONVERSATIONS) - refused} conversations, texts and tokens equal{both}"


def _answers(baked: Baked, runtime: Runtime, live: LiveModel, apart: float) -> Finding:
    """Greedy answers beside the hooked model's.

    Logits that are up to `apart` from the hooked model's turn a greedy choice only between two
    tokens less than twice as far from each other: any other difference is the runtime's own.
    """
    equal, turned, gaps = 0, 0, [0.0]
    shown: list[str] = []
    prompts = in_turn(_shown(baked), ANSWERS)
    for prompt in prompts:
        start = live.render(prompt.text)
        with steered(live, baked.interventions):
            (wanted,) = live.answer([start], ANSWER_TOKENS)
        found = runtime.generate(start, ANSWER_TOKENS)
        shown += [f"asked   {prompt.text!r}", f"hooked  {live.text(wanted)!r}"]
        shown.append(f"{runtime.name}  {live.text(found)!r}")
        place = first_difference(wanted, found)
        if place is None:
            equal += 1
            continue
        with steered(live, baked.interventions):
            (batch,) = batches([[*start, *wanted[:place]]], 0, 1)
            row = live.logits(batch)[0, -1]
        gaps.append(float(row.max()) - _logit(row, found, place, live))
        turned += gaps[-1] <= 2 * apart
    text = f"{equal} of {len(prompts)} equal, {turned} turn at near ties"
    if equal + turned < len(prompts):
        text += (
            f", the others where the hooked model's two tokens are up to {max(gaps):.1f} apart and "
            f"logits at most {apart:.1e}"
        )
    return Finding(runtime.name, "answers", equal + turned == len(prompts), text, tuple(shown))


def _shown(baked: Baked) -> Mapping[str, Sequence[Prompt]]:
    """The prompts whose answers may be shown: of protected ones a bake keeps the verdicts alone."""
    return {role: found for role, found in baked.prompts.items() if role != "protected"}


def _logit(row: Tensor, answer: Sequence[int], place: int, live: LiveModel) -> float:
    """The hooked model's logit of what an answer has at a place, its end included."""
    chosen = [answer[place]] if place < len(answer) else sorted(live.end_tokens())
    return float(row[torch.tensor(chosen)].max())
