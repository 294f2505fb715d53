"""What SLURM says of a run folder's jobs. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from dist_sft.errors import UserError

FILE = "jobs.jsonl"
SECONDS = 120.0  # a busy controller may need that long


def call(
    words: Sequence[str], env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's commands; raises UserError where there is none, or no answer."""
    try:
        return subprocess.run(words, text=True, capture_output=True, env=env, timeout=SECONDS)
    except FileNotFoundError:
        raise UserError(f"{words[0]} is not on PATH: run this on a login node") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{words[0]} has not answered for {SECONDS:.0f} s") from None


def note(folder: Path, **values: object) -> None:
    """Remember a job that was submitted for a folder."""
    with open(folder / FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def jobs_of(folder: Path) -> list[str]:
    """Return the numbers of the jobs that were submitted for a folder, oldest first."""
    path = folder / FILE
    if not path.exists():
        return []
    return [json.loads(text)["job"] for text in path.read_text(encoding="utf-8").splitlines()]


def states_of(jobs: Sequence[str]) -> dict[str, str]:
    """Return the states of those jobs that are in the queue, by number."""
    states = {}
    for job in jobs:
        done = call(["squeue", "--noheader", f"--jobs={job}", "--format=%T %r"])
        words = done.stdout.split() if done.returncode == 0 else []  # an error for a forgotten job
        if words:
            states[job] = words[0] if words[1:] in ([], ["None"]) else f"{words[0]} ({words[1]})"
    return states


def describe(job: str) -> str:
    """Return a job's state: from the queue, or from the accounting, where there is one."""
    with contextlib.suppress(UserError):  # asked on a machine that is not of the cluster
        state = states_of([job]).get(job)
        if state is not None:
            return state
        options = ("--allocations", "--noheader", "--parsable2", "--format=State,ExitCode,Elapsed")
        done = call(["sacct", f"--jobs={job}", *options])
        lines = done.stdout.split("\n") if done.returncode == 0 else [""]
        if lines[0]:
            how, code, elapsed = lines[0].split("|")
            return f"{how}, exit code {code.partition(':')[0]}, after {elapsed}"
        return "not in the queue any more"
    return "its state is known on the cluster only"
