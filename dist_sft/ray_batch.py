"""What `slurm/ray.sbatch` asks when the launcher in it has ended. Imports no torch.

    python -m dist_sft.ray_batch FOLDER CODE     prints what to do, as `batch_job end` does

FOLDER is the job's own one; the launcher has written there which run it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from dist_sft import batch_job, runs
from dist_sft.batch_job import Fate, Job

FOLDER = "DIST_SFT_RAY_JOB"
"""Name of the variable that has the job's own folder, for a launcher in `slurm/ray.sbatch`."""
RUN_DIR = "run_dir"
"""Name of the file in it that says which run is run."""


def note(run_dir: Path) -> Job | None:
    """Tell the batch script which run this is; return its job, or None where there is none."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return None
    Path(folder, RUN_DIR).write_text(str(run_dir.absolute()), encoding="utf-8")
    return Job.me(os.environ)


def end(folder: Path, code: int, asked: str, fate: Fate, job: Job) -> str:
    """Say what the batch shell shall do; `asked` is the signal it got, or ""."""
    if code in (runs.FINISHED, runs.WRONG_INPUT):
        return f"exit {code}"
    told = folder / RUN_DIR
    run_dir = Path(told.read_text(encoding="utf-8")) if told.exists() else None
    newest = max(runs.attempts(run_dir), default=-1) if run_dir else -1
    ran = batch_job.read(run_dir, newest) if run_dir and newest >= 0 else None
    if run_dir and ran and (ran.job, ran.restart) == (job.job, job.restart):
        return batch_job.end(run_dir, newest, asked, fate)
    if code == runs.FAILED and not (fate.preempted or fate.timed_out):
        return f"exit {code}"  # no worker has begun, and nothing says that one will next time
    return batch_job.decide(code, f"signal SIG{asked}", fate)


def main() -> int:
    """Answer the batch shell."""
    parser = argparse.ArgumentParser(prog="python -m dist_sft.ray_batch", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("code", type=int, help="exit code of the launcher")
    parser.add_argument("--asked", default="", help="the signal that the batch shell got")
    parser.add_argument("--job", default="", help="what `scontrol --oneliner show job` says")
    options = parser.parse_args()
    fate = Fate.parse(options.job)
    print(end(options.folder, options.code, options.asked, fate, Job.me(os.environ)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
