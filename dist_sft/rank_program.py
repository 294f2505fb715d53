"""What the program of every rank does around its job: log, signals, and how it went."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from transformers.utils import logging

from dist_sft import deaf_torchrun, process, runs
from dist_sft.console import Console, redirect_output
from dist_sft.errors import UserError
from dist_sft.runs import Outcome
from dist_sft.watchdog import DUMP_SIGNAL

Work = Callable[[Path, int, Console], Outcome]
"""Do a run folder's job, as its attempt of this number; return how it went."""


def run(work: Work, run_dir: Path, attempt: int) -> int:
    """Run one rank to its end and write down how it went; return the process's exit code."""
    rank = int(os.environ["RANK"])
    process.die_with_parent()
    for number in deaf_torchrun.IGNORED:  # torchrun's deafness is not for its ranks
        signal.signal(number, signal.SIG_DFL)
    terminal = redirect_output(runs.attempt_dir(run_dir, attempt) / f"rank-{rank}.log")
    console = Console(terminal if rank == 0 else None)
    faulthandler.register(DUMP_SIGNAL, file=sys.stderr)  # where it hangs, when its node asks
    logging.disable_progress_bar()  # transformers' bars would be all that a log shows
    try:
        outcome = work(run_dir, attempt, console)
    except Exception as error:
        traceback.print_exc()
        code = runs.WRONG_INPUT if isinstance(error, UserError) else runs.FAILED
        reason = str(error) if code == runs.WRONG_INPUT else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):
            runs.write_failure(run_dir, attempt, rank, Outcome(code, reason, -1))
        return code
    if rank == 0:
        with contextlib.suppress(OSError):  # a full disk: its node says how it went
            runs.write_outcome(run_dir, attempt, outcome)
    return 0  # torchrun takes any other code for a crash


def main(work: Work) -> int:
    """Run one rank: the program that launchers start."""
    parser = argparse.ArgumentParser(description=work.__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--attempt", type=int, required=True)
    arguments = parser.parse_args()
    return run(work, arguments.run_dir, arguments.attempt)
