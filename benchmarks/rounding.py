"""What roundings keep of a small edit of a quantised matrix, in the metric of its inputs.

    python -m benchmarks.rounding

The matrix is random, its inputs have a spectrum that falls by two decades, and the edit is of
rank one and some share of the matrix's norm. Printed is the noise |dW' - dW| / |dW|, of the
nearest code on the base's own lattice, of that with error feedback, and of what ggml writes.
"""

import numpy as np
import torch
from gguf import GGMLQuantizationType

from bake.export.lattice import Feedback, rounded
from bake.ggml import Bytes, dequantised, quantised

ROWS, COLUMNS, SAMPLES = 384, 512, 4096
CASES = {
    "Q8_0": (0.02, 0.05),
    "Q6_K": (0.05, 0.1),
    "Q4_K": (0.02, 0.1),
    "Q4_1": (0.1,),
    "IQ4_NL": (0.1,),
}


def main() -> None:
    """Measure and print."""
    weight, gram = drawn(0, (ROWS, COLUMNS)), inputs()
    left, right = np.split(drawn(2, (ROWS + COLUMNS, 1)), [ROWS])
    feedback = Feedback.of(torch.from_numpy(gram))
    print("base | edit | nearest | feedback | ggml")
    for name, shares in CASES.items():
        kind = GGMLQuantizationType[name]
        stored = quantised(weight, kind)
        before = dequantised(stored, kind)
        for share in shares:
            change = left @ right.T
            change *= share * np.linalg.norm(before) / np.linalg.norm(change)
            wanted = torch.from_numpy(before + change)
            ways = (
                rounded(stored, kind, wanted, None),
                rounded(stored, kind, wanted, feedback),
                quantised(before + change, kind),
            )
            found = (noise(way, kind, before, change, gram) for way in ways)
            print(f"{name} | {share:.0%} |", " | ".join(f"{one:.2f}" for one in found))


def noise(
    stored: Bytes,
    kind: GGMLQuantizationType,
    before: np.ndarray,
    change: np.ndarray,
    gram: np.ndarray,
) -> float:
    """|dW' - dW| / |dW| in the metric of the inputs."""
    error = dequantised(stored, kind) - before - change
    return float((((error @ gram) * error).sum() / ((change @ gram) * change).sum()) ** 0.5)


def inputs() -> np.ndarray:
    """The second moment of inputs some of whose directions are far more common than others."""
    mixing = drawn(1, (COLUMNS, COLUMNS)) / COLUMNS**0.5
    samples = drawn(3, (SAMPLES, COLUMNS)) * np.logspace(1, -1, COLUMNS, dtype=np.float32) @ mixing
    return samples.T @ samples / SAMPLES


def drawn(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Normal numbers in float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


if __name__ == "__main__":
    main()
