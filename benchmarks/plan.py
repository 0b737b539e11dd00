"""What planning costs for the largest layouts, from headers alone.

    python -m benchmarks.plan [--folder DIR] [--output FILE] [--speed GB/s]

The checkpoints have real headers and index and no weights: their files are sparse. Each is opened
and an ablation of every writer that its row edits is planned, in a process of its own. Printed are
the parameters, tensors and files, the edits, CPU seconds and peak memory of opening and plan
(the imports, which come before, have their own column), and how long the write would take at a
speed that benchmarks/disk.py measured.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHARD = 5 << 30
Shapes = Iterator[tuple[str, tuple[int, ...]]]
COMMON = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu"}
CONFIGS: dict[str, dict[str, Any]] = {
    # meta-llama/Llama-3.1-70B
    "70B": {
        "model_type": "llama",
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    # Qwen/Qwen3-235B-A22B
    "235B": {
        "model_type": "qwen3_moe",
        "hidden_size": 4096,
        "num_hidden_layers": 94,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    # deepseek-ai/DeepSeek-V3
    "671B": {
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "vocab_size": 129280,
    },
}
FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
}
# As it is published. The experts of a layer in FP8 are not edited, so its dense layers are.
CONFIGS["671B FP8"] = CONFIGS["671B"] | {"quantization_config": FP8}


def main() -> None:
    """Measure and print, or be one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to work, in place of the temporary one")
    parser.add_argument("--output", type=Path, help="a JSON file of all figures")
    parser.add_argument("--speed", type=float, help="GB/s of a write, from benchmarks/disk.py")
    parser.add_argument("--process", type=Path, metavar="DIR")
    chosen = parser.parse_args()
    if chosen.process:
        print(json.dumps(planned(chosen.process)))
        return
    rows = []
    print(
        "    size  parameters  tensors  files   edits   open s  plan s  peak MiB  (imports)  write"
    )
    for name, config in CONFIGS.items():
        with tempfile.TemporaryDirectory(dir=chosen.folder) as place:
            row: dict[str, Any] = {"size": name} | write_headers(Path(place), config)
            command = [sys.executable, "-m", "benchmarks.plan", "--process", place]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            row |= json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        write = f"{row['bytes'] / chosen.speed / 6e10:.0f} min" if chosen.speed else "-"
        print(
            f"{name:>8}  {row['parameters'] / 1e9:8.1f} B  {row['tensors']:7}  {row['files']:5}"
            f"  {row['edits']:6}  {row['open']:7.2f}  {row['plan']:6.2f}  {row['peak']:8.0f}"
            f"  {row['imports']:9.0f}  {write}"
        )
    if chosen.output:
        chosen.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def planned(folder: Path) -> dict[str, float]:
    """Seconds and peaks in MiB of the opening and the plan."""
    from bake.archs import find_arch
    from bake.checkpoint import Checkpoint
    from bake.plan import make_plan
    from bake.recipe import Recipe

    config = json.loads((folder / "config.json").read_text())
    dense = config["first_k_dense_replace"] if "quantization_config" in config else None
    spec = {"op": "ablate", "layers": f"0-{(dense or config['num_hidden_layers']) - 1}"}
    evaluate = {"runtimes": ["transformers"]}
    recipe = Recipe.model_validate({"name": "plan", "edits": [spec], "evaluate": evaluate})
    imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    # Of the processor: whatever else the machine does, one thread plans.
    started = time.process_time()
    base = Checkpoint.open(folder)
    opened = time.process_time()
    plan = make_plan(recipe, base, find_arch(base.config, str(folder), base.tensors))
    return {
        "open": opened - started,
        "plan": time.process_time() - opened,
        "edits": len(plan.edits),
        "imports": imports,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def write_headers(folder: Path, config: dict[str, Any]) -> dict[str, int]:
    """A folder as the layout has it, in sparse files."""
    (folder / "config.json").write_text(json.dumps(COMMON | config))
    fp8 = "quantization_config" in config
    shards: list[dict[str, Any]] = [{}]
    places: dict[str, int] = {}
    end = total = parameters = 0

    def add(name: str, shape: tuple[int, ...], dtype: str, size: int) -> None:
        nonlocal end, total
        if end + size > SHARD:
            shards.append({})
            end = 0
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        shards[-1][name], places[name] = entry, len(shards)
        end, total = end + size, total + size

    for name, shape in shapes(config):
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        parameters += count
        if fp8 and len(shape) > 1 and "proj" in name:
            blocks = (-(-shape[0] // 128), -(-shape[1] // 128))
            add(name, shape, "F8_E4M3", count)
            add(f"{name}_scale_inv", blocks, "F32", 4 * blocks[0] * blocks[1])
        else:
            add(name, shape, "BF16", 2 * count)
    files = {}
    for number, header in enumerate(shards, 1):
        files[number] = f"model-{number:05}-of-{len(shards):05}.safetensors"
        text = json.dumps(header, separators=(",", ":")).encode()
        with (folder / files[number]).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + max(one["data_offsets"][1] for one in header.values()))
    index = {
        "metadata": {"total_size": total},
        "weight_map": {n: files[p] for n, p in places.items()},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return {
        "parameters": parameters,
        "tensors": len(places),
        "files": len(shards),
        "bytes": total,
    }


def shapes(config: dict[str, Any]) -> Shapes:
    """The tensors of a layout: the embeddings, every block, the last norm."""
    width = config["hidden_size"]
    yield "model.embed_tokens.weight", (config["vocab_size"], width)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in (*attention(config), *mlp(config, layer)):
            yield f"model.layers.{layer}.{name}.weight", shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{name}.weight", (width,)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (config["vocab_size"], width)


def attention(config: dict[str, Any]) -> Shapes:
    """The projections of an attention, and its norms."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if "kv_lora_rank" in config:
        rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
        plain, value = config["qk_nope_head_dim"], config["v_head_dim"]
        yield "self_attn.q_a_proj", (config["q_lora_rank"], width)
        yield "self_attn.q_a_layernorm", (config["q_lora_rank"],)
        yield "self_attn.q_b_proj", (heads * (plain + rope), config["q_lora_rank"])
        yield "self_attn.kv_a_proj_with_mqa", (rank + rope, width)
        yield "self_attn.kv_a_layernorm", (rank,)
        yield "self_attn.kv_b_proj", (heads * (plain + value), rank)
        yield "self_attn.o_proj", (width, heads * value)
        return
    size = config.get("head_dim", width // heads)
    yield "self_attn.q_proj", (heads * size, width)
    for name in ("k_proj", "v_proj"):
        yield f"self_attn.{name}", (config["num_key_value_heads"] * size, width)
    yield "self_attn.o_proj", (width, heads * size)
    if "head_dim" in config:
        yield "self_attn.q_norm", (size,)
        yield "self_attn.k_norm", (size,)


def mlp(config: dict[str, Any], layer: int) -> Shapes:
    """The projections of an MLP, or of all experts of a block."""
    experts = config.get("n_routed_experts", config.get("num_experts", 0))
    if not experts or layer < config.get("first_k_dense_replace", 0):
        yield from gated("mlp", config["hidden_size"], config["intermediate_size"])
        return
    yield "mlp.gate", (experts, config["hidden_size"])
    for number in range(experts):
        inner = config["moe_intermediate_size"]
        yield from gated(f"mlp.experts.{number}", config["hidden_size"], inner)
    if "n_shared_experts" in config:
        yield from gated("mlp.shared_experts", config["hidden_size"], inner)


def gated(module: str, width: int, inner: int) -> Shapes:
    """The three matrices of a gated MLP."""
    yield f"{module}.gate_proj", (inner, width)
    yield f"{module}.up_proj", (inner, width)
    yield f"{module}.down_proj", (width, inner)


if __name__ == "__main__":
    main()
