"""A real fit of a tiny model on prompts that are told apart by their first word."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bake.archs import find_arch
from bake.checkpoint import Checkpoint
from bake.fit.run import Fitted, fit
from bake.judge import ANSWERED, REFUSED, Exchange, Verdict
from bake.model import LiveModel
from bake.plan import make_plan
from bake.prompts import Prompt, Splits
from bake.recipe import Recipe

WORDS = {"target": "w1", "protected": "w2", "general": "w3", "lookalike": "w4"}


@dataclass(frozen=True)
class ByWord:
    """A judge that goes by the prompt's first word."""

    refused: frozenset[str]
    name = "by word"

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        return [
            Verdict(REFUSED if one.prompt.split()[0] in self.refused else ANSWERED)
            for one in exchanges
        ]


def word_prompts(word: str) -> list[Prompt]:
    """Prompts that begin with a word."""
    return [Prompt(f"{word} w{n} w{n + 7}", str(n), "en") for n in range(20, 32)]


def word_fit(
    folder: Path, recipe: Recipe, words: Mapping[str, str] = WORDS
) -> tuple[LiveModel, Fitted]:
    """The model and the fit, where the words of target and protected are refused."""
    base = Checkpoint.open(folder)
    arch = find_arch(base.config, "config.json", base.tensors)
    model = LiveModel.load(folder, arch)
    prompts = {role: word_prompts(word) for role, word in words.items()}
    passages = (Prompt("w40 w41 w42", "text", "en"),)
    texts = Splits(passages, passages, passages)
    judge = ByWord(frozenset({words["target"], words["protected"]}))
    plan = make_plan(recipe, base, arch)
    return model, fit(model, base, plan, recipe, prompts, texts, judge)
