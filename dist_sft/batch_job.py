"""What the batch shell of a SLURM job asks before and after its workers. Imports no torch.

    python -m dist_sft.batch_job begin RUN_DIR            prints "attempt N", or "finished"
    python -m dist_sft.batch_job end RUN_DIR ATTEMPT      prints what to do:
        requeue [HOSTS]         put the job back in the queue, without these hosts
        wait                    let SLURM do what it has decided
        exit CODE

Reasons go to stderr, where the job's log has them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dist_sft import lease, parts, roll_call, runs, slurm_queue
from dist_sft.config import read_config_json
from dist_sft.errors import UserError

FILE = "slurm.json"
GOES_ON = frozenset({"CONFIGURING", "RESIZING", "RUNNING", "SIGNALING", "STOPPED", "SUSPENDED"})
"""States of a job that nobody is ending."""
DEFAULT_RESTARTS = 3
"""How many starts of a job in a row may bring no new checkpoint or part, where the launch does not
say."""


@dataclass(frozen=True)
class Job:
    """The SLURM job that an attempt is part of; `slurm.json` in the attempt's folder."""

    job: str
    """Its number, for a task of an array ARRAY_TASK."""
    restart: int
    hosts: list[str]
    preempted: bool = False
    """It ended for another job's sake, which is no fault of the run."""

    @classmethod
    def me(cls, environment: Mapping[str, str]) -> Job:
        """Read SLURM's variables, and the hosts that the batch shell found; raises UserError."""
        if "SLURM_HET_SIZE" in environment:
            raise UserError("heterogeneous jobs (`:` between options of sbatch) are not supported")
        array, task = (environment.get(f"SLURM_ARRAY_{key}_ID") for key in ("JOB", "TASK"))
        return cls(
            f"{array}_{task}" if task else environment["SLURM_JOB_ID"],
            int(environment.get("SLURM_RESTART_COUNT") or 0),
            environment.get("DIST_SFT_HOSTS", "").split(),
        )


@dataclass(frozen=True)
class Fate:
    """What SLURM has in mind with a job, as far as `scontrol show job` tells."""

    goes_on: bool | None
    """Nobody is ending it; None where SLURM did not answer."""
    timed_out: bool = False
    preempted: bool = False

    @classmethod
    def parse(cls, text: str) -> Fate:
        """Read the output of `scontrol --oneliner show job`.

        A job that is being ended is COMPLETING, whatever it will be then: its time limit is told by
        the reason. `PreemptTime` is there in the grace time of a preemption only.
        """
        facts = dict(re.findall(r"(\S+?)=(\S*)", text))
        return cls(
            facts["JobState"] in GOES_ON if "JobState" in facts else None,
            facts.get("Reason") == "TimeLimit",
            facts.get("PreemptTime", "None") != "None",
        )


def read(run_dir: Path, attempt: int) -> Job | None:
    """Return the job of an attempt, or None where SLURM did not run it."""
    path = _path(run_dir, attempt)
    return Job(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def begin(run_dir: Path, job: Job) -> int | None:
    """Claim the next attempt for this job; None where there is nothing to do.

    Raises UserError where the run must not start.
    """
    recipe, launch = read_config_json(run_dir), runs.read_launch(run_dir)
    if runs.is_finished(recipe):
        print(f"{run_dir} is finished already", file=sys.stderr)
        return None
    stop = run_dir / "STOP"
    if stop.exists():  # the launcher removes one that was there when a person submitted the job
        raise UserError(
            f"{stop} asks this run to stop; `launch/slurm.py resume {run_dir}` removes it and "
            "submits the run again"
        )
    reason = why_to_give_up(run_dir, job.job)
    if reason:
        raise UserError(reason)
    seen = lease.wait_until_free(run_dir, lambda line: print(line, file=sys.stderr))
    attempt = lease.claim(run_dir, seen)
    write(run_dir, attempt, job)
    if job.job not in slurm_queue.jobs_of(run_dir):  # somebody submitted it by sbatch itself
        slurm_queue.note(run_dir, time=time.time(), job=job.job)
    if len(job.hosts) != launch.nodes:
        runs.record_change(run_dir, attempt, {"nodes": f"{launch.nodes} -> {len(job.hosts)}"})
        runs.write_launch(run_dir, replace(launch, nodes=len(job.hosts)))
    return attempt


def end(run_dir: Path, attempt: int, asked: str, fate: Fate) -> str:
    """Say what the batch shell shall do after an attempt; `asked` is the signal it got, or ""."""
    job, outcome = read(run_dir, attempt), runs.read_outcome(run_dir, attempt)
    if job is None:
        raise UserError(f"attempt {attempt} of {run_dir} was not begun by a batch job")
    code = runs.FAILED if outcome is None else outcome.code
    print(outcome.reason if outcome else f"attempt {attempt} ended without a word", file=sys.stderr)
    if fate.preempted:
        write(run_dir, attempt, replace(job, preempted=True))
    if code == runs.FINISHED:
        parts.clean_up(run_dir)
    if code in (runs.FINISHED, runs.WRONG_INPUT):
        return f"exit {code}"
    # Some signals reach the workers alone: `scancel --signal`, and the notice of a preemption where
    # slurm.conf has no preempt_send_user_signal.
    by = outcome.asked_by if outcome and outcome.asked_by else f"signal SIG{asked}"
    what = decide(code, by, fate)
    if what != "requeue":
        return what
    options = runs.read_launch(run_dir).options
    if not options.get("requeue", True) or (run_dir / "STOP").exists():
        return f"exit {code}"
    reason = why_to_give_up(run_dir, job.job)
    if reason:
        print(reason, file=sys.stderr)
        return f"exit {code}"
    bad = roll_call.bad_hosts(run_dir, attempt) if options.get("exclude_bad_nodes") else []
    if bad:
        print(f"going on without {', '.join(bad)} (--exclude-bad-nodes)", file=sys.stderr)
    return " ".join(["requeue", *bad])


def decide(code: int, by: str, fate: Fate) -> str:
    """Say what follows from an exit code, from what asked for the end, and from SLURM's plans."""
    decided = not (fate.goes_on or fate.timed_out)
    if fate.goes_on is None:  # SLURM is mute, but it sends TERM when it has decided
        decided = by == "signal SIGTERM"
    if decided:
        return "wait"
    time_is_up = by == "signal SIGUSR1" or fate.preempted or fate.timed_out
    asked_to_end = code == runs.STOPPED or by == "signal SIGTERM"
    return f"exit {code}" if asked_to_end and not time_is_up else "requeue"


def why_to_give_up(run_dir: Path, job: str) -> str | None:
    """Say why a job should not start again: too many of its last attempts brought nothing."""
    restarts = runs.read_launch(run_dir).options.get("restarts", DEFAULT_RESTARTS)
    fruitful = _fruitful(run_dir)
    in_vain = []
    for attempt in reversed(runs.attempts(run_dir)):
        ran = read(run_dir, attempt)
        if ran is None or ran.job != job or attempt in fruitful:
            break
        if not ran.preempted:
            in_vain.append(attempt)
    if len(in_vain) <= restarts:
        return None
    outcome = runs.read_outcome(run_dir, in_vain[0])
    last = outcome.reason if outcome else "it ended without a word, as when its node dies"
    what = "checkpoint" if read_config_json(run_dir).job == "train" else "part"
    return (
        f"gave up: {len(in_vain)} attempts of job {job} in a row brought no new {what} "
        f"(--restarts: {restarts}). The last one: {last}"
    )


def _fruitful(run_dir: Path) -> set[int]:
    """Return the attempts that brought a part, or by the events in metrics.jsonl a checkpoint."""
    path = run_dir / "metrics.jsonl"
    found = {
        a for a in runs.attempts(run_dir) if (runs.attempt_dir(run_dir, a) / runs.FRUITFUL).exists()
    }
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        if '"event": "checkpoint"' in text:
            with contextlib.suppress(ValueError):  # a line that a killed rank left half written
                found.add(json.loads(text)["attempt"])
    return found


def _path(run_dir: Path, attempt: int) -> Path:
    return runs.attempt_dir(run_dir, attempt) / FILE


def write(run_dir: Path, attempt: int, job: Job) -> None:
    """Write down which job an attempt is part of."""
    runs.write_atomically(_path(run_dir, attempt), json.dumps(asdict(job)) + "\n")


def main() -> int:
    """Answer the batch shell."""
    parser = argparse.ArgumentParser(prog="python -m dist_sft.batch_job", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    beginning = commands.add_parser("begin")
    beginning.add_argument("run_dir", type=Path)
    ending = commands.add_parser("end")
    ending.add_argument("run_dir", type=Path)
    ending.add_argument("attempt", type=int)
    ending.add_argument("--asked", default="", help="the signal that the batch shell got")
    ending.add_argument("--job", default="", help="what `scontrol --oneliner show job` says")
    options = parser.parse_args()
    try:
        if options.command == "end":
            fate = Fate.parse(options.job)
            print(end(options.run_dir, options.attempt, options.asked, fate))
            return 0
        attempt = begin(options.run_dir, Job.me(os.environ))
        print("finished" if attempt is None else f"attempt {attempt}")
        return 0
    except UserError as error:
        print(error, file=sys.stderr)
        return runs.WRONG_INPUT


if __name__ == "__main__":
    sys.exit(main())
