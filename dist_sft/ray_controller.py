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
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray.train
import ray.util
from ray.train import UserCallback
from ray.train.backend import Backend, BackendConfig

from dist_sft import lease, manifest, node, roll_call, runs
from dist_sft.config import read_config_json
from dist_sft.preflight import machine_mistakes
from dist_sft.ray_worker import ATTEMPT, GOES_ON, NODES, RESIZE, Moved, Work
from dist_sft.stopping import REASON

FILE = "ray.json"
SEES_SECONDS = 20.0  # what a shared file system gets to show a new file
SAVE_SECONDS = 600.0  # what ranks get to save before Ray ends them to start another number


class GaveUp(RuntimeError):
    """End the run: after an error of a worker, Ray would start it again."""


@dataclass
class RunConfig(BackendConfig):  # type: ignore[misc]
    """Plain values for the backend; Ray sends them to the controller."""

    work: Work
    seen: lease.Lease | None
    """The lease that the launcher found."""

    @property
    def backend_cls(self) -> type[Backend]:
        return RunBackend


class RunBackend(Backend):  # type: ignore[misc]
    """Begin and end an attempt around each start of Ray's workers."""

    share_cuda_visible_devices = True  # a rank takes the GPU of its local number
    _attempt: int | None = None
    _held: ExitStack

    def on_start(self, worker_group: Any, backend_config: RunConfig) -> None:
        """Claim an attempt, look whether the nodes fit together, tell ranks where to meet."""
        work, run_dir = backend_config.work, Path(backend_config.work.run_dir)
        seen = backend_config.seen
        if self._attempt is not None:
            outcome = runs.read_outcome(run_dir, self._attempt)
            if outcome is not None and outcome.code == runs.FINISHED:
                raise GaveUp("finished, while Ray was about to change the number of workers")
            seen = lease.wait_until_free(run_dir)
        self._held = ExitStack()
        attempt = self._attempt = lease.claim(run_dir, seen)
        self._held.enter_context(lease.hold(run_dir, attempt))
        os.environ[ATTEMPT] = str(attempt)  # in this process, where the callback looks
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

    def on_shutdown(self, worker_group: Any, backend_config: RunConfig) -> None:
        """End the attempt. Where it still runs, Ray wants another number of workers: save first."""
        run_dir, attempt = Path(backend_config.work.run_dir), self._attempt
        if attempt is None:
            return
        with self._held:
            deadline, asked = time.monotonic() + SAVE_SECONDS, False
            while runs.read_outcome(run_dir, attempt) is None and time.monotonic() < deadline:
                outcome = node.blame(run_dir, attempt)
                if outcome is not None:
                    runs.write_outcome(run_dir, attempt, outcome)
                    return
                if not asked:
                    ask_to_stop(run_dir, attempt, RESIZE)
                    asked = True
                time.sleep(0.2)


class Attempts(UserCallback):  # type: ignore[misc]
    """Write down why an attempt failed, and decide whether there shall be another one."""

    def __init__(self, run_dir: str, restarts: int) -> None:
        self._run_dir, self._restarts = Path(run_dir), restarts
        self._newest = max(manifest.folders(self._run_dir), default=0)
        self._in_vain = 0
        self._judged: int | None = None

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise GaveUp, which ends the run, where another attempt would be in vain.

        Ray calls this at every look at its workers until they have ended.
        """
        run_dir, attempt = self._run_dir, int(os.environ[ATTEMPT])
        if self._judged == attempt:
            return
        self._judged = attempt
        outcome = runs.read_outcome(run_dir, attempt)
        if outcome is None:
            outcome = explain(run_dir, attempt, worker_exceptions)
            runs.write_outcome(run_dir, attempt, outcome)
        moved = any(isinstance(error, Moved) for error in worker_exceptions.values())
        if outcome.code == runs.STOPPED and (moved or outcome.asked_by in GOES_ON):
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
        print(
            f"{outcome.reason}\nstarting again from step {newest} (restarts without a newer one: "
            f"{self._in_vain} of {self._restarts})",
            flush=True,
        )


def explain(run_dir: Path, attempt: int, errors: dict[int, Exception]) -> runs.Outcome:
    """Say why an attempt failed; write down in its place why a worker did that was killed."""
    for rank, error in errors.items():
        if isinstance(error, Moved) or runs.has_failed(run_dir, attempt, rank):
            continue
        # Ray wraps the death of an actor; what is inside says how it died.
        reason = " ".join(str(getattr(error, "health_check_failure", error)).split())
        killed = runs.Outcome(runs.FAILED, f"its Ray worker failed: {reason}", -1)
        runs.write_failure(run_dir, attempt, rank, killed, killed=True)
    return node.blame(run_dir, attempt) or runs.Outcome(
        runs.STOPPED, GOES_ON[0], -1, asked_by=GOES_ON[0]
    )


def look(work: Work, attempt: int) -> roll_call.Node:
    """Say what this worker's node is, and whether it sees the run folder."""
    here, run_dir = ray.train.get_context(), Path(work.run_dir)
    rank, host = here.get_node_rank(), socket.gethostname()
    folder = runs.attempt_dir(run_dir, attempt)
    if not appears(folder):
        return roll_call.Node(rank, host, {}, [f"{folder} is not there: run_dir must be {SHARED}"])
    recipe, workers = read_config_json(run_dir), here.get_local_world_size()
    gpus = node.count_gpus() if work.gpus else 0
    threads = node.threads_for(recipe.threads_per_worker, workers, gpus)
    problems = [*machine_mistakes(recipe, workers, gpus), *roll_call.too_full(run_dir, recipe)]
    if not Path(work.folder).is_dir():
        problems.append(f"{work.folder}, where the run was launched, is not there")
    found = roll_call.Node(rank, host, roll_call.facts(recipe, threads), problems)
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


def ask_to_stop(run_dir: Path, attempt: int, why: str) -> None:
    """Ask the workers of an attempt to let their ranks save and end."""
    with contextlib.suppress(OSError):
        path = runs.attempt_dir(run_dir, attempt) / REASON
        if not path.exists():
            runs.write_atomically(path, why)


def record(run_dir: Path, attempt: int, hosts: list[str]) -> None:
    """Write down which workers an attempt has, and that it has another number than the last one."""
    launch = runs.read_launch(run_dir)
    before = launch.options.get("placed")
    path = runs.attempt_dir(run_dir, attempt) / FILE
    job = ray.get_runtime_context().get_job_id()
    runs.write_atomically(path, json.dumps({"job": job, "hosts": hosts}) + "\n")
    if before is not None and before != len(hosts):
        runs.record_change(run_dir, attempt, {"workers": f"{before} -> {len(hosts)}"})
    if before != len(hosts):
        options = launch.options | {"placed": len(hosts)}
        runs.write_launch(run_dir, replace(launch, options=options))
