"""Mutated safetensors files and indexes, by atheris: what libFuzzer finds by the lines it reaches.

    python -m tests.fuzzed FOLDER [-runs=20000] [-max_total_time=60]

Each input is a header and, where its first byte is odd, an index and a config behind zeros. It is
read and copied, or refused in one line within 2 s (`tests.test_hostile.tried`); anything else ends
the run.
"""

import json
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["bake.checkpoint", "bake.stream", "json"]):
    from bake.checkpoint import INDEX
    from tests.test_hostile import tried

SEEDS = (
    {"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}},
    {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]},
    },
    {"a": {"dtype": "F4", "shape": [2, 8], "data_offsets": [0, 8]}},
)


def main() -> None:
    """Fuzz in a folder."""
    place = Path(sys.argv.pop(1))
    base, output, seeds = (place / name for name in ("base", "out", "seeds"))
    for folder in (base, output, seeds):
        folder.mkdir(parents=True, exist_ok=True)
    for number, header in enumerate(SEEDS):
        text = json.dumps(header).encode()
        (seeds / f"{number}").write_bytes(b"\0" + text)
        index = json.dumps({"weight_map": {"a": "model.safetensors"}}).encode()
        (seeds / f"{number} with an index").write_bytes(b"\1" + b"\0".join((text, index, b"{}")))

    def one(data: bytes) -> None:
        header, *rest = data[1:].split(b"\0", 2) if data[:1] and data[0] % 2 else (data[1:],)
        content = len(header).to_bytes(8, "little") + header + bytes(8)
        (base / "model.safetensors").write_bytes(content)
        (base / INDEX).unlink(missing_ok=True)
        if rest:
            (base / INDEX).write_bytes(rest[0])
        (base / "config.json").write_bytes(rest[1] if len(rest) > 1 else b"{}")
        tried(base, output)

    atheris.Setup([sys.argv[0], str(seeds), *sys.argv[1:]], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
