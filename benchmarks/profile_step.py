"""Say where the time of a training step goes, by kind of operation.

    python benchmarks/profile_step.py models/smollm2-135m --tokens 1024 --length 128

Runs forward and backward of one packed micro-batch on one rank, and AdamW's update, which a step
does once. Prints each kind's seconds and share, and how long the matrix products take against the
rate of `matmul_rate.py`, measured before and after: what is missing to that rate is either other
work, or products that are slower than the yardstick.
"""

import argparse
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import numpy as np
import torch
from matmul_rate import measure
from model_size import ModelSize
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedModel

from dist_sft import attention
from dist_sft.batches import Batch
from dist_sft.config import Optimizer
from dist_sft.optim import build_optimizer
from dist_sft.step import token_loss

CPU = torch.device("cpu")

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "loss": ("log_softmax", "nll_loss", "cross_entropy"),
    "SiLU": ("silu",),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::clone", "aten::fill_", "aten::index"),
    "sums (norms, broadcast gradients)": ("aten::sum", "aten::mean", "aten::pow", "aten::rsqrt"),
    "multiplications (norms, rotary, gates)": ("aten::mul", "aten::neg"),
    "additions (residuals, accumulation)": ("aten::add",),
}
REPEATS = 5


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens in the micro-batch")
    parser.add_argument("--length", type=int, default=128, help="tokens in each row of it")
    parser.add_argument("--supervised", type=float, default=0.75, help="share that is learned")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = ModelSize.read(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model.set_attn_implementation(attention.NAME)
    lengths = [options.length] * (options.tokens // options.length)
    supervised = int(sum(lengths) * options.supervised)

    before = measure(size.layer_matrices(), torch.float32)
    step(model, lengths, supervised)  # warm-up
    seconds, kinds = [], []
    for _ in range(REPEATS):
        began = time.perf_counter()
        step(model, lengths, supervised)
        seconds.append(time.perf_counter() - began)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step(model, lengths, supervised)
        kinds.append(by_kind(profiler))
    update = time_update(model)
    rate = (before + measure(size.layer_matrices(), torch.float32)) / 2

    flops = size.training_flops(lengths, supervised) / 1e9
    whole = median(seconds)
    print(f"{sum(lengths)} tokens in rows of {options.length}, {supervised} supervised")
    print(f"forward and backward {whole:.2f} s, {flops / whole:.0f} of {rate:.0f} GFLOP/s")
    print(f"AdamW's update once per optimizer step: {update:.2f} s")
    for kind in sorted(kinds[0], key=lambda name: -kinds[0][name]):
        spent = median(found[kind] for found in kinds)
        print(f"{kind:40} {spent:6.2f} s {spent / whole:6.1%}")
    products = median(found["matrix products"] for found in kinds)
    print(f"matrix products take {products / (flops / rate):.2f} times as long as at that rate")


def step(model: PreTrainedModel, lengths: list[int], supervised: int) -> None:
    """Compute a gradient as training does; it accumulates."""
    tokens = sum(lengths)
    ids = torch.randint(model.config.vocab_size, (1, tokens))
    keep = torch.arange(tokens)[None] < supervised
    inputs = {"input_ids": ids, **attention.packed_inputs(lengths, CPU)}
    batch = Batch(np.arange(len(lengths)), inputs, keep, ids[keep], tokens)
    (token_loss(model, batch) / supervised).backward()


def by_kind(profiler: profile) -> dict[str, float]:
    """Add up the seconds that operations spent in themselves."""
    spent: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        kind = next(
            (kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)),
            "other",
        )
        spent[kind] += event.self_cpu_time_total / 1e6
    return spent


def time_update(model: PreTrainedModel) -> float:
    """Return the seconds of one AdamW step over all parameters."""
    optimizer = build_optimizer(model, Optimizer(lr=1e-9))
    optimizer.step()
    began = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
