"""Say how a run is getting on, from what is in its folder. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import textwrap
import time
from datetime import timedelta
from pathlib import Path
from statistics import median

from dist_sft import batch_job, lease, manifest, parts, report, runs, slurm_queue
from dist_sft.progress import Overview, describe


def status(run_dir: Path) -> list[str]:
    """Return lines for a person, of every run of a sweep; raises UserError where there is none."""
    folders = slurm_queue.runs_of(run_dir)
    if folders != [run_dir]:
        return [line for folder in folders for line in (*status(folder), "")][:-1]
    launch, held = runs.read_launch(run_dir), lease.read(run_dir)
    plan = parts.read_plan(run_dir)  # of generation
    works = held is not None and not lease.is_gone(held.owner)
    return [
        f"{run_dir}: launched by {launch.launcher}, {_size(run_dir, launch)}",
        f"owner: {_owner(run_dir, held)}",
        *slurm_queue.describe(slurm_queue.jobs_of(run_dir)),
        *_attempts(run_dir, held),
        *(
            _answers(run_dir, plan, working=works)
            if plan
            else [_progress(run_dir), _checkpoints(run_dir)]
        ),
    ]


def _answers(run_dir: Path, plan: parts.Plan, *, working: bool) -> list[str]:
    """Tell how far a generation run is."""
    newest = max(runs.attempts(run_dir), default=0)
    view = Overview.read(run_dir, newest, plan)
    lines = [
        f"rows {view.finished_rows:,} of {plan.rows:,} ({view.finished_rows / plan.rows:.1%}); "
        f"finished parts: {len(parts.finished(run_dir))} of {plan.parts}"
    ]
    if view.age is not None and working:
        lines[0] += (
            f"; {view.tokens_per_second:,.0f} tokens/s; written {view.age:.0f} s ago{view.eta}"
        )
    summary = run_dir / "summary.json"
    if summary.exists() and view.finished_rows == plan.rows:
        tally = parts.Tally.read(json.loads(summary.read_text(encoding="utf-8")))
        lines += describe(tally)
    return lines


def _size(run_dir: Path, launch: runs.Launch) -> str:
    if launch.launcher == "ray":  # which places workers as it likes
        low, high = launch.options["workers"]
        wanted = str(low) if low == high else f"{low} to {high}"
        placed = runs.attempt_dir(run_dir, max(runs.attempts(run_dir), default=0)) / runs.PLACED
        there: int | str = "none yet"
        with contextlib.suppress(FileNotFoundError):
            there = len(json.loads(placed.read_text(encoding="utf-8"))["hosts"])
        return f"workers: {there} (wanted: {wanted})"
    return f"nodes: {launch.nodes}, workers per node: {launch.workers_per_node}"


def _owner(run_dir: Path, held: lease.Lease | None) -> str:
    if held is None:
        return "nobody"
    if lease.is_gone(held.owner):
        return f"nobody; {held.owner} is gone, and the next launch takes over"
    told = f"{held.owner}, attempt {held.attempt}"
    with contextlib.suppress(FileNotFoundError):  # it may end in this moment
        age = time.time() - (run_dir / lease.NAME).stat().st_mtime
        told += f", last sign of life {max(0.0, age):.0f} s ago"
    return told


def _attempts(run_dir: Path, held: lease.Lease | None) -> list[str]:
    lines = []
    for attempt in runs.attempts(run_dir):
        outcome = runs.read_outcome(run_dir, attempt)
        how = f"no outcome: it was killed{_slurms_word(run_dir, attempt)}"
        if held is not None and held.attempt == attempt and not lease.is_gone(held.owner):
            how = "works, if its owner is alive"
        if outcome is not None:
            reason = textwrap.shorten(outcome.reason.splitlines()[0], 150, placeholder=" ...")
            how = f"exit code {outcome.code}, {reason}"
        lines.append(f"attempt {attempt}: {how}")
    return lines


def _slurms_word(run_dir: Path, attempt: int) -> str:
    """Return how SLURM says that an attempt ended, which itself could not."""
    ran = batch_job.read(run_dir, attempt)
    endings = slurm_queue.endings_of(ran.job) if ran else []
    return f" (SLURM: {endings[ran.restart]})" if ran and ran.restart < len(endings) else ""


def _progress(run_dir: Path) -> str:
    metrics = run_dir / "metrics.jsonl"
    steps = report.read_steps(metrics) if metrics.exists() else []
    if not steps:
        return "no step yet"
    last, age = steps[-1], time.time() - metrics.stat().st_mtime
    total = report.total_steps(metrics)
    seconds = median(line["seconds"] for line in steps[-20:])
    of, left = "", ""
    if total is not None:
        of = f" of {total}"
        left = f"; left: {timedelta(seconds=round(seconds * (total - last['step'])))}"
    return (
        f"step {last['step']}{of}: loss {last['loss']:.4f}, "
        f"{last['tokens'] / last['seconds']:,.0f} tokens/s; written "
        f"{timedelta(seconds=max(0, round(age)))} ago{left}"
    )


def _checkpoints(run_dir: Path) -> str:
    steps, best = list(manifest.folders(run_dir)), manifest.best(run_dir)
    if not steps:
        return "no checkpoint yet"
    aside = [path.name for path in (run_dir / "checkpoints").glob("step-*.damaged-*")]
    told = f"checkpoints of steps: {', '.join(map(str, steps))}" + (
        f"; best: {best}" if best else ""
    )
    return told + (f"; damaged, set aside: {', '.join(aside)}" if aside else "")
