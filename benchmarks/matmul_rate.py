"""Measure how fast this machine multiplies the model's matrices right now.

    python benchmarks/matmul_rate.py models/smollm2-135m --threads 1

Prints GFLOP/s: the products of one layer's forward and backward pass, one after the other, for a
few seconds. It is the yardstick of `train_speed.py`, which runs it before and after every
contestant because the speed of a shared machine changes from minute to minute.
"""

import argparse
import time
from pathlib import Path

import torch
from model_size import ModelSize

TOKENS = 2048
SECONDS = 3.0


def main() -> None:
    """Print the rate as the only line of output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    matrices = ModelSize.read(arguments.model).layer_matrices()
    print(measure(matrices, getattr(torch, arguments.dtype)))


def measure(matrices: list[tuple[int, int]], dtype: torch.dtype) -> float:
    """Return GFLOP/s over the forward, input-gradient and weight-gradient products."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    products = []
    for outputs, inputs in matrices:
        x = torch.randn(TOKENS, inputs, dtype=dtype, device=device)
        weight = torch.randn(outputs, inputs, dtype=dtype, device=device)
        gradient = torch.randn(TOKENS, outputs, dtype=dtype, device=device)
        for left, right in ((x, weight.T), (gradient, weight), (gradient.T, x)):
            products.append((left, right, left @ right))  # also warms up
    flops_per_pass = 6 * TOKENS * sum(outputs * inputs for outputs, inputs in matrices)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    passes, started = 0, time.perf_counter()
    while (seconds := time.perf_counter() - started) < SECONDS:
        for left, right, result in products:
            torch.matmul(left, right, out=result)
        wait()
        passes += 1
    return passes * flops_per_pass / seconds / 1e9


if __name__ == "__main__":
    main()
