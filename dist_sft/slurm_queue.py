"""What SLURM says of a run folder's jobs. Imports no torch."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from dist_sft.errors import UserError

FILE = "jobs.jsonl"
SWEEP = "sweep.txt"
SECONDS = 120.0  # a busy controller may need that long
FOR_EVER = re.compile(
    r"Partition(Config|NodeLimit|TimeLimit)|BadConstraints|Invalid\w+|\w*PerJob\w*"
)
"""Reasons for which a job waits until it asks for something else; SLURM takes such jobs all the
same, unless its EnforcePartLimits says otherwise."""


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
    lines = path.read_text(encoding="utf-8").splitlines()
    return list(dict.fromkeys(json.loads(text)["job"] for text in lines))


def runs_of(folder: Path) -> list[Path]:
    """Return the run folders of a sweep, in the order of its job array, or the folder itself."""
    listed = folder / SWEEP
    if not listed.exists():
        return [folder]
    # They are in the sweep's folder, wherever that may have moved.
    lines = listed.read_text(encoding="utf-8").splitlines()
    return [folder / Path(line).name for line in lines]


def states_of(jobs: Sequence[str]) -> dict[str, str]:
    """Return the states of those jobs that are in the queue, by number; tasks of an array each.

    Raises UserError where SLURM does not answer.
    """
    if not jobs:
        return {}
    done = call(
        ["squeue", "--noheader", "--array", f"--jobs={','.join(jobs)}", "--format=%i %T %r"]
    )
    if done.returncode and "Invalid job id" not in done.stderr:  # it has forgotten that job
        raise UserError(f"squeue: {done.stderr.strip()}")
    states = {}
    for job, state, *reason in map(str.split, done.stdout.splitlines()):
        states[job] = state if reason in ([], ["None"]) else f"{state} ({' '.join(reason)})"
    return states


def warning_of(job: str) -> str | None:
    """Say where a job that was just submitted may never start, as far as SLURM tells."""
    try:
        states = states_of([job])
    except UserError:  # it is in the queue all the same
        return None
    for state in states.values():
        waits = re.fullmatch(r"PENDING \((.*)\)", state)
        if waits and FOR_EVER.fullmatch(waits[1]):
            return (
                f"job {job} waits ({waits[1]}): it may never start. Does its partition have what "
                "was asked for: nodes, time, GPUs, CPUs, memory?"
            )
    return None


def endings_of(job: str) -> list[str]:
    """Return how each start of a job ended, oldest first, by the accounting; [] without one."""
    options = ("--duplicates", "--allocations", "--noheader", "--parsable2")
    try:
        done = call(["sacct", f"--jobs={job}", *options, "--format=State"])
    except UserError:
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def describe(jobs: Sequence[str]) -> list[str]:
    """Return a line for each job that is in the queue; without one for the last, by the accounting.

    `jobs` are of one run, oldest first.
    """
    if not jobs:
        return []
    last = jobs[-1]
    try:
        states = states_of(jobs)
        if states:
            return [f"job {job}: {state}" for job, state in states.items()]
        options = ("--allocations", "--noheader", "--parsable2", "--format=State,ExitCode,Elapsed")
        done = call(["sacct", f"--jobs={last}", *options])
    except UserError as error:
        return [f"job {last}: not known here: {error}"]
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    if not lines:
        return [f"job {last}: not in the queue any more"]
    how, code, elapsed = lines[-1].split("|")
    return [f"job {last}: {how}, exit code {code.partition(':')[0]}, after {elapsed}"]
