"""What writing an edited checkpoint costs beside copying it: time, memory, bytes.

    python -m benchmarks.disk [--billions 1 3] [--layouts dense moe] [--rounds 3] [--ways WAY ..]
        [--folder DIR] [--output FILE]

Random bf16 layouts, a dense Llama and a Qwen3 of 64 experts, are made on the spot, in shards. Each
way to a second folder is a process of its own, and all take turns, so that whatever else the
machine does falls on all. Printed are medians: seconds of the whole process, those of its work
alone (without the start of Python and the imports), both over `cp -r` of the same round; the peak
of resident memory; and what was read and written, as the process asked for it and as the disk saw
it. bake's ways end in fsync, `cp` does not: `cp -r, sync` is the copy that does too. bake edits on
the device that BAKE_DEVICE names, if any.

The disk holds the base, an output and copies up to three quarters of the memory. With `--single`
each way is run once, one output is there at a time, and nothing is copied by `cp` unless asked:
so the memory and the bytes of the largest sizes are measured, and no ratio. On a file system
that shares blocks (XFS, Btrfs) the base takes 64 MiB whatever its size, and an output what is
edited.
"""

import argparse
import atexit
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
# Width, layers, width of the MLP or of an expert.
SIZES = {
    "dense": {
        1.0: (2048, 16, 8192),
        1.5: (2560, 18, 7680),
        3.0: (3072, 28, 8192),
        8.0: (4096, 36, 14336),
        14.0: (5120, 42, 17408),
    },
    "moe": {
        1.0: (1024, 8, 512),
        3.0: (2048, 10, 640),
        8.0: (2048, 24, 768),
        14.0: (2560, 30, 896),
    },
}
SHARD = 1 << 30
POOL = 1 << 25
ROUNDS = 3
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4


def main() -> None:
    """Measure and print, or be one of the ways."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--billions", type=float, nargs="+", default=[1.0, 3.0], choices=SIZES["dense"]
    )
    parser.add_argument("--layouts", nargs="+", default=["dense"], choices=SIZES)
    parser.add_argument("--single", action="store_true", help="each way once, and no copies")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--folder", type=Path, help="where to work, in place of the temporary one")
    parser.add_argument("--output", type=Path, help="a JSON file of all figures")
    parser.add_argument("--process", nargs=3, metavar=("WAY", "FROM", "TO"))
    parser.add_argument("--layout", nargs=3, metavar=("LAYOUT", "BILLIONS", "TO"))
    chosen = parser.parse_args()
    if chosen.layout:
        layout, billions, target = chosen.layout
        write_layout(Path(target), layout, *SIZES[layout][float(billions)])
        return
    if chosen.process:
        way, source, target = chosen.process
        started = time.perf_counter()
        seconds = PROCESSES[way](Path(source), Path(target))
        print(json.dumps(seconds if seconds is not None else time.perf_counter() - started))
        return
    rows = []
    print(HEAD)
    sizes = ((layout, one) for layout in chosen.layouts for one in chosen.billions)
    for layout, billions in sizes:
        if billions not in SIZES[layout]:
            parser.error(f"--billions: {layout} has {', '.join(map(str, SIZES[layout]))}")
        with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="bake-disk-") as place:
            base = Path(place, "base")
            # In a process of its own too: a child's peak is never below that of its parent.
            made = ("--layout", layout, str(billions), str(base))
            subprocess.run([sys.executable, "-m", "benchmarks.disk", *made], check=True)
            size = size_of(base)
            measure = singly if chosen.single else measured
            # The experts' class has no bias that a vector could be in.
            ways = [one for one in chosen.ways if layout == "dense" or one != "bake bias"]
            for row in measure(base, Path(place), ways, chosen.rounds):
                rows.append({"layout": layout, "billions": billions, "bytes": size} | row)
                print(line(rows[-1]), flush=True)
    if chosen.output:
        chosen.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


HEAD = f"{'size':>14}  {'way':24}  {'s':>6}  {'/cp':>5}  {'work s':>6}  {'/cp':>5}  " + "  ".join(
    f"{name:>9}" for name in ("cpu s", "peak MiB", "asked r", "asked w", "disk r", "disk w")
)


def line(row: dict[str, Any]) -> str:
    """A row of the table; bytes in GB."""
    gigabytes = "  ".join(
        f"{row[key] / 1e9:9.2f}" for key in ("rchar", "wchar", "read_bytes", "write_bytes")
    )
    return (
        f"{row['layout']:5} {row['bytes'] / 1e9:5.2f} GB  {row['way']:24}  {row['seconds']:6.2f}"
        f"  {row.get('ratio', 0):5.2f}  {row['work']:6.2f}  {row.get('work_ratio', 0):5.2f}"
        f"  {row['cpu']:9.2f}  {row['peak']:9.0f}"
        f"  {gigabytes}"
    )


def measured(base: Path, place: Path, ways: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Medians of every way, all in turn.

    A virtual machine gives its host the memory of deleted files, and to get it again costs more
    than the copy. So outputs stay until others have pushed them out of memory.
    """
    size = size_of(base)
    kept: deque[Path] = deque()

    def run(way: str) -> dict[str, float]:
        if len(kept) * size > MEMORY:
            shutil.rmtree(kept.popleft())
        kept.append(Path(tempfile.mkdtemp(dir=place)) / "out")
        return once(WAYS[way], base, kept[-1])

    for _ in range(MEMORY // size):
        run("cp -r")
    found: dict[str, list[dict[str, float]]] = {way: [] for way in dict.fromkeys(["cp -r", *ways])}
    for number in range(rounds):
        # Whoever comes behind a big write may pay for it.
        for way in list(found)[:: 1 if number % 2 else -1]:
            found[way].append(run(way))
    copies = [one["seconds"] for one in found["cp -r"]]
    rows = []
    for way, runs in found.items():
        row: dict[str, Any] = {"way": way, "rounds": rounds}
        row |= {key: median(run[key] for run in runs) for key in runs[0]}
        for name, key in (("ratio", "seconds"), ("work_ratio", "work")):
            row[name] = median(run[key] / copy for run, copy in zip(runs, copies, strict=True))
        rows.append(row)
    return rows


def singly(base: Path, place: Path, ways: Sequence[str], _: int) -> Iterator[dict[str, Any]]:
    """Every way once, and its output removed."""
    for way in ways:
        target = place / "out"
        yield {"way": way, "rounds": 1} | once(WAYS[way], base, target)
        shutil.rmtree(target)


def size_of(folder: Path) -> int:
    """The bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.iterdir())


def once(command: Sequence[str], base: Path, target: Path) -> dict[str, float]:
    """One process: its seconds, peak in MiB, and what /proc says that it read and wrote."""
    os.sync()
    filled = [str({"FROM": base, "TO": target}.get(word, word)) for word in command]
    started = time.perf_counter()
    child = subprocess.Popen(filled, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    # Not reaped yet, so that /proc still has it.
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    seconds = time.perf_counter() - started
    lines = Path(f"/proc/{child.pid}/io").read_text(encoding="ascii").splitlines()
    counters = dict(each.split(": ") for each in lines)
    said = child.stdout.read() if child.stdout else ""
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(filled)}: ended with status {status}")
    return {
        "seconds": seconds,
        "work": float(json.loads(said.splitlines()[-1])) if said.strip() else seconds,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak": usage.ru_maxrss / 1024,
        **{key: float(counters[key]) for key in ("rchar", "wchar", "read_bytes", "write_bytes")},
    }


def write_layout(folder: Path, layout: str, width: int, layers: int, inner: int) -> None:
    """A random bf16 checkpoint in shards, with its index; numbers repeat after some 33 million."""
    import torch

    folder.mkdir()
    of = {"hidden_size": width, "num_hidden_layers": layers}
    if layout == "dense":
        config, shapes = LLAMA | of | {"intermediate_size": inner}, _dense(width, layers, inner)
    else:
        config = MOE | of | {"moe_intermediate_size": inner, "intermediate_size": inner}
        shapes = _moe(width, layers, inner)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    drawn = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    pool = folder / "pool"
    pool.write_bytes(drawn.to(torch.bfloat16).view(torch.uint8).numpy().data)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        nbytes = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        if size and size + nbytes > SHARD:
            shards, size = [*shards, {}], 0
        shards[-1][name], size = shape, size + nbytes
    places: dict[str, str] = {}
    for number, found in enumerate(shards, 1):
        file = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        places |= dict.fromkeys(found, file.name)
        _write_shard(file, found, pool)
    pool.unlink()
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _write_shard(file: Path, shapes: dict[str, tuple[int, ...]], pool: Path) -> None:
    from bake.copying import Span, copy_span

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    # The numbers begin with a block of the disk, so that it may be shared.
    text += b" " * (-(8 + len(text)) % 4096)
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    whole = pool.stat().st_size
    for start in range(0, end, whole):
        copy_span(Span(pool, 0, file, 8 + len(text) + start, min(whole, end - start)))


def _dense(width: int, layers: int, inner: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama with tied embeddings, heads by the table above."""
    size = width // LLAMA["num_attention_heads"]
    found = _outside(LLAMA["vocab_size"], width)
    for layer in range(layers):
        block = f"model.layers.{layer}"
        found |= _attention(block, width, LLAMA, size) | _gated(f"{block}.mlp", width, inner)
    return found


def _moe(width: int, layers: int, inner: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a Qwen3 with experts in every block and tied embeddings."""
    size = MOE["head_dim"]
    found = _outside(MOE["vocab_size"], width)
    for layer in range(layers):
        block = f"model.layers.{layer}"
        found |= _attention(block, width, MOE, size)
        found |= dict.fromkeys(
            (f"{block}.self_attn.{name}.weight" for name in ("q_norm", "k_norm")), (size,)
        )
        found[f"{block}.mlp.gate.weight"] = (MOE["num_experts"], width)
        for number in range(MOE["num_experts"]):
            found |= _gated(f"{block}.mlp.experts.{number}", width, inner)
    return found


def _outside(vocabulary: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
    }


def _attention(
    block: str, width: int, config: dict[str, Any], size: int
) -> dict[str, tuple[int, ...]]:
    heads, kv = (config[f"num_{kind}_heads"] * size for kind in ("attention", "key_value"))
    return {
        f"{block}.self_attn.q_proj.weight": (heads, width),
        f"{block}.self_attn.k_proj.weight": (kv, width),
        f"{block}.self_attn.v_proj.weight": (kv, width),
        f"{block}.self_attn.o_proj.weight": (width, heads),
        f"{block}.input_layernorm.weight": (width,),
        f"{block}.post_attention_layernorm.weight": (width,),
    }


def _gated(module: str, width: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{module}.gate_proj.weight": (inner, width),
        f"{module}.up_proj.weight": (inner, width),
        f"{module}.down_proj.weight": (width, inner),
    }


def ablate(source: Path, target: Path) -> float:
    """A random direction out of every writer, by bake; returns the seconds without imports."""
    return _by_bake(source, target, _cut)


def bias(source: Path, target: Path) -> float:
    """A vector in one bias, with its siblings of zeros, by bake."""
    return _by_bake(source, target, _added)


def verified(source: Path, target: Path) -> float:
    """The ablation, read back: untouched tensors to the bit, edited ones by what they promise."""
    return _by_bake(source, target, _cut, check=True)


def _by_bake(
    source: Path,
    target: Path,
    made: Callable[[Any, Any], tuple[dict[str, Any], Any, Any]],
    check: bool = False,
) -> float:
    from bake.archs import find_arch
    from bake.checkpoint import Checkpoint
    from bake.device import edit_device
    from bake.staging import staged
    from bake.stream import write_checkpoint
    from bake.verify import check_files

    # As `bake.commands.main`.
    atexit.register(gc.freeze)
    started = time.perf_counter()
    base = Checkpoint.open(source)
    arch = find_arch(base.config, str(source), base.tensors)
    edits, created, config = made(base, arch)
    with staged(target, overwrite=False) as staging:
        write_checkpoint(base, edits, created, config, staging, device=edit_device())
        if check:
            check_files(base, Checkpoint.open(staging), edits, created)
    return time.perf_counter() - started


def _direction(width: int) -> Any:
    import torch

    drawn = torch.randn(width, generator=torch.Generator().manual_seed(1))
    return drawn / drawn.norm()


def _cut(base: Any, arch: Any) -> tuple[dict[str, Any], Any, Any]:
    from bake.edits import RemoveSubspace

    basis = _direction(arch.width(base.config))[:, None]
    written = [one for found in arch.written(base.tensors).values() for one in found]
    edits = [RemoveSubspace(one.weight, basis, axis=one.writer.axis) for one in written]
    return {edit.tensor: [edit] for edit in edits}, (), {}


def _added(base: Any, arch: Any) -> tuple[dict[str, Any], Any, Any]:
    from bake.carriers import carry
    from bake.edits import AddVector

    layer = arch.layer_count(base.config) // 2
    found, _ = carry(base, arch, layer, "out", "bias", ("transformers",))
    edit = AddVector(found.tensor, _direction(arch.width(base.config)))
    return {edit.tensor: [edit]}, found.created, found.config


def load_edit_save(source: Path, target: Path) -> float:
    """The same ablation with transformers: the model in memory, then `save_pretrained`."""
    import torch
    from transformers import AutoModelForCausalLM

    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    direction = _direction(model.config.hidden_size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                # The experts of a block are one tensor in memory.
                for matrix in parameter if parameter.ndim > 2 else [parameter]:
                    matrix.copy_(_without(direction, matrix))
    model.save_pretrained(target, max_shard_size=SHARD)
    return time.perf_counter() - started


def by_shard(source: Path, target: Path) -> float:
    """The same ablation, each shard loaded whole, edited and saved.

    So does llm-abliteration's sharded_ablate.py (github.com/jim-plus/llm-abliteration at 15a3599),
    which copies shards with nothing to edit; what it edits it also brings back to its norms, and
    that is left out here.
    """
    from safetensors.torch import load_file, save_file

    started = time.perf_counter()
    direction = _direction(json.loads((source / "config.json").read_text())["hidden_size"])
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.suffix != ".safetensors":
            shutil.copy(path, target)
            continue
        tensors = load_file(path)
        edited = [one for one in tensors if "o_proj" in one or "down_proj" in one]
        for name in edited:
            tensors[name] = _without(direction, tensors[name])
        if edited:
            save_file(tensors, target / path.name, {"format": "pt"})
        else:
            shutil.copy(path, target)
        del tensors
    return time.perf_counter() - started


def _without(direction: Any, matrix: Any) -> Any:
    import torch

    weight = matrix.float()
    return (weight - torch.outer(direction, direction @ weight)).to(matrix.dtype)


PROCESSES: dict[str, Callable[[Path, Path], float]] = {
    "bake ablate": ablate,
    "bake ablate, check": verified,
    "bake bias": bias,
    "load-edit-save": load_edit_save,
    "by shard": by_shard,
}
WAYS: dict[str, Sequence[str]] = {
    "cp -r": ("cp", "-r", "FROM", "TO"),
    "cp -r, sync": ("sh", "-c", 'cp -r "$1" "$2" && sync -f "$2"', "sh", "FROM", "TO"),
    **{
        way: (sys.executable, "-m", "benchmarks.disk", "--process", way, "FROM", "TO")
        for way in PROCESSES
    },
}


if __name__ == "__main__":
    main()
