"""Prove on a person's own recipe that a killed run goes on as if nothing had happened."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from dist_sft import manifest, process, report, runs
from dist_sft.errors import UserError
from dist_sft.pieces import Reader


class Verdict(NamedTuple):
    """How far a killed and continued run is from an undisturbed one."""

    equal: bool
    told: str


def verify_resume(
    recipe: Path,
    overrides: Sequence[str],
    workers: int,
    steps: int,
    kill_at: int,
    scratch: Path,
    say: Callable[[str], None] = print,
) -> Verdict:
    """Run `steps` steps twice in `scratch`, once killed after step `kill_at`, and compare.

    Every rank and the launcher are ended by SIGKILL; the checkpoint before is what is left. Raises
    UserError where a run does not end well.
    """
    whole, killed = scratch / "undisturbed", scratch / "killed"

    def start(run_dir: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "dist_sft.local", "train", str(recipe), *overrides),
                *(f"run_dir={run_dir}", "train.epochs=null", f"train.steps={steps}"),
                *("checkpoint.every=1", "checkpoint.keep=2", "trackers=[]"),
                *("--workers", str(workers)),
            ],
            stdout=subprocess.DEVNULL,
        )

    def finish(launcher: subprocess.Popen[bytes], run_dir: Path) -> None:
        if launcher.wait() != runs.FINISHED:
            raise UserError(f"the run in {run_dir} ended with {launcher.returncode}, see above")

    say(f"an undisturbed run of {steps} steps: {whole}")
    finish(start(whole), whole)
    say(f"the same, killed after step {kill_at}: {killed}")
    launcher = start(killed)
    while not any(step >= kill_at for step in manifest.folders(killed)):
        if launcher.poll() is not None:
            raise UserError(f"the run in {killed} ended before step {kill_at}, see above")
        time.sleep(0.01)
    children = psutil.Process(launcher.pid).children(recursive=True)
    process.kill([launcher.pid, *(child.pid for child in children)])
    launcher.wait()
    left = max(manifest.folders(killed))
    if left >= steps:
        raise UserError(
            f"the run was over before it could be killed: give more --steps than {steps}"
        )
    say(f"killed, with a checkpoint of step {left}; going on")
    finish(start(killed), killed)
    return compare(whole, killed, steps)


def compare(whole: Path, killed: Path, steps: int) -> Verdict:
    """Compare two finished runs of `steps` steps: every loss, and the whole state at the end."""
    curves = [
        [line["loss"] for line in report.read_steps(folder / "metrics.jsonl")]
        for folder in (whole, killed)
    ]
    readers = [Reader(manifest.folder_of(folder, steps)) for folder in (whole, killed)]
    state = [(name, key) for name in readers[0].manifest["shapes"] for key in readers[0].keys(name)]
    other = [
        f"{name} ({key})"
        for name, key in state
        if not torch.equal(*(reader.tensor(name, key) for reader in readers))
    ]
    tensors = len(state)
    if curves[0] == curves[1] and not other:
        return Verdict(True, f"bit-identical: {steps} losses, {tensors} tensors of the state")
    pairs = zip(*curves, strict=True)
    worst = max(abs(a - b) / abs(a) for a, b in pairs)
    return Verdict(
        False,
        f"NOT bit-identical: losses differ by up to {worst:.1e} (relative), {len(other)} of "
        f"{tensors} tensors differ{f', such as {other[0]}' if other else ''}. On a GPU set "
        "deterministic: true",
    )
