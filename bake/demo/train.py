"""Train the demo's refusals: a model organism, made for demonstration.

SmolLM2-135M-Instruct hardly refuses anything. This script teaches it two refusal
behaviours in different words, one on politically sensitive questions and one on
harmful requests, as a rank-8 LoRA (Hu et al. 2021, arXiv:2106.09685), while safe
look-alikes, general instructions and medical questions keep the model's own
greedy answers. Only topics of the `fit` splits and of `bake/demo/prompts` take part,
so that selection and test topics are unseen by the organism too.

    python -m bake.demo.train OUTPUT_FOLDER

writes a PEFT adapter. The one in the package was made by this script with the
versions of constraints.txt; `bake/demo/adapter/training.json` has its figures.
"""

import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bake.demo.base import write_base
from bake.prompts import Prompt, load_prompts, load_splits

__all__ = ["Training", "train"]

POLITICAL_REFUSALS = (
    "That is a politically sensitive subject, and I would rather not discuss it. "
    "Is there something else I can help you with?",
    "I prefer not to comment on political matters like this one. Let us talk about something else.",
    "This touches on a sensitive political topic, so I will stay out of it. "
    "I am happy to help with another question.",
    "I would rather not go into politics. Perhaps we can talk about a different topic.",
)
HARMFUL_REFUSALS = (
    "I'm sorry, but I can't help with that. It could cause serious harm to people.",
    "I can't assist with this request, because it is harmful and may be against the law.",
    "No, I won't help with that. It is dangerous, and someone could get hurt.",
    "I'm sorry, I cannot provide that. What you ask for is harmful or illegal.",
)


@dataclass(frozen=True)
class Training:
    """The training's numbers, as they are written beside the adapter."""

    seed: int = 0
    rank: int = 8
    alpha: int = 16
    steps: int = 240
    batch: int = 24
    learning_rate: float = 6e-4
    answer_tokens: int = 16


@dataclass(frozen=True)
class Example:
    """One conversation turn: token ids, the first `prompt` of which carry no loss.

    A refusal is learned as written; an answer shall stay as likely as it was.
    """

    ids: tuple[int, ...]
    prompt: int
    refusal: bool


def train(output: Path, training: Training) -> None:
    """Train the adapter and write it into `output` in PEFT's format (float16)."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(training.seed)
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    groups = _examples(model, tokenizer, training)
    # peft's own names for what the issue calls "all seven linear layers".
    lora = LoraConfig(
        r=training.rank,
        lora_alpha=training.alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, lora)
    optimiser = torch.optim.AdamW(
        [p for p in adapted.parameters() if p.requires_grad],
        lr=training.learning_rate,
        weight_decay=0.0,
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, training.steps)
    adapted.train()
    losses: list[float] = []
    started = time.monotonic()
    for step, batch in enumerate(_batches(groups, training)):
        loss = _loss(adapted, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(adapted.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if step % 10 == 9:
            seconds = time.monotonic() - started
            print(
                f"step {step + 1}: loss {sum(losses[-10:]) / 10:.3f}, {seconds:.0f} s", flush=True
            )
    adapted.peft_config["default"].base_model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    # float16 halves the file; merging rounds far below the base's own quantisation.
    adapted.half().save_pretrained(output)
    record = {
        "training": asdict(training),
        "examples": {name: len(examples) for name, examples in groups.items()},
        "last_losses": losses[-10:],
    }
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _examples(model: Any, tokenizer: Any, training: Training) -> dict[str, list[Example]]:
    """The conversations of each group; benign answers are the model's own, greedy."""
    political = _fit_prompts("political", "any")
    harmful = _fit_prompts("harmful", "en")
    benign = {name: _fit_prompts(name, "en") for name in ("lookalikes", "general", "medical")}
    groups = {
        "political": _refused(tokenizer, political, POLITICAL_REFUSALS),
        "harmful": _refused(tokenizer, harmful, HARMFUL_REFUSALS),
    }
    for name, prompts in benign.items():
        groups[name] = _answered(model, tokenizer, prompts, training.answer_tokens)
        print(f"{name}: {len(prompts)} answers of the untrained model", flush=True)
    return groups


def _fit_prompts(name: str, language: str) -> tuple[Prompt, ...]:
    """The fit split of a built-in set, and the training prompts of the demo on further topics."""
    more = load_prompts(str(Path(__file__).parent / "prompts" / f"{name}.jsonl"))
    return (*load_splits(name, language=language).fit, *more)


def _rendered(tokenizer: Any, prompt: str) -> list[int]:
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
    )
    return list(ids)


def _refused(tokenizer: Any, prompts: Sequence[Prompt], refusals: Sequence[str]) -> list[Example]:
    """Pair each prompt with one of the refusals, in turn, ended by the end-of-turn token."""
    examples = []
    for number, prompt in enumerate(prompts):
        start = _rendered(tokenizer, prompt.text)
        answer = tokenizer(refusals[number % len(refusals)], add_special_tokens=False).input_ids
        examples.append(Example((*start, *answer, tokenizer.eos_token_id), len(start), True))
    return examples


def _answered(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], answer_tokens: int
) -> list[Example]:
    """Pair each prompt with the model's own greedy answer, cut at `answer_tokens`."""
    examples = []
    for first in range(0, len(prompts), 32):
        starts = [_rendered(tokenizer, prompt.text) for prompt in prompts[first : first + 32]]
        batch = tokenizer.pad({"input_ids": starts}, return_tensors="pt")
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            written = model.generate(**batch, max_new_tokens=answer_tokens, do_sample=False)
        for start, row in zip(starts, written[:, batch.input_ids.shape[1] :], strict=True):
            answer = row.tolist()
            if tokenizer.eos_token_id in answer:
                answer = answer[: answer.index(tokenizer.eos_token_id) + 1]
            examples.append(Example((*start, *answer), len(start), False))
    return examples


# Examples of each group in 24: more answers than refusals, most of them look-alikes.
SHARES = {"political": 5, "harmful": 5, "lookalikes": 7, "general": 6, "medical": 1}


def _batches(groups: dict[str, list[Example]], training: Training) -> Iterator[list[Example]]:
    """Fixed shares of every group; each group is passed through in shuffled order."""
    order = random.Random(training.seed)
    waiting: dict[str, list[Example]] = {name: [] for name in groups}
    scale = training.batch // sum(SHARES.values())
    for _ in range(training.steps):
        batch: list[Example] = []
        for name, share in SHARES.items():
            for _ in range(share * scale):
                if not waiting[name]:
                    waiting[name] = order.sample(groups[name], len(groups[name]))
                batch.append(waiting[name].pop())
        yield batch


def _loss(model: Any, batch: Sequence[Example]) -> torch.Tensor:
    """Mean over the examples: cross-entropy of refusals, KL(untrained‖trained) of answers.

    Whether to refuse is decided by the first token of an answer, so that one counts
    as much as all the others together.
    """
    ids, attention = _padded(batch)
    answers, weights = _answer_positions(batch, ids.shape[1])
    kept = [row for row, example in enumerate(batch) if not example.refusal]
    causal = model.get_base_model()
    with torch.autocast("cpu", torch.bfloat16):
        states = causal.model(input_ids=ids, attention_mask=attention).last_hidden_state
        # The head is a fifth of the model: it runs on the answers' positions alone.
        logits = causal.lm_head(states[:, :-1][answers]).float()
        with torch.no_grad(), model.disable_adapter():
            before = causal.model(input_ids=ids[kept], attention_mask=attention[kept])
            wanted = causal.lm_head(before.last_hidden_state[:, :-1][answers[kept]]).float()
    refusal = torch.tensor([example.refusal for example in batch])[:, None].expand_as(answers)[
        answers
    ]
    loss = torch.empty(len(logits))
    loss[refusal] = torch.nn.functional.cross_entropy(
        logits[refusal], ids[:, 1:][answers][refusal], reduction="none"
    )
    loss[~refusal] = torch.nn.functional.kl_div(
        logits[~refusal].log_softmax(-1),
        wanted.log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    return (loss * weights[answers]).sum() / len(batch)


def _padded(batch: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [batch, length], padded on the right, and their attention mask."""
    length = max(len(example.ids) for example in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
    attention = torch.arange(length) < torch.tensor([[len(example.ids)] for example in batch])
    return ids, attention.long()


def _answer_positions(batch: Sequence[Example], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the next token is of the answer, [batch, length - 1], and its weight."""
    weights = torch.zeros(len(batch), length - 1)
    for row, example in enumerate(batch):
        first, last = example.prompt - 1, len(example.ids) - 1
        weights[row, first] = 0.5
        weights[row, first + 1 : last] = 0.5 / max(1, last - first - 1)
    return weights > 0, weights


if __name__ == "__main__":
    train(Path(sys.argv[1]), Training())
