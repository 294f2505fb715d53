"""What Ray Train's controller does for a run: claim attempts, own the run, end it when in vain.

The controller is an actor on the launcher's node. Ray calls the backend whenever it has placed
workers and before it ends them, the callback when a worker fails.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray.train
import ray.util
from ray.exceptions import RayActorError
from ray.train import UserCallback
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback

from dist_sft import batch_job, lease, manifest, node, roll_call, runs
from dist_sft.config import read_config_json
from dist_sft.preflight import machine_mistakes
from dist_sft.ray_wish import ask_to_stop
from dist_sft.ray_worker import ATTEMPT, GOES_ON, NODES, RESIZE, Moved, Work

FILE = "ray.json"
SEES_SECONDS = 20.0  # what a shared file system gets to show a new file
LOOK_SECONDS = 0.2
LEAVE_SECONDS = 15.0  # what workers get to tidy up, before Ray kills them


class GaveUp(RuntimeError):
    """End the run: after an error of a worker, Ray would start it again."""


@dataclass
class RunConfig(BackendConfig):  # type: ignore[misc]
    """Plain values for the backend; Ray sends them to the controller."""

    work: Work
    restarts: int
    seen: lease.Lease | None
    """The lease that the launcher found."""
    job: batch_job.Job | None = None
    """The SLURM job in which Ray runs for this run, of `slurm/ray.sbatch`."""
    backend: str = "the ranks' own"
    """TorchTrainer writes one into a configuration that has none."""

    @property
    def backend_cls(self) -> type[Backend]:
        return RunBackend


class Run:
    """The run that this process owns: what backend and callback share, which Ray makes apart.

    It owns the run from its first attempt to its last, also while there is no room for workers.
    """

    def __init__(
        self,
        run_dir: Path,
        restarts: int,
        seen: lease.Lease | None,
        job: batch_job.Job | None = None,
    ) -> None:
        self.run_dir = run_dir
        self.attempt = -1
        self._restarts, self._seen, self._job = restarts, seen, job
        self._newest = max(manifest.folders(run_dir), default=0)
        self._in_vain = 0
        self._held = ExitStack()
        self._goes_on = False

    def begin(self) -> int:
        """Claim the next attempt; return its number. Raises UserError where somebody else owns."""
        self.release()
        self.attempt, self._seen = lease.claim(self.run_dir, self._seen), None
        self._held.enter_context(lease.hold(self.run_dir, self.attempt))
        self._goes_on = False
        if self._job is not None:
            batch_job.write(self.run_dir, self.attempt, self._job)
        return self.attempt

    def release(self) -> None:
        """Own the run no longer."""
        self._held.close()

    def end(self) -> None:
        """End an attempt: own the run no longer, unless there will be another attempt."""
        outcome = runs.read_outcome(self.run_dir, self.attempt)
        moves = outcome and outcome.code == runs.STOPPED and outcome.asked_by in GOES_ON
        if not (moves or self._goes_on):
            self.release()

    def lose(self, error: BaseException) -> None:
        """Count a start of workers that failed before their ranks began, as an attempt in vain.

        Raises GaveUp where there were too many.
        """
        if self.attempt < 0 or runs.read_outcome(self.run_dir, self.attempt) is not None:
            self.begin()  # workers died before the backend was told of them
        reason = f"a worker was lost before its rank began: {one_line(error)}"
        runs.write_outcome(self.run_dir, self.attempt, runs.Outcome(runs.FAILED, reason, -1))
        try:
            self.judge({})
        finally:
            self.end()

    def judge(self, worker_exceptions: Mapping[int, Exception]) -> None:
        """Write down why an attempt failed; raise GaveUp where another one would be in vain.

        Ray asks at every look at its workers until they have ended: only the first time counts.
        """
        run_dir, attempt = self.run_dir, self.attempt
        if self._goes_on:
            return
        outcome, errors = runs.read_outcome(run_dir, attempt), worker_exceptions.values()
        if outcome is None and all(isinstance(error, Moved) for error in errors):
            appears(runs.outcome_file(run_dir, attempt))  # rank 0 has written it, maybe elsewhere
            outcome = runs.read_outcome(run_dir, attempt)
        if outcome is None:
            outcome = explain(run_dir, attempt, worker_exceptions)
            runs.write_outcome(run_dir, attempt, outcome)
        moved = any(isinstance(error, Moved) for error in errors)
        if outcome.code == runs.STOPPED and (moved or outcome.asked_by in GOES_ON):
            self._goes_on = True
            return
        if outcome.code != runs.FAILED:
            raise GaveUp(outcome.reason)
        if max(runs.attempts(run_dir)) > attempt:
            raise GaveUp(f"another launcher has taken over {run_dir}")
        newest = max(manifest.folders(run_dir), default=0)
        self._in_vain = 1 if newest > self._newest else self._in_vain + 1
        self._newest = newest
        if self._in_vain > self._restarts:
            if self._restarts:
                print(f"gave up after {self._restarts} restarts without a new checkpoint")
            raise GaveUp(outcome.reason)
        self._goes_on = True
        print(
            f"{outcome.reason}\nstarting again from step {newest} (restarts without a newer one: "
            f"{self._in_vain} of {self._restarts})",
            flush=True,
        )


HERE: list[Run] = []
"""The one run of this process, once its first workers were started."""


def here(told: RunConfig) -> Run:
    """Return the one run of this process."""
    if not HERE:
        HERE.append(Run(Path(told.work.run_dir), told.restarts, told.seen, told.job))
    return HERE[0]


class RunBackend(Backend):  # type: ignore[misc]
    """Begin and end an attempt around each start of Ray's workers."""

    share_cuda_visible_devices = True  # a rank takes the GPU of its local number

    def on_start(self, worker_group: Any, backend_config: RunConfig) -> None:
        """Claim an attempt, look whether the nodes fit together, tell ranks where to meet."""
        run = here(backend_config)
        before = runs.read_outcome(run.run_dir, run.attempt)
        if before is not None and before.code == runs.FINISHED:
            raise GaveUp("finished, while Ray was about to change the number of workers")
        attempt = run.begin()
        try:
            prepare(worker_group, backend_config.work, run.run_dir, attempt)
        except RayActorError:  # `Starts` counts it
            worker_group._clear_state()  # or Ray takes it for started, and keeps its place for ever
            raise
        except Exception:
            run.end()
            raise

    def on_shutdown(self, worker_group: Any, backend_config: RunConfig) -> None:
        """End the attempt. Where it still runs, Ray wants another number of workers: save first.

        No limit but the watchdog's is set to that: a worker that is lost meanwhile is seen here.
        """
        if not HERE or HERE[0].attempt < 0:
            return
        run = HERE[0]
        run_dir, attempt = run.run_dir, run.attempt
        try:
            while (outcome := runs.read_outcome(run_dir, attempt)) is None:
                ask_to_stop(run_dir, attempt, RESIZE)
                ended, errors = state_of(worker_group)
                failed = any(not isinstance(error, Moved) for error in errors.values())
                if failed or (ended and not appears(runs.outcome_file(run_dir, attempt))):
                    run.judge(errors or {0: RuntimeError("the workers have ended without a word")})
                time.sleep(LOOK_SECONDS)
            deadline = time.monotonic() + LEAVE_SECONDS
            while outcome.code != runs.FAILED and not state_of(worker_group)[0]:
                if time.monotonic() > deadline:
                    break
                time.sleep(LOOK_SECONDS)
        finally:
            run.end()


def state_of(worker_group: Any) -> tuple[bool, dict[int, Exception]]:
    """Tell whether all workers have ended, and how those that have failed.

    `poll_status` would tell Ray's callbacks, too, of which the first have ended by now.
    """
    found = worker_group._poll_workers_and_collect_errors(timeout=1.0)
    errors = {  # Ray wraps what a rank's worker says
        rank: getattr(worker.error, "_base_exc", worker.error)
        for rank, worker in enumerate(found)
        if worker.error is not None
    }
    return not any(worker.running for worker in found), errors


class Attempts(UserCallback):  # type: ignore[misc]
    """Decide whether there shall be another attempt after a failure."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise GaveUp, which ends the run, where it would be in vain."""
        HERE[0].judge(worker_exceptions)


class Starts(ControllerCallback):  # type: ignore[misc]
    """Count the starts of workers that fail: Ray repeats them for ever, and tells no backend."""

    def __init__(self, told: RunConfig) -> None:
        self._told = told

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Raise GaveUp, which ends the run, where another start would be in vain."""
        if current_state is previous_state:  # Ray looks again, and nothing has happened
            return
        error = getattr(current_state, "training_failed_error", None)
        failure = getattr(error, "controller_failure", None)
        if isinstance(failure, WorkerGroupStartupFailedError):
            here(self._told).lose(failure.__cause__ or failure)


def prepare(worker_group: Any, work: Work, run_dir: Path, attempt: int) -> None:
    """Look whether the workers' nodes fit together, and tell ranks where to meet.

    Raises GaveUp where they do not, and RayActorError where a worker is lost.
    """
    found: list[roll_call.Node] = worker_group.execute(look, work, attempt)
    nodes = list({one.rank: one for one in found}.values())
    problems = [*unseen(run_dir, attempt, nodes), *roll_call.compare(nodes)[0]]
    if problems:
        reason = "\n  ".join(["the workers cannot work together:", *problems])
        runs.write_outcome(run_dir, attempt, runs.Outcome(runs.FAILED, reason, -1))
        raise GaveUp(reason)
    record(run_dir, attempt, [one.host for one in found])
    address, port = worker_group.execute_single(0, meeting_point)
    told = {
        ATTEMPT: str(attempt),
        NODES: str(len(nodes)),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    worker_group.execute(tell, told)
    print(
        f"attempt {attempt}: starting workers: {len(found)}, nodes: {len(nodes)}, logs: "
        f"{runs.attempt_dir(run_dir, attempt)}",
        flush=True,
    )


def explain(run_dir: Path, attempt: int, errors: Mapping[int, Exception]) -> runs.Outcome:
    """Say why an attempt failed; write down in its place why a worker did that was killed."""
    for rank, error in errors.items():
        if isinstance(error, Moved) or runs.has_failed(run_dir, attempt, rank):
            continue
        # Ray wraps the death of an actor; what is inside says how it died.
        reason = one_line(getattr(error, "health_check_failure", error))
        killed = runs.Outcome(runs.FAILED, f"its Ray worker failed: {reason}", -1)
        runs.write_failure(run_dir, attempt, rank, killed, killed=True)
    return node.blame(run_dir, attempt) or runs.Outcome(
        runs.STOPPED, GOES_ON[0], -1, asked_by=GOES_ON[0]
    )


def one_line(error: BaseException) -> str:
    """Return Ray's words without their layout."""
    return " ".join(str(error).split())


def look(work: Work, attempt: int) -> roll_call.Node:
    """Say what this worker's node is, and whether it sees the run folder."""
    here, run_dir = ray.train.get_context(), Path(work.run_dir)
    rank, host = here.get_node_rank(), socket.gethostname()
    folder = runs.attempt_dir(run_dir, attempt)
    if not appears(folder):
        return roll_call.Node(rank, host, {}, [f"{folder} is not there: run_dir must be {SHARED}"])
    recipe, workers = read_config_json(run_dir), here.get_local_world_size()
    gpus = node.count_gpus() if work.gpus else 0
    problems = [*machine_mistakes(recipe, workers, gpus), *roll_call.too_full(run_dir, recipe)]
    if not Path(work.folder).is_dir():
        problems.append(f"{work.folder}, where the run was launched, is not there")
    found = roll_call.Node(rank, host, roll_call.facts(recipe, work.threads), problems)
    if here.get_local_rank() == 0:
        roll_call.write(folder, found)
    return found


SHARED = "a folder that every node sees, under the same path"


def unseen(run_dir: Path, attempt: int, nodes: list[roll_call.Node]) -> list[str]:
    """Return a line for every node whose file does not appear here."""
    folder = runs.attempt_dir(run_dir, attempt)
    return [
        f"{one.host}: what it writes into {folder} does not appear on {socket.gethostname()}: "
        f"run_dir must be {SHARED}"
        for one in nodes
        if one.alike and not appears(roll_call.node_file(folder, one.rank))
    ]


def appears(path: Path) -> bool:
    """Tell whether a file or folder appears within the time that shared file systems need."""
    deadline = time.monotonic() + SEES_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def meeting_point() -> tuple[str, int]:
    """Return this worker's address and a port at which nobody listens."""
    with socket.socket() as free:
        free.bind(("", 0))
        return ray.util.get_node_ip_address(), free.getsockname()[1]


def tell(variables: dict[str, str]) -> None:
    """Let this worker know."""
    os.environ.update(variables)


def record(run_dir: Path, attempt: int, hosts: list[str]) -> None:
    """Write down which workers an attempt has, and that it has another number than the last one."""
    launch, before = runs.read_launch(run_dir), hosts_before(run_dir, attempt)
    path = runs.attempt_dir(run_dir, attempt) / FILE
    job = ray.get_runtime_context().get_job_id()
    runs.write_atomically(path, json.dumps({"job": job, "hosts": hosts}) + "\n")
    if before and len(before) != len(hosts):
        runs.record_change(run_dir, attempt, {"workers": f"{len(before)} -> {len(hosts)}"})
    if launch.options.get("placed") != len(hosts):
        options = launch.options | {"placed": len(hosts)}
        runs.write_launch(run_dir, replace(launch, options=options))


def hosts_before(run_dir: Path, attempt: int) -> list[str]:
    """Return the hosts of the workers of the last attempt that had any, in any launch on Ray."""
    for earlier in range(attempt - 1, -1, -1):
        with contextlib.suppress(FileNotFoundError):
            text = (runs.attempt_dir(run_dir, earlier) / FILE).read_text(encoding="utf-8")
            hosts: list[str] = json.loads(text)["hosts"]
            return hosts
    return []
