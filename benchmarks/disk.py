"""What writing an edited checkpoint costs beside copying it: time, memory, bytes.

    python -m benchmarks.disk [--billions 1.5 3] [--rounds 3] [--folder DIR] [--output FILE]

Random bf16 Llama layouts are made on the spot, in shards. Each way to a second folder is a process
of its own, and all take turns, so that whatever else the machine does falls on all. Printed are
medians: seconds of the whole process, those of its work alone (without the start of Python and the
imports), both over `cp -r` of the same round; the peak of resident memory; and what was read and
written, as the process asked for it and as the disk saw it. bake's ways end in fsync, `cp` does
not: `cp -r, sync` is the copy that does too.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
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
# Width, layers, width of the MLP.
SIZES = {
    1.0: (2048, 16, 8192),
    1.5: (2560, 18, 7680),
    3.0: (3072, 28, 8192),
    8.0: (4096, 36, 14336),
    14.0: (5120, 42, 17408),
}
SHARD = 1 << 30
POOL = 1 << 25
ROUNDS = 3
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4


def main() -> None:
    """Measure and print, or be one of the ways."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--billions", type=float, nargs="+", default=[1.5, 3.0], choices=SIZES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--folder", type=Path, help="where to work, in place of the temporary one")
    parser.add_argument("--output", type=Path, help="a JSON file of all figures")
    parser.add_argument("--process", nargs=3, metavar=("WAY", "FROM", "TO"))
    parser.add_argument("--layout", nargs=2, metavar=("BILLIONS", "TO"))
    chosen = parser.parse_args()
    if chosen.layout:
        write_layout(Path(chosen.layout[1]), *SIZES[float(chosen.layout[0])])
        return
    if chosen.process:
        way, source, target = chosen.process
        started = time.perf_counter()
        seconds = PROCESSES[way](Path(source), Path(target))
        print(json.dumps(seconds if seconds is not None else time.perf_counter() - started))
        return
    rows = []
    print(HEAD)
    for billions in chosen.billions:
        with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="bake-disk-") as place:
            base = Path(place, "base")
            # In a process of its own too: a child's peak is never below that of its parent.
            layout = ("--layout", str(billions), str(base))
            subprocess.run([sys.executable, "-m", "benchmarks.disk", *layout], check=True)
            size = sum(path.stat().st_size for path in base.iterdir())
            for row in measured(base, Path(place), chosen.ways, chosen.rounds):
                rows.append({"billions": billions, "bytes": size} | row)
                print(line(rows[-1]), flush=True)
    if chosen.output:
        chosen.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


HEAD = f"{'size':>8}  {'way':24}  {'s':>6}  {'/cp':>5}  {'work s':>6}  {'/cp':>5}  " + "  ".join(
    f"{name:>9}" for name in ("cpu s", "peak MiB", "asked r", "asked w", "disk r", "disk w")
)


def line(row: dict[str, Any]) -> str:
    """A row of the table; bytes in GB."""
    gigabytes = "  ".join(
        f"{row[key] / 1e9:9.2f}" for key in ("rchar", "wchar", "read_bytes", "write_bytes")
    )
    return (
        f"{row['bytes'] / 1e9:5.2f} GB  {row['way']:24}  {row['seconds']:6.2f}  {row['ratio']:5.2f}"
        f"  {row['work']:6.2f}  {row['work_ratio']:5.2f}  {row['cpu']:9.2f}  {row['peak']:9.0f}"
        f"  {gigabytes}"
    )


def measured(base: Path, place: Path, ways: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Medians of every way, all in turn.

    A virtual machine gives its host the memory of deleted files, and to get it again costs more
    than the copy. So outputs stay until others have pushed them out of memory.
    """
    size = sum(path.stat().st_size for path in base.iterdir())
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


def write_layout(folder: Path, width: int, layers: int, inner: int) -> None:
    """A random bf16 Llama in shards, with its index; numbers repeat after some 33 million."""
    import torch

    folder.mkdir()
    config = LLAMA | {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    data = pool.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in _shapes(width, layers, inner).items():
        nbytes = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        if size and size + nbytes > SHARD:
            shards, size = [*shards, {}], 0
        shards[-1][name], size = shape, size + nbytes
    places: dict[str, str] = {}
    for number, shapes in enumerate(shards, 1):
        file = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        places |= dict.fromkeys(shapes, file.name)
        _write_shard(file, shapes, data)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _write_shard(file: Path, shapes: dict[str, tuple[int, ...]], data: bytes) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        while end:
            end -= stream.write(data[: min(end, len(data))])


def _shapes(width: int, layers: int, inner: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama with tied embeddings, heads by the table above."""
    kv = width * LLAMA["num_key_value_heads"] // LLAMA["num_attention_heads"]
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (LLAMA["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    for layer in range(layers):
        block = f"model.layers.{layer}"
        found |= {
            f"{block}.self_attn.q_proj.weight": (width, width),
            f"{block}.self_attn.k_proj.weight": (kv, width),
            f"{block}.self_attn.v_proj.weight": (kv, width),
            f"{block}.self_attn.o_proj.weight": (width, width),
            f"{block}.mlp.gate_proj.weight": (inner, width),
            f"{block}.mlp.up_proj.weight": (inner, width),
            f"{block}.mlp.down_proj.weight": (width, inner),
            f"{block}.input_layernorm.weight": (width,),
            f"{block}.post_attention_layernorm.weight": (width,),
        }
    return found


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
    from bake.staging import staged
    from bake.stream import write_checkpoint
    from bake.verify import check_files

    started = time.perf_counter()
    base = Checkpoint.open(source)
    arch = find_arch(base.config, str(source), base.tensors)
    edits, created, config = made(base, arch)
    with staged(target, overwrite=False) as staging:
        write_checkpoint(base, edits, created, config, staging)
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
        for block in model.model.layers:
            for module in (block.self_attn.o_proj, block.mlp.down_proj):
                weight = module.weight.float()
                module.weight.copy_(weight - torch.outer(direction, direction @ weight))
    model.save_pretrained(target, max_shard_size=SHARD)
    return time.perf_counter() - started


PROCESSES: dict[str, Callable[[Path, Path], float]] = {
    "bake ablate": ablate,
    "bake ablate, check": verified,
    "bake bias": bias,
    "load-edit-save": load_edit_save,
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
