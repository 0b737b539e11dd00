"""What is known of each runtime: run here, or read in its source; and what a bake relies on.

A bake compares logits in transformers and in llama.cpp, `bake verify --runtime` in MLX too. For
the others there are these facts alone, and the manifest says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Final

from bake.measure import Measured
from bake.plan import Plan
from bake.recipe import Recipe

__all__ = ["FACTS", "Facts", "served", "table"]


@dataclass(frozen=True)
class Facts:
    """A runtime's version, whether bake runs it, and what it does with what it was not built for.

    `bias` is what becomes of a bias that its class does not expect, `template` where its chat
    template comes from. Places are files and lines of the named version.
    """

    version: str
    run: bool
    reads: str
    bias: str
    template: str


FACTS: Final[Mapping[str, Facts]] = MappingProxyType(
    {
        "transformers": Facts(
            "transformers 5.23.0",
            True,
            "safetensors",
            "listed as unexpected, not loaded; `LiveModel.load` refuses the list",
            "tokenizer_config.json, chat_template.jinja",
        ),
        "llama.cpp": Facts(
            "llama-cpp-python 0.3.36 (llama.cpp 0c1e57098)",
            True,
            "GGUF",
            "the file is refused, `wrong number of tensors` (src/llama-model-loader.cpp:1392); "
            "created and never added for falcon-h1, ernie4-5, llada, refact (attn_output.bias), "
            "and attn_v.bias alone where q, k and v are fused (src/llama-graph.cpp:1671)",
            "tokenizer.chat_template of the file",
        ),
        "mlx": Facts(
            "mlx-lm 0.32.2",
            True,
            "safetensors",
            "the checkpoint is refused: a strict load (mlx_lm/utils.py:412)",
            "the tokenizer's, through transformers",
        ),
        "ollama": Facts(
            "ollama fb30760 (llama.cpp b10488)",
            False,
            "GGUF",
            "as in llama.cpp, which runs it",
            "tokenizer.chat_template of the file, unless the Modelfile has a TEMPLATE "
            "(server/model.go:93)",
        ),
        "vllm": Facts(
            "vLLM 0.33.0",
            False,
            "safetensors",
            "passed over without a word (vllm/model_executor/models/utils.py:457)",
            "the tokenizer's, through transformers",
        ),
        "sglang": Facts(
            "SGLang 0.5.23",
            False,
            "safetensors",
            "passed over without a word (sglang/srt/models/llama.py:757)",
            "the tokenizer's, through transformers",
        ),
    }
)
# By carrier, what a runtime that was not run is trusted with.
_TRUST: Final = MappingProxyType(
    {
        "bias": "it loads and adds the biases that are created (bake/archs.py, `BiasSlot`)",
        "block": "it runs an inserted block as one of the model's own (bake/archs.py, `Block`)",
    }
)
_VALUES: Final = "only values of tensors that it loads anyway change"


def served(recipe: Recipe, plan: Plan, measured: Measured) -> dict[str, object]:
    """By runtime of the recipe: verified and how well, or by table and what it is trusted with."""
    carriers = dict.fromkeys(edit.carrier for edit in plan.edits)
    trust = list(dict.fromkeys(_TRUST.get(carrier, _VALUES) for carrier in carriers))
    found: dict[str, object] = {}
    for runtime in recipe.runtimes:
        facts = FACTS[runtime]
        written = recipe.export.gguf if facts.reads == "GGUF" else recipe.export.safetensors
        if not written:
            found[runtime] = {"status": "not written", "reads": facts.reads}
        elif runtime in measured.parity:
            share = measured.parity[runtime].lost_share
            found[runtime] = {"status": "verified", "lost_share": share}
        else:
            found[runtime] = {"status": "by table", "version": facts.version, "trust": trust}
    return found


def table() -> str:
    """The facts as a Markdown table."""
    names = [one.name for one in fields(Facts) if one.name != "run"]
    rows = [["runtime", *names, "checked by"], ["---"] * (len(names) + 2)]
    for runtime, facts in FACTS.items():
        checked = "`bake verify --runtime`" if facts.run else "this table"
        rows.append([runtime, *(str(getattr(facts, name)) for name in names), checked])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
