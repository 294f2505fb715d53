"""Generate on Ray: each worker is a task that runs one rank; Ray places them as there is room.

Workers of a generation run are independent and take parts from the run folder, so one that dies is
started again alone, one for which there is no room yet is not waited for, and a part is lost with
its worker at most. Rank 0 makes the plan, and one file of all parts in the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_sft import batch_job, lease, node, parts, ray_cluster, roll_call, runs
from dist_sft.config import AnyRecipe, read_config_json
from dist_sft.errors import UserError
from dist_sft.preflight import machine_mistakes
from dist_sft.ray_wish import ask_to_stop, read_stop
from dist_sft.stopping import Relay

LOOK_SECONDS = 0.5
LEAVE_SECONDS = 30.0  # what workers get to see that the run is over
SLICE_SECONDS = 1.0  # between two looks of a worker at the wish to stop


def run(
    run_dir: Path,
    launch: runs.Launch,
    seen: lease.Lease | None,
    job: batch_job.Job | None,
    relay: Relay,
) -> runs.Outcome:
    """Answer all rows, or go on until a stop; return how it went. Raises UserError."""
    attempt = lease.claim(run_dir, seen)
    if job is not None:
        batch_job.write(run_dir, attempt, job)
    with lease.hold(run_dir, attempt) as lost:
        try:
            outcome = Workers(run_dir.absolute(), launch, attempt).follow(relay, lost)
        except UserError as error:
            runs.write_outcome(run_dir, attempt, runs.Outcome(runs.WRONG_INPUT, str(error), -1))
            raise
        if runs.read_outcome(run_dir, attempt) is None:
            runs.write_outcome(run_dir, attempt, outcome)
        if outcome.code == runs.FINISHED:
            parts.clean_up(run_dir)
    return outcome


class Workers:
    """The tasks of a run, by their ranks. One that runs has said in the run folder where."""

    def __init__(self, run_dir: Path, launch: runs.Launch, attempt: int) -> None:
        import ray

        self._run_dir, self._attempt, self._options = run_dir, attempt, launch.options
        self._folder = runs.attempt_dir(run_dir, attempt)
        self._ray, self._size = ray, launch.options["workers"]
        per_worker = dict(self._options["resources_per_worker"])
        self._task = ray.remote(work).options(
            num_cpus=per_worker.pop("CPU", 0),
            num_gpus=per_worker.pop("GPU", 0),
            resources=per_worker,
            max_retries=0,  # whether it is in vain is decided here
            scheduling_strategy="SPREAD",
        )
        self._ranks: dict[Any, int] = {}
        self._nodes: dict[Any, roll_call.Node] = {}
        """Where those are that run."""
        self._done, self._in_vain = len(parts.finished(run_dir)), Counter[int]()

    def follow(self, relay: Relay, lost: threading.Event) -> runs.Outcome:
        """Start the workers, and those that were lost again, until the run is over."""
        run_dir, attempt = self._run_dir, self._attempt
        ran_at, has_run, rest = time.monotonic(), False, list(range(1, self._size[1]))
        print(
            f"attempt {attempt}: starting workers: {self._size[1]}, logs: {self._folder}",
            flush=True,
        )
        self._start(0)
        try:
            while True:
                # Others would wait for what rank 0 prepares, and could take its place if it died.
                if rest and (self._folder / "data-0.json").exists():
                    for rank in rest:
                        self._start(rank)
                    rest = []
                ended, _ = self._ray.wait(list(self._ranks), timeout=LOOK_SECONDS)
                outcome = runs.read_outcome(run_dir, attempt)
                for ref in ended if outcome is None else ():
                    outcome = outcome or self._judge(self._ranks.pop(ref), ref)
                outcome = outcome or self._look() or self._asked(relay, lost)
                if outcome is not None:
                    return outcome
                if self._nodes:
                    ran_at, has_run = time.monotonic(), True
                elif time.monotonic() - ran_at > self._options["wait"]:
                    lacking = ray_cluster.too_busy(
                        self._size[0], self._options["resources_per_worker"]
                    )
                    if not has_run:
                        raise lacking
                    print(f"waiting to go on: {lacking}", file=sys.stderr, flush=True)
                    ran_at = time.monotonic()
        finally:
            if not (relay.leaves or lost.is_set()):
                self._leave()

    def _start(self, rank: int) -> None:
        options = self._options
        roll_call.node_file(self._folder, rank).unlink(missing_ok=True)  # of an earlier start
        told = (str(self._run_dir), self._attempt, rank, self._size[1], options["folder"])
        self._ranks[self._task.remote(*told, options["resources_per_worker"])] = rank

    def _look(self) -> runs.Outcome | None:
        """See which workers run, and write it down; return an outcome where they do not agree."""
        there, seen = set(os.listdir(self._folder)), {}
        for ref, rank in self._ranks.items():
            path = roll_call.node_file(self._folder, rank)
            if path.name in there:
                seen[ref] = self._nodes.get(ref) or roll_call.read(path)
        if seen.keys() == self._nodes.keys():
            return None
        self._nodes, found = seen, sorted(seen.values(), key=lambda one: one.rank)
        job = self._ray.get_runtime_context().get_job_id()
        hosts = {"job": job, "hosts": [one.host for one in found]}
        runs.write_atomically(self._folder / runs.PLACED, json.dumps(hosts) + "\n")
        problems = roll_call.compare(found)[0] if found else []
        if not problems:
            return None
        reason = "\n  ".join(["the workers cannot work together:", *problems])
        return runs.Outcome(runs.FAILED, reason, -1)

    def _judge(self, rank: int, ref: Any) -> runs.Outcome | None:
        """Return how the run ended where it ends with this worker; start another one otherwise."""
        try:
            code, words = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            code, words = runs.FAILED, f"its Ray worker failed: {' '.join(str(error).split())}"
        stops = read_stop(self._run_dir, self._attempt) or (self._run_dir / "STOP").exists()
        if code == 0 and (rank != 0 or stops):  # it has seen all parts finished, or a stop
            return runs.read_outcome(self._run_dir, self._attempt)
        if code == 0:
            outcome = runs.read_outcome(self._run_dir, self._attempt)
            return outcome or runs.Outcome(runs.FAILED, "rank 0 has ended without a word", -1)
        if code == runs.WRONG_INPUT:
            failed = runs.first_failure(self._run_dir, self._attempt)
            reason = failed[1].reason if failed and failed[1].code == code else words
            return runs.Outcome(runs.WRONG_INPUT, reason, -1)
        if stops:
            return None
        done = len(parts.finished(self._run_dir))
        if done > self._done:
            self._done = done
            self._in_vain.clear()
        self._in_vain[rank] += 1  # each for itself: a node takes many with it
        times = self._in_vain[rank]
        where = f"worker {rank}; its logs: {self._folder}"
        if times > self._options["restarts"]:
            reason = f"{words}\n{where}\ngave up: {times} times without a new part"
            return runs.Outcome(runs.FAILED, reason, -1)
        print(
            f"{words}\n{where}\nstarting it again ({times} of {self._options['restarts']} "
            "without a new part)",
            file=sys.stderr,
            flush=True,
        )
        self._start(rank)
        return None

    def _asked(self, relay: Relay, lost: threading.Event) -> runs.Outcome | None:
        """Pass a wish to stop on; return how it ended where nobody is left to hear it."""
        if lost.is_set():
            reason = f"another launcher has taken over {self._run_dir}"
            return runs.Outcome(runs.FAILED, reason, -1)
        by = "STOP file" if (self._run_dir / "STOP").exists() else None
        if relay.received is not None:
            by = f"signal {relay.received.name}"
            ask_to_stop(self._run_dir, self._attempt, by)
        if by and (relay.leaves or not self._nodes):
            reason = f"stopped by {by}; finished parts: {len(parts.finished(self._run_dir))}"
            return runs.Outcome(runs.STOPPED, reason, -1, asked_by=by)
        return None

    def _leave(self) -> None:
        """See the workers ended that run; Ray ends all others with this job."""
        running = [ref for ref in self._ranks if ref in self._nodes]
        if running:
            self._ray.wait(running, num_returns=len(running), timeout=LEAVE_SECONDS)


def work(
    run_dir: str,
    attempt: int,
    rank: int,
    workers: int,
    folder: str,
    reserved: ray_cluster.Resources,
) -> tuple[int, str]:
    """Run one rank to its end, in a Ray worker; return its exit code, and what it could not say.

    To the rank it is a node of its own: it looks for what is on its disk itself.
    """
    from dist_sft import ray_worker

    gpus = node.count_gpus() if reserved.get("GPU") else 0
    try:
        recipe, threads = introduce(Path(run_dir), attempt, rank, folder, reserved, gpus)
    except UserError as error:
        return runs.WRONG_INPUT, f"{socket.gethostname()}: {error}"
    if read_stop(Path(run_dir), attempt) or Path(run_dir, "STOP").exists():
        return 0, ""  # it had to wait for room
    place = {
        "RANK": rank,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": workers,
        "LOCAL_WORLD_SIZE": 1,
        "GROUP_RANK": rank,
        "GROUP_WORLD_SIZE": workers,
    }
    told_by = ray_worker.Work(run_dir, folder, bool(gpus))
    with ray_worker.started(told_by, recipe, attempt, place, threads, gpus) as (child, dog, told):
        with hearing(Path(run_dir), attempt, told):
            node.watch(child, dog, told, Path(run_dir), attempt, 1)
        code: int = child.returncode
        if code == 0 or (told.received and code < 0):
            return 0, ""
        return code, ray_worker.last_words(Path(run_dir), attempt, rank, code)


def introduce(
    run_dir: Path,
    attempt: int,
    rank: int,
    folder: str,
    reserved: ray_cluster.Resources,
    gpus: int,
) -> tuple[AnyRecipe, int]:
    """Tell the launcher where this worker runs; return the recipe, and the threads of its rank.

    Raises UserError where this node cannot do the work.
    """
    from dist_sft.ray_controller import SHARED, appears

    logs = runs.attempt_dir(run_dir, attempt)
    if not appears(logs):
        raise UserError(f"{logs} is not there: run_dir must be {SHARED}")
    if not Path(folder).is_dir():
        raise UserError(f"{folder}, where the run was launched, is not there")
    recipe = read_config_json(run_dir)
    problems = [*machine_mistakes(recipe, 1, gpus), *roll_call.too_full(run_dir, recipe)]
    if problems:
        raise UserError("\n".join(problems))
    threads = ray_cluster.threads_for(recipe.threads_per_worker, reserved)
    facts = roll_call.facts(recipe, threads)
    roll_call.write(logs, roll_call.Node(rank, socket.gethostname(), facts))
    return recipe, threads


@contextlib.contextmanager
def hearing(run_dir: Path, attempt: int, told: Any) -> Iterator[None]:
    """Tell a rank within a block when the launcher wants it to stop."""
    over = threading.Event()

    def listen() -> None:
        while not over.wait(SLICE_SECONDS):
            with contextlib.suppress(OSError):  # the file system may answer next time
                why = read_stop(run_dir, attempt)
                if why:
                    told.tell(why)

    thread = threading.Thread(target=listen, daemon=True, name="hearing")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
