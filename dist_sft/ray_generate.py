"""Generate on Ray: each worker is a task that runs one rank; Ray places them as there is room.

Workers of a generation run are independent and take parts from the run folder, so one that dies is
started again alone, one for which there is no room yet is not waited for, and a part is lost with
its worker at most. Rank 0 makes the plan, and one file of all parts in the end.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_sft import batch_job, lease, node, parts, ray_cluster, runs
from dist_sft.config import read_config_json
from dist_sft.errors import UserError
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
    return outcome


class Workers:
    """The tasks of a run, by their ranks."""

    def __init__(self, run_dir: Path, launch: runs.Launch, attempt: int) -> None:
        import ray

        self._run_dir, self._attempt, self._options = run_dir, attempt, launch.options
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
        self._done, self._in_vain = len(parts.finished(run_dir)), 0

    def follow(self, relay: Relay, lost: threading.Event) -> runs.Outcome:
        """Start the workers, and those that were lost again, until the run is over."""
        run_dir, attempt = self._run_dir, self._attempt
        began, rest = time.monotonic(), list(range(1, self._size[1]))
        print(
            f"attempt {attempt}: starting workers: {self._size[1]}, logs: "
            f"{runs.attempt_dir(run_dir, attempt)}",
            flush=True,
        )
        self._start(0)
        try:
            while True:
                if rest and self._log(0).exists():  # others would wait for it in vain
                    for rank in rest:
                        self._start(rank)
                    rest = []
                ended, _ = self._ray.wait(list(self._ranks), timeout=LOOK_SECONDS)
                outcome = runs.read_outcome(run_dir, attempt)
                for ref in ended if outcome is None else ():
                    outcome = outcome or self._judge(self._ranks.pop(ref), ref)
                if outcome is None:
                    outcome = self._asked(relay, lost)
                if outcome is not None:
                    return outcome
                if not self._has_begun() and time.monotonic() - began > self._options["wait"]:
                    raise ray_cluster.too_busy(self._size[0], self._options["resources_per_worker"])
        finally:
            if not (relay.leaves or lost.is_set()):
                self._leave()

    def _start(self, rank: int) -> None:
        options = self._options
        gpus = bool(options["resources_per_worker"].get("GPU"))
        told = (str(self._run_dir), self._attempt, rank, self._size[1], options["folder"], gpus)
        self._ranks[self._task.remote(*told)] = rank

    def _has_begun(self) -> bool:
        return self._log(0).exists()

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
        failed = runs.first_failure(self._run_dir, self._attempt)
        if code == runs.WRONG_INPUT:
            reason = failed[1].reason if failed else words
            return runs.Outcome(runs.WRONG_INPUT, reason, -1)
        if stops:
            return None
        done = len(parts.finished(self._run_dir))
        self._in_vain = 1 if done > self._done else self._in_vain + 1
        self._done = done
        where = f"worker {rank}; its logs: {runs.attempt_dir(self._run_dir, self._attempt)}"
        if self._in_vain > self._options["restarts"]:
            return runs.Outcome(
                runs.FAILED, f"{words}\n{where}\ngave up: {self._in_vain} without a new part", -1
            )
        print(
            f"{words}\n{where}\nstarting it again ({self._in_vain} of {self._options['restarts']} "
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
        if by and (relay.leaves or 0 not in self._ranks.values() or not self._has_begun()):
            reason = f"stopped by {by}; finished parts: {len(parts.finished(self._run_dir))}"
            return runs.Outcome(runs.STOPPED, reason, -1, asked_by=by)
        return None

    def _leave(self) -> None:
        """See the workers ended that have begun; Ray ends all others with this job."""
        begun = [ref for ref, rank in self._ranks.items() if self._log(rank).exists()]
        if begun:
            self._ray.wait(begun, num_returns=len(begun), timeout=LEAVE_SECONDS)

    def _log(self, rank: int) -> Path:
        return runs.attempt_dir(self._run_dir, self._attempt) / f"worker-{rank}.log"


def work(
    run_dir: str, attempt: int, rank: int, workers: int, folder: str, takes_gpus: bool
) -> tuple[int, str]:
    """Run one rank to its end, in a Ray worker; return its exit code, and what it could not say.

    To the rank it is a node of its own: it looks for what is on its disk itself.
    """
    from dist_sft import ray_worker

    recipe, gpus = read_config_json(Path(run_dir)), node.count_gpus() if takes_gpus else 0
    threads = node.threads_for(recipe.threads_per_worker, 1, gpus)
    place = {
        "RANK": rank,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": workers,
        "LOCAL_WORLD_SIZE": 1,
        "GROUP_RANK": rank,
        "GROUP_WORLD_SIZE": workers,
    }
    told_by = ray_worker.Work(run_dir, folder, takes_gpus)
    with ray_worker.started(told_by, recipe, attempt, place, threads, gpus) as (child, dog, told):
        with hearing(Path(run_dir), attempt, told):
            node.watch(child, dog, told, Path(run_dir), attempt, 1)
        code: int = child.returncode
        if code == 0 or (told.received and code < 0):
            return 0, ""
        return code, ray_worker.last_words(Path(run_dir), attempt, rank, code)


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
