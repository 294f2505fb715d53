"""What a run leaves for people: the loss as a picture, and where its time went."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from dist_sft.rollback import read_rollbacks

Line = dict[str, Any]


def read_steps(metrics: Path) -> list[Line]:
    """Return the step lines of metrics.jsonl in order of steps.

    A step that was computed again after a crash appears twice; the last line of the last attempt
    counts, whatever an older one that was left alive still writes. Half a line, which a killed
    attempt may leave, is passed over, and so are steps that taught nothing: they were left out as
    they were not finite, or the run went back over them. So are steps of older attempts that the
    newest one has not reached.
    """
    steps: dict[int, Line] = {}
    rollbacks = read_rollbacks(metrics.parent)
    for text in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            line = json.loads(text)
            known = steps.get(line["step"], line)
            if "event" not in line and line["attempt"] >= known["attempt"]:
                steps[line["step"]] = line
    newest = max((line["attempt"] for line in steps.values()), default=0)
    last = max((n for n, line in steps.items() if line["attempt"] == newest), default=0)
    return [
        line
        for number, line in sorted(steps.items())
        if number <= last
        and line["loss"] is not None
        and not any(back.covers(number) for back in rollbacks)
    ]


def total_steps(metrics: Path) -> int | None:
    """Return where the run would end, as its newest attempt said; None before any has."""
    total = None
    for text in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        if '"event": "begun"' in text:
            with contextlib.suppress(json.JSONDecodeError):
                total = json.loads(text)["total"]
    return total


def draw_loss(steps: Sequence[Line], picture: Path) -> None:
    """Draw the loss of training and evaluation over the steps."""
    from matplotlib.figure import Figure

    if not steps:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    numbers = [line["step"] for line in steps]
    losses = [line["loss"] for line in steps]
    axes.plot(numbers, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(numbers, smoothed(losses), color="tab:blue", label="training, smoothed")
    evaluated = [line for line in steps if "eval_loss" in line]
    for name in evaluated[0]["eval_loss"] if evaluated else ():
        points = [(line["step"], line["eval_loss"][name]) for line in evaluated]
        axes.plot(*zip(*points, strict=True), marker="o", label=f"evaluation: {name}")
    axes.set(xlabel="optimizer step", ylabel="loss per supervised token", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)


def smoothed(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Return an exponential moving average that starts unbiased."""
    result: list[float] = []
    total = weight = 0.0
    for value in values:
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        result.append(total / weight)
    return result


def summarize(steps: Sequence[Line], peak_source: str) -> list[str]:
    """Return what people ask after a run; the first step, which warms up, counts nowhere."""
    if not steps:  # somebody has removed metrics.jsonl
        return []
    settled = steps[1:] or steps
    seconds = sum(line["seconds"] for line in settled)
    phases: Counter[str] = Counter()
    for line in settled:
        phases.update(line["phases"])
    collective = [line for line in settled if "collectives" in line]
    lines = [
        f"loss {steps[0]['loss']:.4f} -> {steps[-1]['loss']:.4f}",
        f"{sum(line['tokens'] for line in settled) / seconds:,.0f} tokens/s, "
        f"{sum(line['supervised_tokens'] for line in settled) / seconds:,.0f} supervised tokens/s, "
        f"{median(line['share_of_peak'] for line in settled):.0%} of the {peak_source}",
        "a step's time: "
        + ", ".join(f"{name} {part / seconds:.0%}" for name, part in phases.most_common()),
        f"peak memory of rank 0: {steps[-1]['peak_memory_bytes'] / 2**30:.2f} GiB",
    ]
    if collective:
        share = sum(x["collectives"] for x in collective) / sum(x["seconds"] for x in collective)
        lines[2] += f" (collectives, waiting included: {share:.0%} of {len(collective)} steps)"
    return lines
