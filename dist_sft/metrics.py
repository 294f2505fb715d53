"""What a run measures: where a step's time goes, tokens per second, share of the machine's peak."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Self

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

# Dense bfloat16 peaks in FLOP/s from the vendor's data sheets, by words of the device's name.
GPU_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
}


class Clock:
    """Sum up the seconds spent in named phases of a step.

    On a GPU work is queued: events on its own stream are the clock, and they are read only when
    the step is over.
    """

    def __init__(
        self, device: torch.device, beat: Callable[[str], None] = lambda phase: None
    ) -> None:
        """Call `beat` whenever a phase begins."""
        self._beat = beat
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the block's time as part of a phase."""
        self._beat(phase)
        if self._cuda:
            event: Any = torch.cuda.Event  # torch leaves it untyped
            start, end = event(enable_timing=True), event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((phase, start, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds[phase] += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """Return the seconds of every phase since the last reading."""
        if self._events:
            torch.cuda.synchronize()
        for phase, start, end in self._events:
            self._seconds[phase] += start.elapsed_time(end) / 1000
        seconds = dict(self._seconds)
        self._events.clear()
        self._seconds.clear()
        return seconds


class Collectives:
    """Measure the seconds that a block spends in collectives, waiting for other ranks included.

    They run inside backward and optimizer, partly beside computation, so only a profiler sees
    them; it is started for a few steps of a run.
    """

    def __init__(self, device: torch.device) -> None:
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler: Any = profile(activities=activities)  # torch leaves it untyped

    def __enter__(self) -> Self:
        self._profiler.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._profiler.__exit__(*error)

    def seconds(self) -> float:
        """Return what the block spent in collectives."""
        events = self._profiler.key_averages()
        on_cpu = sum(e.cpu_time_total for e in events if e.key.startswith("gloo:"))
        on_gpu = sum(e.device_time_total for e in events if e.key.startswith("ncclDevKernel"))
        return float(on_cpu + on_gpu) / 1e6


class MetricsFile:
    """Append lines to metrics.jsonl; each is on its way to disk before the next step begins.

    A line that cannot be written, on a full disk for one, is lost, and `say` tells so once.
    """

    def __init__(self, path: Path, attempt: int, say: Callable[[str], None] = print) -> None:
        self._file: IO[bytes] = open(path, "ab", buffering=0)  # noqa: SIM115
        # A killed attempt may have left half a line.
        self._is_torn = self._file.tell() > 0 and not path.read_bytes().endswith(b"\n")
        self._attempt, self._say = attempt, say
        self._works = True

    def write(self, **values: Any) -> None:
        """Append one line."""
        line = json.dumps({"attempt": self._attempt, **values}) + "\n"
        text = ("\n" * self._is_torn + line).encode()
        try:
            written = self._file.write(text)
            self._is_torn = written < len(text)
            why = os.strerror(errno.ENOSPC)
        except OSError as error:
            why = str(error.strerror)
            written = 0
        if written < len(text) and self._works:
            self._say(f"metrics.jsonl cannot be written, lines are lost: {why}")
        self._works = written == len(text)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory this process has held: on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.4) -> float:
    """Measure how many FLOP/s this process gets out of a large matrix multiplication."""
    n = 8192 if device.type == "cuda" else 768
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    rates: list[float] = []
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(rates) < 3:
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        rates.append(2 * n**3 / (time.perf_counter() - began))
    rates.sort()
    return rates[len(rates) // 2]


def peak_rate(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return the FLOP/s to compare with, and where the figure comes from."""
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for part, rate in GPU_PEAKS.items():
            if re.search(rf"\b{part}\b", name):
                return rate, f"peak of {name} by its data sheet"
    return matmul_rate(device, dtype), "matrix-multiply rate measured at the start"


class FlopCounter:
    """Count the floating-point operations that a model's training mathematics needs.

    6 per matrix weight and token (2 forward, 4 backward; Kaplan et al., 2020, arXiv:2001.08361,
    section 2.1), the head only for supervised tokens, and 6 T^2 h per layer and row for causal
    attention (Chowdhery et al., 2022, arXiv:2204.02311, appendix B, halved as only the lower
    triangle is needed). Recomputation by gradient checkpointing does not count as useful work.

    Backward through y = x W is two products of that size, dx = dy W^T and dW = x^T dy; a frozen
    weight needs only the first: 4 in all. Where nothing before it is trained it needs neither, and
    attention there no gradient: what is counted is an upper bound then.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        # Tables of tokens and positions are looked up; the head has a count of its own.
        tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
        skipped = {id(m.weight) for m in (*tables, head) if m is not None}
        self._body = sum(
            _flops_per_weight(p) * _active_numel(name, p, config)
            for name, p in model.named_parameters()
            if id(p) not in skipped and len(_shape(p)) >= 2
        )
        head_weight = (head or embedding).weight
        self._head = _flops_per_weight(head_weight) * math.prod(_shape(head_weight))
        self._layers = getattr(config, "num_hidden_layers", 0)
        self._hidden = getattr(config, "hidden_size", 0)
        if getattr(config, "head_dim", None):  # heads need not add up to the hidden size
            self._hidden = config.num_attention_heads * config.head_dim

    def __call__(self, lengths: Any, supervised_tokens: int) -> float:
        """Return FLOPs of a step; `lengths` [rows] are the tokens of its rows."""
        matrices = self._body * float(lengths.sum()) + self._head * supervised_tokens
        attention = self._layers * self._hidden * float((lengths.astype(float) ** 2).sum())
        return matrices + 6.0 * attention


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _flops_per_weight(parameter: nn.Parameter) -> float:
    return 6.0 if parameter.requires_grad else 4.0


def _active_numel(name: str, parameter: nn.Parameter, config: Any) -> float:
    """Return the weights of a parameter that one token meets: a few experts, not all."""
    numel = math.prod(_shape(parameter))
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None)
    if experts and chosen and ".experts" in name:
        return float(numel * chosen / experts)
    return numel
