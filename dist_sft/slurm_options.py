"""The command line of the SLURM launcher: which words are its own, and which are for sbatch.

Reads words and nothing else. What is done with them, `slurm` says.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from dist_sft import launching
from dist_sft.batch_job import DEFAULT_RESTARTS
from dist_sft.errors import UserError

LEAD_SECONDS = 300
FLAGS = ("-H", "--hold", "--contiguous", "--exclusive", "--get-user-env", "--ignore-pbs", "--nice",
         "-O", "--overcommit", "-s", "--oversubscribe", "-Q", "--quiet", "--reboot",
         "--spread-job", "--stepmgr", "--use-min-nodes", "-v", "--verbose")  # fmt: skip
"""sbatch's options that take no value, or only one behind `=`; all others take one."""
NOT_PASSED_ON = {
    "--ntasks": "--workers-per-node",
    "-n": "--workers-per-node",
    "--ntasks-per-node": "--workers-per-node",
    "--ntasks-per-gpu": "--workers-per-node",
    "--gpus-per-task": "--gpus-per-node",
    "--tres-per-task": "--gpus-per-node",
    "--array": "--sweep",
    "-a": "--sweep",
    "-N": "--nodes",
    "--signal": "--lead",
    "--wrap": "the recipe",
    "--dependency": "--chain",
    "-d": "--chain",
    "--requeue": "--restarts",
    "--no-requeue": "--no-put-back",
    "--test-only": "--dry-run",
    "--chdir": "cd before you launch",
    "-D": "cd before you launch",
    "--output": "run_dir, which has the logs",
    "-o": "run_dir, which has the logs",
    "--open-mode": None,
    "--clusters": "a login node of that cluster",
    "-M": "a login node of that cluster",
    "--no-kill": "--nodes MIN-MAX",
    "-k": "--nodes MIN-MAX",
    "--parsable": None,
    "--wait": None,
    "-W": None,
}
"""Options of sbatch that the launcher sets itself, and what to give it instead."""
CPUS = ("--exclusive", "--cpus-per-task", "-c", "--cpus-per-gpu", "--oversubscribe", "-s")
GPUS = ("--gpus", "-G", "--gpus-per-node", "--gpus-per-socket", "--gres", "--tres-per-node")

MEANT = 0.85
"""How similar an option must be to one of the launcher's; --sockets-per-node, sbatch's, is 0.83."""


def parser() -> argparse.ArgumentParser:
    """Return the command line of the SLURM launcher."""
    result = argparse.ArgumentParser(
        prog="launch/slurm.py",
        description="Submit a recipe to SLURM. The same command again continues the run. Options "
        "that are not listed here go to sbatch: --partition a100 --time 12:00:00.",
        epilog="launch/slurm.py cancel RUN_DIR: save and end its job. launch/slurm.py resume "
        "RUN_DIR: submit it again as it was.",
    )
    launching.add_arguments(result)
    result.add_argument("--nodes", required=True, metavar="N|MIN-MAX", help="how many nodes")
    result.add_argument(
        "--workers-per-node", required=True, type=int, metavar="N", help="one per GPU"
    )
    result.add_argument(
        "--restarts",
        type=int,
        default=DEFAULT_RESTARTS,
        metavar="N",
        help="put the job back after a crash, at most N times without a new checkpoint or part "
        f"(default {DEFAULT_RESTARTS})",
    )
    result.add_argument(
        "--lead",
        type=int,
        default=LEAD_SECONDS,
        metavar="SECONDS",
        help="how long before the time limit to save and be put back in the queue "
        f"(default {LEAD_SECONDS})",
    )
    result.add_argument("--site", type=Path, metavar="FILE", help="in place of slurm/site.sh")
    result.add_argument(
        "--no-put-back",
        action="store_true",
        help="never requeue: for sites that forbid it; see --chain",
    )
    result.add_argument(
        "--chain", type=int, default=1, metavar="N", help="N jobs, each after the one before"
    )
    result.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=A,B,...",
        help="a job array with a run folder for each value; several make all combinations",
    )
    result.add_argument(
        "--exclude-bad-nodes",
        action="store_true",
        help="do without nodes that the roll call at the start of a job has blamed",
    )
    return result


def split(given: Sequence[str], ours: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """Part the launcher's arguments from sbatch's options.

    Raises UserError for those of sbatch that the launcher sets itself, and for what is nearly one
    of the launcher's.
    """
    known = {name: action for action in ours._actions for name in action.option_strings}
    mine, theirs = list[str](), list[str]()
    rest = iter(given)
    for word in rest:
        name = name_of(word)
        has_value = name != word
        refused = next((full for full in NOT_PASSED_ON if _is_short_for(name, full)), None)
        if refused:
            instead = NOT_PASSED_ON[refused]
            raise UserError(
                f"{name}: this option of sbatch is set by dist_sft"
                + (f"; use {instead}" if instead else "")
            )
        if not word.startswith("-") or name in known:
            mine.append(word)
            if name in known and not has_value and known[name].nargs != 0:
                mine += itertools.islice(rest, 1)
            continue
        meant = get_close_matches(name, known, n=1, cutoff=MEANT)
        if meant:
            raise UserError(f"{name}: no option of launch/slurm.py; did you mean {meant[0]}?")
        theirs.append(word)
        if not has_value and name not in FLAGS:
            theirs += itertools.islice(rest, 1)
    return mine, theirs


def _is_short_for(name: str, full: str) -> bool:
    """Tell whether sbatch would take `name` for that option: it may be cut where it is unique."""
    return name == full or (len(name) > 3 and name.startswith("--") and full.startswith(name))


def nodes_of(text: str) -> tuple[int, int]:
    """Return the least and the largest number of nodes; raises UserError."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise UserError(f"--nodes: got {text}; allowed: N, or MIN-MAX with MIN up to MAX")
    return low, high


def refuse_a_short_time(lead: int, sbatch: list[str]) -> None:
    """Raise UserError where a job would hear at its start that its time is nearly up."""
    words = [word for given in sbatch for word in given.split("=", 1)]
    after = [b for a, b in itertools.pairwise(words) if a in ("--time", "-t")]
    limit = seconds_of(after[-1]) if after else None
    if limit is not None and limit <= lead:
        raise UserError(
            f"--time: {after[-1]} leaves no time to work: {lead} to {lead + 60} s before its end "
            "(--lead) a job saves and is put back; allowed: a longer --time, or a shorter --lead"
        )


def seconds_of(time_limit: str) -> int | None:
    """Return the seconds of one of sbatch's forms of a time: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    days, dash, rest = time_limit.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdecimal() for part in (*parts, days or "0")) or len(parts) > 3:
        return None
    numbers = [int(part) for part in parts]
    units = [3600, 60, 1] if dash or len(parts) == 3 else [60, 1]
    return int(days or 0) * 86400 + sum(n * u for n, u in zip(numbers, units, strict=False))


def name_of(word: str) -> str:
    """Return the option in a word, without the value in it: -n8, --nodes=8."""
    return word[:2] if re.match(r"-\w", word) else word.partition("=")[0]
