"""Run this node's ranks: build torchrun's command as pure data, start it, watch it, report.

Every launcher ends here, once per node: `python -m dist_sft.node RUN_DIR`. Several nodes are
described by the variables NODE_RANK, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dist_sft import lease, runs
from dist_sft.config import read_config_json
from dist_sft.errors import UserError
from dist_sft.stopping import Relay

SHUTDOWN_SECONDS = 300  # what torchrun gives ranks to checkpoint after TERM; its default is 30
OUTCOME_SECONDS = 3600  # what a node whose ranks have finished gives rank 0 to export the model


@dataclass(frozen=True)
class Group:
    """Where this node stands among the nodes of a run."""

    nodes: int
    workers_per_node: int
    node_rank: int = 0
    head: str | None = None
    port: int | None = None


def torchrun_command(run_dir: Path, job: str, attempt: int, group: Group) -> list[str]:
    """Return the command line that starts this node's ranks."""
    if group.nodes == 1:
        rendezvous = ["--standalone"]
    else:
        rendezvous = [
            f"--nnodes={group.nodes}",
            f"--node-rank={group.node_rank}",
            f"--master-addr={group.head}",
            f"--master-port={group.port}",
        ]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *rendezvous,
        f"--nproc-per-node={group.workers_per_node}",
        # torchrun dies of USR1 unless told otherwise, and kills 30 seconds after TERM.
        "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1,SIGHUP,SIGQUIT",
        f"--shutdown-timeout={SHUTDOWN_SECONDS}",
        "-m",
        f"dist_sft.{job}",
        str(run_dir),
        f"--attempt={attempt}",
    ]


def rank_environment(threads: int, gpus: int) -> dict[str, str]:
    """Return the variables that every rank needs."""
    environment = {
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(threads),
    }
    if not gpus:
        # glibc returns large tensors to the kernel when they are freed, and a CPU step spends its
        # time on page faults for the next ones. The largest do go back: kept, too, they left so
        # many gaps that memory grew step by step.
        environment |= {"MALLOC_MMAP_THRESHOLD_": str(2**28), "MALLOC_TRIM_THRESHOLD_": str(2**36)}
    return environment


def count_gpus() -> int:
    """Count this node's visible GPUs without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def threads_for(setting: int | str, workers_per_node: int, gpus: int) -> int:
    """Resolve `threads_per_worker`: auto is 1 on CPU, a fair share of the cores beside GPUs."""
    if isinstance(setting, int):
        return setting
    return max(1, (os.cpu_count() or 1) // workers_per_node) if gpus else 1


def group_from(environment: Mapping[str, str], launch: runs.Launch) -> Group:
    """Read this node's place from NODE_RANK, MASTER_ADDR and MASTER_PORT.

    Raises UserError when a run on several nodes lacks one: there is no safe guess.
    """
    if launch.nodes == 1:
        return Group(1, launch.workers_per_node)
    missing = [k for k in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(k)]
    if missing:
        raise UserError(f"a run on {launch.nodes} nodes needs {', '.join(missing)} on every node")
    return Group(
        launch.nodes,
        launch.workers_per_node,
        _number(environment, "NODE_RANK", 0, launch.nodes - 1),
        environment["MASTER_ADDR"],
        _number(environment, "MASTER_PORT", 1, 65535),
    )


def _number(environment: Mapping[str, str], name: str, low: int, high: int) -> int:
    text = environment[name]
    if not text.isdecimal() or not low <= int(text) <= high:
        raise UserError(f"{name}: got {text!r}; allowed: {low} to {high}")
    return int(text)


def run(run_dir: Path, attempt: int) -> int:
    """Run this node's ranks to their end and return the exit code of the contract."""
    recipe, launch = read_config_json(run_dir), runs.read_launch(run_dir)
    group = group_from(os.environ, launch)
    gpus = count_gpus()
    threads = threads_for(recipe.threads_per_worker, group.workers_per_node, gpus)
    log = runs.attempt_dir(run_dir, attempt) / f"torchrun-{group.node_rank}.log"
    owning = lease.hold(run_dir, attempt) if group.node_rank == 0 else contextlib.nullcontext()
    with Relay() as relay, owning, open(log, "w", encoding="utf-8") as errors:
        # Its own session: a Ctrl-C in the terminal reaches this process, which passes it on once.
        child = subprocess.Popen(
            torchrun_command(run_dir, recipe.job, attempt, group),
            env=os.environ | rank_environment(threads, gpus),
            stderr=errors,
            start_new_session=True,
        )
        relay.attach(child)
        child.wait()
        if child.returncode == 0 and group.node_rank != 0:
            _wait_for_outcome(run_dir, attempt, relay)
    outcome = runs.read_outcome(run_dir, attempt)
    if outcome is None:
        outcome = reconstruct(run_dir, attempt, child.returncode, log, relay.received)
        if group.node_rank == 0:
            runs.write_outcome(run_dir, attempt, outcome)
        elif runs.first_failure(run_dir, attempt) is None:
            # No rank here could say anything; ranks on other nodes may be waiting for this one's.
            first_rank = group.node_rank * group.workers_per_node
            runs.write_failure(run_dir, attempt, first_rank, outcome)
    if outcome.code != runs.FINISHED:
        print(outcome.reason, file=sys.stderr)
    if outcome.code == runs.STOPPED:
        print("the same command continues the run", file=sys.stderr)
    return outcome.code


def _wait_for_outcome(run_dir: Path, attempt: int, relay: Relay) -> None:
    """Wait for what rank 0 says: it exports the model after all other ranks have ended.

    Another signal ends the waiting.
    """
    told, deadline = relay.received, time.monotonic() + OUTCOME_SECONDS
    while runs.read_outcome(run_dir, attempt) is None and relay.received is told:
        if time.monotonic() > deadline or runs.first_failure(run_dir, attempt):
            return
        time.sleep(0.5)


def reconstruct(
    run_dir: Path, attempt: int, returncode: int, log: Path, received: signal.Signals | None
) -> runs.Outcome:
    """Say how an attempt ended that its rank 0 did not bring to an end.

    torchrun turns every failing rank's code into 1, so what the ranks wrote down decides, unless
    one was killed: then the others only wrote that they lost it. Where nobody wrote anything, the
    signal that this node passed on decides, or what torchrun logged.
    """
    failure = runs.first_failure(run_dir, attempt)
    if failure is not None and failure[1].code == runs.WRONG_INPUT:
        return failure[1]
    if received is None and _was_killed(log):
        return runs.Outcome(runs.FAILED, _last_words(log, returncode), -1)
    if failure is not None:
        rank, outcome = failure
        where = runs.attempt_dir(run_dir, attempt) / f"rank-{rank}.log"
        reason = f"{outcome.reason}\nrank {rank} failed first; its log: {where}"
        return replace(outcome, reason=reason)
    if received is not None:
        reason = f"stopped by signal {received.name} before the workers could write a checkpoint"
        return runs.Outcome(runs.STOPPED, reason, -1)
    return runs.Outcome(runs.FAILED, _last_words(log, returncode), -1)


def _verdict(text: str) -> re.Match[str] | None:
    """Find what torchrun logged of the rank that ended first: its exit code and local rank."""
    return re.search(r"^.* failed \(exitcode: (-?\d+)\) local_rank: (\d+)", text, re.MULTILINE)


def _was_killed(log: Path) -> bool:
    verdict = _verdict(log.read_text(encoding="utf-8", errors="replace"))
    return verdict is not None and int(verdict[1]) < 0


def _last_words(log: Path, returncode: int) -> str:
    """Tell what is known about workers that wrote down nothing."""
    text = log.read_text(encoding="utf-8", errors="replace")
    verdict = _verdict(text)
    if verdict is None:
        told, what = text, f"torchrun ended with {returncode}"
    else:
        told, what = text[: verdict.start()], f"worker {verdict[2]} ended with {verdict[1]}"
        if int(verdict[1]) == -signal.SIGKILL:
            what += (
                ", killed from outside: mostly by the kernel because the machine ran out of memory "
                "(see `dmesg`). Try fewer workers, a smaller train.tokens_per_micro_batch, or "
                "deepspeed: zero3"
            )
    lines = [f"{what}; nobody said why. Logs: {log.parent}", *told.splitlines()[-15:]]
    return "\n".join(lines)


def main() -> int:
    """Run the ranks of one node: what launchers start on every node."""
    parser = argparse.ArgumentParser(prog="python -m dist_sft.node", description=main.__doc__)
    parser.add_argument("run_dir", type=Path, help="a run folder that a launcher wrote")
    parser.add_argument("--attempt", type=int, help="number of the attempt; by default the next")
    arguments = parser.parse_args()
    try:
        attempt, nodes = arguments.attempt, runs.read_launch(arguments.run_dir).nodes
        if attempt is None and nodes > 1:
            raise UserError(f"a run on {nodes} nodes needs --attempt, the same number on each")
        if int(os.environ.get("NODE_RANK") or 0) == 0:
            lease.wait_until_free(arguments.run_dir)
        if attempt is None:
            attempt = runs.start_attempt(arguments.run_dir)
        return run(arguments.run_dir, attempt)
    except UserError as error:
        print(error, file=sys.stderr)
        return runs.WRONG_INPUT


if __name__ == "__main__":
    sys.exit(main())
