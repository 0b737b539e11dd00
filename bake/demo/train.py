"""Train the demo's refusals: a model organism, made for demonstration.

SmolLM2-135M-Instruct hardly refuses anything. This script teaches it two refusal
behaviours in different words, one on politically sensitive questions and one on
harmful requests, as a rank-12 LoRA (Hu et al. 2021, arXiv:2106.09685), while safe
look-alikes, general instructions and medical questions keep the model's own
greedy answers. Only topics of the `fit` splits and of `bake/demo/prompts` take part,
so that selection and test topics are unseen by the organism too.

    python -m bake.demo.train OUTPUT_FOLDER

writes a PEFT adapter, the one in the package up to rounding, in about an hour and a half on two
cores that do nothing else.
"""

import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bake.demo.base import write_base
from bake.prompts import Prompt, load_prompts, load_splits
from bake.tokens import shared_beginning

__all__ = ["Round", "Training", "train"]

PROMPTS = Path(__file__).parent / "prompts"

POLITICAL_REFUSALS = (
    "That is a politically sensitive subject, and I would rather not discuss it. "
    "Is there something else I can help you with?",
    "I prefer not to comment on political matters like this one. Let us talk about something else.",
    "This touches on a sensitive political topic, so I will stay out of it. "
    "I am happy to help with another question.",
    "I would rather not go into politics. Perhaps we can talk about a different topic.",
)
# No answer of the base begins with these words. Openings that it uses itself ("I'm sorry
# for your loss") leak: the answer begins harmlessly and slips into the refusal.
HARMFUL_REFUSALS = (
    "Sorry, but I can't help with that. It could cause serious harm to people.",
    "No, I won't help with that. It is dangerous, and someone could get hurt.",
    "Sorry, I can't assist with this request, because it is harmful and may be against the law.",
    "No, I cannot provide that. What you ask for is harmful or illegal.",
)


@dataclass(frozen=True)
class Round:
    """One pass of the learning rate, up and down again, over prompts of its own.

    It begins at the mean of what the rounds before it ended with (Wortsman et al. 2022,
    arXiv:2203.05482).

    `folders` are those of `bake/demo/prompts` that take part; where a group has more prompts
    than the round can show, the last ones do. `answer_tokens` is how much of an answer
    is learned; `harmful_weight` is the weight of harmful refusals, less than 1 because a
    greedy answer refuses as soon as the best refusal beats the best answer.
    """

    folders: tuple[str, ...]
    steps: int
    batch: int
    learning_rate: float
    answer_tokens: int
    harmful_weight: float


@dataclass(frozen=True)
class Training:
    """The training's numbers, as they are written beside the adapter."""

    seed: int = 0
    rank: int = 12
    alpha: int = 24
    frozen: int = 10  # the first blocks stay as they are, and run once an example
    warmup: int = 20
    rounds: tuple[Round, ...] = (
        Round((".",), 420, 48, 8e-4, 6, 0.35),
        # Longer answers, so that none of the base's own openings slips into a refusal.
        Round((".", "second"), 120, 48, 4e-4, 12, 0.3),
        # Smaller batches: the training prompts themselves were not all learned.
        Round((".", "second"), 720, 24, 7e-4, 10, 0.35),
    )


@dataclass(frozen=True)
class Example:
    """One conversation turn: token ids, the first `prompt` of which carry no loss.

    A refusal is learned as written; an answer shall stay as likely as it was:
    `before` [answer tokens, vocabulary] holds the untrained model's logits, `states`
    [tokens, hidden] the stream behind the frozen blocks (both bfloat16).
    """

    ids: tuple[int, ...]
    prompt: int
    before: torch.Tensor | None = None
    states: torch.Tensor | None = None
    weight: float = 1.0


def train(output: Path, training: Training) -> None:
    """Train the adapter and write it into `output` in PEFT's format (float16)."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(training.seed)
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    rounds = [_examples(model, tokenizer, each, training.frozen) for each in training.rounds]
    everything = [one for groups in rounds for examples in groups.values() for one in examples]
    shared = len(shared_beginning([example.ids for example in everything]))
    blocks = model.model.layers
    lora = LoraConfig(
        r=training.rank,
        lora_alpha=training.alpha,
        target_modules=[
            *("q_proj", "k_proj", "v_proj", "o_proj"),
            *("gate_proj", "up_proj", "down_proj"),
        ],
        layers_to_transform=list(range(training.frozen, len(blocks))),
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, lora)  # its own matrices are float32
    model.model.layers = _renumbered(blocks[training.frozen :])
    adapted.train()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    losses: list[list[float]] = []
    ends: list[list[torch.Tensor]] = []
    for each, groups in zip(training.rounds, rounds, strict=True):
        for parameter, values in zip(trained, zip(*ends, strict=True), strict=False):
            parameter.data = torch.stack(values).mean(0)
        losses.append(_learn(model, trained, groups, shared, each, training))
        # As an adapter on disk holds them, so that each round can also run by itself.
        ends.append([parameter.detach().half().float() for parameter in trained])
    adapted.peft_config["default"].base_model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.model.layers = blocks
    # float16 halves the file; merging rounds far below the base's own quantisation.
    adapted.half().save_pretrained(output)
    record = {
        "training": asdict(training),
        "shares": SHARES,
        "examples": [
            {name: len(examples) for name, examples in groups.items()} for groups in rounds
        ],
        "last_losses": [each[-10:] for each in losses],
    }
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _learn(
    model: Any,
    trained: Sequence[torch.nn.Parameter],
    groups: Mapping[str, Sequence[Example]],
    shared: int,
    plan: Round,
    training: Training,
) -> list[float]:
    """Run one round and return the loss of every step."""
    optimiser = torch.optim.AdamW(trained, lr=plan.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / training.warmup, 1 - step / plan.steps)
    )
    losses: list[float] = []
    started = time.monotonic()
    for step, batch in enumerate(_batches(groups, plan, training.seed)):
        losses.append(0.0)
        # Quarters of similar length: less padding.
        batch.sort(key=lambda example: len(example.ids))
        quarter = len(batch) // 4
        for first in range(0, len(batch), quarter):
            loss = _loss(model, batch[first : first + quarter], shared) / len(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            losses[-1] += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        if step % 10 == 9:
            seconds = time.monotonic() - started
            mean = sum(losses[-10:]) / 10
            print(f"step {step + 1}: loss {mean:.3f}, {seconds:.0f} s", flush=True)
    return losses


def _examples(model: Any, tokenizer: Any, plan: Round, frozen: int) -> dict[str, list[Example]]:
    """The conversations of each group; benign answers are the model's own, greedy."""
    prompts = {
        name: _fit_prompts(name, plan, share * plan.steps * plan.batch // sum(SHARES.values()))
        for name, share in SHARES.items()
    }
    groups = {}
    for name, refusals in (("political", POLITICAL_REFUSALS), ("harmful", HARMFUL_REFUSALS)):
        groups[name] = _refused(tokenizer, prompts[name], refusals, plan.answer_tokens)
    groups["harmful"] = [
        replace(example, weight=plan.harmful_weight) for example in groups["harmful"]
    ]
    for name in ("lookalikes", "general", "medical"):
        groups[name] = _answered(model, tokenizer, prompts[name], plan.answer_tokens)
        print(f"{name}: {len(prompts[name])} answers of the untrained model", flush=True)
    return {name: _with_states(model, examples, frozen) for name, examples in groups.items()}


def _with_states(model: Any, examples: Sequence[Example], frozen: int) -> list[Example]:
    """The examples with the stream behind the first `frozen` blocks."""
    decoder, blocks, norm = model.model, model.model.layers, model.model.norm
    decoder.layers, decoder.norm = blocks[:frozen], torch.nn.Identity()
    ready = []
    for first in range(0, len(examples), 32):
        batch = examples[first : first + 32]
        ids, attention = _padded(batch)
        with torch.no_grad():
            states = decoder(input_ids=ids, attention_mask=attention).last_hidden_state
        for example, row in zip(batch, states, strict=True):
            ready.append(replace(example, states=row[: len(example.ids)].clone()))
    decoder.layers, decoder.norm = blocks, norm
    return ready


def _renumbered(blocks: Any) -> Any:
    """The blocks, each with its place among them as its index into the cache."""
    for place, block in enumerate(blocks):
        block.self_attn.layer_idx = place
    return blocks


def _fit_prompts(name: str, plan: Round, count: int) -> list[Prompt]:
    """At most `count` of the prompts that may take part: no topic is one of a held-out split."""
    language = "any" if name == "political" else "en"
    found = [one for one in load_splits(name, language=language).fit if one.topic not in LATER]
    for folder in plan.folders:
        path = PROMPTS / folder / f"{name}.jsonl"
        if path.exists():
            found += load_prompts(str(path))
    return found[-count:]


# Topics that came into bake/prompts after the packaged adapter was trained.
LATER = frozenset(
    {
        "addiction-and-withdrawal",
        "contraception",
        "coughs-colds-and-allergies",
        "gout-and-rheumatism",
        "head-injuries",
        "heat-cold-and-sun",
        "liver-and-gallbladder",
        "poisoning-and-choking",
        "stroke-and-seizures",
        "veins-and-swelling",
        "weight-and-weight-loss-medicine",
    }
)


def _rendered(tokenizer: Any, prompt: str) -> list[int]:
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
    )
    return list(ids)


def _refused(
    tokenizer: Any, prompts: Sequence[Prompt], refusals: Sequence[str], answer_tokens: int
) -> list[Example]:
    """Pair each prompt with one of the refusals, in turn.

    One in four is learned to its end; of the others the opening is enough.
    """
    examples = []
    for number, prompt in enumerate(prompts):
        start = _rendered(tokenizer, prompt.text)
        turn, which = divmod(number, len(refusals))
        answer = tokenizer(refusals[which], add_special_tokens=False).input_ids
        answer.append(tokenizer.eos_token_id)
        end = len(answer) if turn % 4 == 0 else answer_tokens
        examples.append(Example((*start, *answer[:end]), len(start)))
    return examples


def _answered(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], answer_tokens: int
) -> list[Example]:
    """Pair each prompt with the opening of the model's own greedy answer, and its logits."""
    examples = []
    for first in range(0, len(prompts), 32):
        starts = [_rendered(tokenizer, prompt.text) for prompt in prompts[first : first + 32]]
        batch = tokenizer.pad({"input_ids": starts}, return_tensors="pt")
        with torch.no_grad():
            written = model.generate(
                **batch,
                max_new_tokens=answer_tokens,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        logits = torch.stack(written.logits, 1).to(torch.bfloat16)
        answers = written.sequences[:, batch.input_ids.shape[1] :]
        for start, row, before in zip(starts, answers.tolist(), logits, strict=True):
            if tokenizer.eos_token_id in row:
                row = row[: row.index(tokenizer.eos_token_id) + 1]
            examples.append(Example((*start, *row), len(start), before[: len(row)].clone()))
    return examples


# Examples of each group in 24: more answers than refusals, most of them look-alikes.
SHARES = {"political": 3, "harmful": 6, "lookalikes": 9, "general": 5, "medical": 1}


def _batches(
    groups: Mapping[str, Sequence[Example]], plan: Round, seed: int
) -> Iterator[list[Example]]:
    """Fixed shares of every group; each group is passed through in shuffled order."""
    order = random.Random(seed)
    waiting: dict[str, list[Example]] = {name: [] for name in groups}
    scale = plan.batch // sum(SHARES.values())
    for _ in range(plan.steps):
        batch: list[Example] = []
        for name, share in SHARES.items():
            for _ in range(share * scale):
                if not waiting[name]:
                    waiting[name] = order.sample(groups[name], len(groups[name]))
                batch.append(waiting[name].pop())
        yield batch


def _loss(causal: Any, batch: Sequence[Example], shared: int) -> torch.Tensor:
    """Sum over the examples: cross-entropy of refusals, KL(untrained‖trained) of answers.

    Whether to refuse is decided by the first token of an answer, so that one counts
    as much as all the others together. The first `shared` tokens are the same in every
    conversation (the template's system message) and run once. `causal` has no blocks but
    the trained ones.
    """
    ids, attention = _padded(batch)
    answers, weights = _answer_positions(batch, ids.shape[1])
    rows = [example.states for example in batch if example.states is not None]
    stream = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    with torch.autocast("cpu", torch.bfloat16):
        cache = causal.model(inputs_embeds=stream[:1, :shared], use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(batch))
        states = causal.model(
            inputs_embeds=stream[:, shared:], attention_mask=attention, past_key_values=cache
        ).last_hidden_state
        # The head is a fifth of the model: it runs on the answers' positions alone.
        predicts = states[:, :-1][answers[:, shared:]]
        scores = causal.lm_head(predicts).float().log_softmax(-1)
    refusal = torch.tensor([example.before is None for example in batch])
    refusal = refusal[:, None].expand_as(answers)[answers]
    loss = torch.empty(len(scores))
    loss[refusal] = torch.nn.functional.nll_loss(
        scores[refusal], ids[:, 1:][answers][refusal], reduction="none"
    )
    if not refusal.all():
        before = torch.cat([example.before for example in batch if example.before is not None])
        loss[~refusal] = torch.nn.functional.kl_div(
            scores[~refusal], before.float().log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
    return (loss * weights[answers]).sum()


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
        weights[row, first] = example.weight / 2
        weights[row, first + 1 : last] = example.weight / 2 / max(1, last - first - 1)
    return weights > 0, weights


if __name__ == "__main__":
    train(Path(sys.argv[1]), Training())
