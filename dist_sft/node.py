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
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from dist_sft import lease, parts, process, roll_call, runs
from dist_sft.config import read_config_json
from dist_sft.errors import UserError
from dist_sft.preflight import named_gpus
from dist_sft.stopping import Asked, Relay
from dist_sft.watchdog import FOLDER, Watchdog

OUTCOME_SECONDS = 3600  # what a node whose ranks have finished gives rank 0 to export the model
WATCH_SECONDS = 1.0  # between two looks at the ranks
WORDS_SECONDS = 5.0  # what node 0 gives others to say why they failed


@dataclass(frozen=True)
class Group:
    """Where this node stands among the nodes of a run."""

    nodes: int
    workers_per_node: int
    node_rank: int = 0
    address: tuple[str, int] | None = None
    """Host and port of the first node, where workers meet; None where it is the only one."""


def torchrun_command(run_dir: Path, job: str, attempt: int, group: Group) -> list[str]:
    """Return the command line that starts this node's ranks."""
    if group.address is None:
        rendezvous = ["--standalone"]
    else:
        rendezvous = [
            f"--nnodes={group.nodes}",
            f"--node-rank={group.node_rank}",
            f"--master-addr={group.address[0]}",
            f"--master-port={group.address[1]}",
        ]
    return [
        sys.executable,
        "-m",
        "dist_sft.deaf_torchrun",
        *rendezvous,
        f"--nproc-per-node={group.workers_per_node}",
        "--signals-to-handle=SIGPWR",  # nobody sends that, and there must be one
        "-m",
        f"dist_sft.{job}",
        str(run_dir),
        f"--attempt={attempt}",
    ]


def rank_command(run_dir: Path, job: str, attempt: int) -> list[str]:
    """Return the command line of a rank where torchrun does not start it."""
    return [sys.executable, "-m", f"dist_sft.{job}", str(run_dir), f"--attempt={attempt}"]


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
        # many gaps that memory grew step by step; and older glibc takes no higher threshold.
        environment |= {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**36)}
    return environment


def count_gpus() -> int:
    """Count this node's visible GPUs without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len(named_gpus(visible))
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


def group_from(
    environment: Mapping[str, str], launch: runs.Launch, nodes: int | None = None
) -> Group:
    """Read this node's place from NODE_RANK (or SLURM_NODEID), MASTER_ADDR and MASTER_PORT.

    `nodes` is how many there are, where that is not what the launch says. Raises UserError when a
    run on several nodes lacks a variable: there is no safe guess.
    """
    nodes = nodes or launch.nodes
    if nodes == 1:
        return Group(1, launch.workers_per_node)
    rank = "NODE_RANK" if environment.get("NODE_RANK") else "SLURM_NODEID"
    missing = [k for k in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(k)]
    if not environment.get(rank):
        missing.insert(0, "NODE_RANK")
    if missing:
        raise UserError(f"a run on {nodes} nodes needs {', '.join(missing)} on every node")
    return Group(
        nodes,
        launch.workers_per_node,
        _number(environment, rank, 0, nodes - 1),
        (environment["MASTER_ADDR"], _number(environment, "MASTER_PORT", 1, 65535)),
    )


def _number(environment: Mapping[str, str], name: str, low: int, high: int) -> int:
    text = environment[name]
    if not text.isdecimal() or not low <= int(text) <= high:
        raise UserError(f"{name}: got {text!r}; allowed: {low} to {high}")
    return int(text)


def run(run_dir: Path, attempt: int, nodes: int | None = None) -> int:
    """Run this node's ranks to their end and return the exit code of the contract."""
    recipe, launch = read_config_json(run_dir), runs.read_launch(run_dir)
    group = group_from(os.environ, launch, nodes)
    gpus = count_gpus()
    threads = threads_for(recipe.threads_per_worker, group.workers_per_node, gpus)
    log = runs.attempt_dir(run_dir, attempt) / f"torchrun-{group.node_rank}.log"
    owning = lease.hold(run_dir, attempt) if group.node_rank == 0 else contextlib.nullcontext()
    limits, workers = recipe.watchdog, group.nodes * group.workers_per_node
    with ExitStack() as stack:
        relay = stack.enter_context(Relay())
        lost = stack.enter_context(owning)
        if group.nodes > 1 or launch.launcher == "slurm":
            try:
                roll_call.take(
                    run_dir, attempt, recipe, group.node_rank, group.nodes, group.address,
                    workers=group.workers_per_node, gpus=gpus, threads=threads,
                )  # fmt: skip
            except roll_call.NotTogether as problem:
                return _end_before_start(run_dir, attempt, group, str(problem))
        errors = stack.enter_context(open(log, "w", encoding="utf-8"))
        hearts = Path(stack.enter_context(TemporaryDirectory(prefix="dist_sft-")))
        watchdog = Watchdog(hearts, limits.seconds, limits.slow_seconds)
        # However this ends: no rank stays behind, as when torchrun was killed.
        stack.callback(lambda: process.kill(watchdog.living()))
        relay.attach(hearts)
        if group.node_rank == 0:
            print(f"attempt {attempt}: starting workers: {workers}, logs: {log.parent}", flush=True)
        # Its own session: a Ctrl-C in the terminal reaches this process, which passes it on once.
        child = subprocess.Popen(
            torchrun_command(run_dir, recipe.job, attempt, group),
            env=os.environ | rank_environment(threads, gpus) | {FOLDER: str(hearts)},
            stderr=errors,
            start_new_session=True,
        )
        watch(child, watchdog, relay, run_dir, attempt, group.workers_per_node, lost)
        ended = _Ended(child.returncode, log, group)
        if relay.received is None:
            ended.report_a_killed_rank(run_dir, attempt)
        outcome = _await_outcome(run_dir, attempt, ended, relay)
        if outcome is None:
            outcome = reconstruct(run_dir, attempt, ended, relay)
            if group.node_rank == 0:
                with contextlib.suppress(OSError):  # a full disk: the exit code still says it
                    runs.write_outcome(run_dir, attempt, outcome)
            elif outcome.code != runs.STOPPED:
                ended.report_silence(run_dir, attempt, outcome)
    if outcome.code == runs.FINISHED and group.nodes == 1:
        parts.clean_up(run_dir)
    if outcome.code != runs.FINISHED:
        print(outcome.reason, file=sys.stderr)
    if outcome.code == runs.STOPPED:
        print("the same command continues the run", file=sys.stderr)
    return outcome.code


def _end_before_start(run_dir: Path, attempt: int, group: Group, reason: str) -> int:
    if group.node_rank == 0:
        runs.write_outcome(run_dir, attempt, runs.Outcome(runs.FAILED, reason, -1))
    print(reason, file=sys.stderr)
    return runs.FAILED


def watch(
    child: subprocess.Popen[bytes],
    watchdog: Watchdog,
    relay: Asked,
    run_dir: Path,
    attempt: int,
    ranks: int,
    lost: threading.Event | None = None,
) -> None:
    """Wait until a rank, or torchrun, has ended; end it where a rank hangs, and write down which.

    End it, too, where somebody asks to stop before there is anything to save, or where the run is
    `lost` to another launcher: what these ranks compute counts for nothing any more.
    """
    while True:
        try:
            child.wait(timeout=WATCH_SECONDS)
            return
        except subprocess.TimeoutExpired:
            stuck = watchdog.look()
        taken = lost is not None and lost.is_set()
        early = relay.received is not None and watchdog.is_early(ranks)
        with contextlib.suppress(OSError):  # a full disk must not keep them alive
            if stuck:
                outcome = runs.Outcome(runs.FAILED, str(stuck), -1)
                runs.write_failure(run_dir, attempt, stuck.rank, outcome, killed=True)
            elif taken:
                reason = f"another launcher has taken over {run_dir}: this attempt ended unsaved"
                runs.write_outcome(run_dir, attempt, runs.Outcome(runs.FAILED, reason, -1))
        if stuck:
            watchdog.dump()
        if stuck or taken or early or relay.leaves:
            kill(child)


def kill(child: subprocess.Popen[bytes]) -> None:
    """End torchrun and its ranks, which are in sessions of their own, and see them ended."""
    with contextlib.suppress(psutil.NoSuchProcess):  # it may have ended in this moment
        child.send_signal(signal.SIGSTOP)  # from now on it starts no other
        processes = psutil.Process(child.pid).children(recursive=True)
        child.kill()
        process.kill(one.pid for one in processes)


def _await_outcome(run_dir: Path, attempt: int, ended: _Ended, relay: Relay) -> runs.Outcome | None:
    """Return what rank 0 wrote, or node 0 in its place; None where nobody did in time.

    Rank 0 exports the model, or writes why the run stopped, after the ranks of other nodes have
    ended; and these say why they failed after rank 0 has lost them. Another signal ends the wait.
    """
    in_order = ended.returncode == 0 or relay.received is not None
    if ended.group.node_rank == 0:
        patience = 0.0 if in_order or ended.group.nodes == 1 else WORDS_SECONDS
    else:
        patience = OUTCOME_SECONDS if in_order else 2 * WORDS_SECONDS
    signals, deadline = relay.signals, time.monotonic() + patience
    while (outcome := runs.read_outcome(run_dir, attempt)) is None:
        if time.monotonic() >= deadline or relay.signals > signals or relay.leaves:
            return None
        time.sleep(0.2)
    return outcome


def reconstruct(run_dir: Path, attempt: int, ended: _Ended, relay: Relay) -> runs.Outcome:
    """Say how an attempt ended that its rank 0 did not bring to an end.

    torchrun turns every failing rank's code into 1, so what the ranks wrote down decides; where
    they wrote nothing, the signal that this node passed on, or what torchrun logged.
    """
    if relay.leaves:
        reason = "left at once, at a second signal: nothing was saved, older checkpoints are whole"
        return runs.Outcome(runs.STOPPED, reason, -1)
    blamed = blame(run_dir, attempt)
    if blamed is not None:
        return blamed
    if relay.received is not None:
        name = relay.received.name
        reason = f"stopped by signal {name} before the workers had anything to save"
        return runs.Outcome(runs.STOPPED, reason, -1, asked_by=f"signal {name}")
    if ended.returncode == 0 and ended.group.node_rank != 0:
        reason = "this node's workers have finished, but rank 0 on node 0 has not said how it went"
        return runs.Outcome(runs.FAILED, reason, -1)
    return runs.Outcome(runs.FAILED, ended.last_words(), -1)


def blame(run_dir: Path, attempt: int) -> runs.Outcome | None:
    """Return how an attempt failed, by the rank that did first; None where none wrote it down."""
    failure = runs.first_failure(run_dir, attempt)
    if failure is None:
        return None
    rank, outcome = failure
    if outcome.code == runs.WRONG_INPUT:
        return outcome
    where = runs.attempt_dir(run_dir, attempt) / f"rank-{rank}.log"
    return replace(outcome, reason=f"{outcome.reason}\nrank {rank} failed first; its log: {where}")


@dataclass(frozen=True)
class _Ended:
    """What is left of this node's torchrun."""

    returncode: int
    log: Path
    group: Group

    def report_a_killed_rank(self, run_dir: Path, attempt: int) -> None:
        """Write down in its place that a rank was killed, unless it still could itself.

        The others only know that they lost it. SIGABRT is not among it: libraries abort ranks that
        lost another one.
        """
        verdict = self._verdict()
        if verdict is None:
            return
        code, rank = int(verdict[1]), self._first_rank + int(verdict[2])
        if code < 0 and code != -signal.SIGABRT and not runs.has_failed(run_dir, attempt, rank):
            outcome = runs.Outcome(runs.FAILED, explain_exit(code), -1)
            runs.write_failure(run_dir, attempt, rank, outcome, killed=True)

    def report_silence(self, run_dir: Path, attempt: int, outcome: runs.Outcome) -> None:
        """Write down for other nodes, which may wait for this one, that its ranks have ended."""
        if runs.first_failure(run_dir, attempt) is None:
            runs.write_failure(run_dir, attempt, self._first_rank, outcome)

    def last_words(self) -> str:
        """Tell what is known about workers that wrote down nothing."""
        text, verdict = self._text(), self._verdict()
        told, what = text, f"torchrun ended with {self.returncode}"
        if verdict is not None:
            told = text[: verdict.start()]
            what = f"worker {verdict[2]}: {explain_exit(int(verdict[1]))}"
        lines = [f"{what}; nobody said why. Logs: {self.log.parent}", *told.splitlines()[-15:]]
        return "\n".join(lines)

    @property
    def _first_rank(self) -> int:
        return self.group.node_rank * self.group.workers_per_node

    def _text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def _verdict(self) -> re.Match[str] | None:
        """Find what torchrun logged of the rank that ended first: its exit code and local rank."""
        form = r"^.* failed \(exitcode: (-?\d+)\) local_rank: (\d+)"
        return re.search(form, self._text(), re.MULTILINE)


def explain_exit(code: int) -> str:
    """Say how a rank ended, by the exit code that its parent got."""
    if code >= 0:
        return f"ended with {code}"
    what = f"ended by {signal.Signals(-code).name}"
    if code == -signal.SIGKILL:
        what += (
            ", killed from outside: by a person, or by the kernel because the machine ran out of "
            "memory (see `dmesg`): then try fewer workers; a smaller train.tokens_per_micro_batch, "
            "or deepspeed: zero3; for generation a smaller generate.batch_tokens"
        )
    return what


def main() -> int:
    """Run the ranks of one node: what launchers start on every node."""
    parser = argparse.ArgumentParser(prog="python -m dist_sft.node", description=main.__doc__)
    parser.add_argument("run_dir", type=Path, help="a run folder that a launcher wrote")
    parser.add_argument("--attempt", type=int, help="number of the attempt; by default a new one")
    parser.add_argument("--nodes", type=int, help="how many there are; by default as launched")
    parser.add_argument("--claim", action="store_true", help="claim an attempt, print its number")
    arguments = parser.parse_args()
    run_dir: Path = arguments.run_dir
    try:
        attempt = arguments.attempt
        nodes = arguments.nodes or runs.read_launch(run_dir).nodes
        if attempt is None and nodes > 1 and not arguments.claim:
            raise UserError(
                f"a run on {nodes} nodes needs --attempt, the same number on each; "
                f"`python -m dist_sft.node {run_dir} --claim` on one of them prints it"
            )
        if attempt is None:
            seen = lease.wait_until_free(run_dir)
            if not arguments.claim:  # a scheduler may claim, and must not undo a person's stop
                (run_dir / "STOP").unlink(missing_ok=True)
            attempt = lease.claim(run_dir, seen)
        if arguments.claim:
            print(attempt)
            return runs.FINISHED
        if not runs.attempt_dir(run_dir, attempt).is_dir():
            raise UserError(f"--attempt: {attempt} was not claimed; --claim prints one that is")
        if runs.read_outcome(run_dir, attempt) is not None:
            raise UserError(f"--attempt: {attempt} is over; claim another one with --claim")
        return run(run_dir, attempt, arguments.nodes)
    except UserError as error:
        print(error, file=sys.stderr)
        return runs.WRONG_INPUT


if __name__ == "__main__":
    sys.exit(main())
