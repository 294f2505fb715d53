"""Run a run folder on Ray, as the driver of the cluster's workers.

Ray Train starts the workers, `ray_worker` a rank in each of them, `ray_controller` owns the run.
This process hears signals, and says how it went.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from dist_sft import batch_job, lease, ray_batch, ray_cluster, ray_generate, runs
from dist_sft.config import read_config_json
from dist_sft.errors import UserError
from dist_sft.ray_wish import ask_to_stop
from dist_sft.stopping import Relay

ELASTIC_START_SECONDS = 15
LOOK_SECONDS = 0.5
NO_PACKAGE = (
    "a node of the cluster cannot import dist_sft: Ray's workers run the Python of `ray start`. "
    "Install dist_sft there, on every node, in the same version"
)
LEAVE_SECONDS = 15.0  # what Ray gets to end, or to start the next attempt, after one that has ended
NOBODY_RAN = runs.Outcome(runs.STOPPED, "stopped while no worker was running", -1)
RELEASE_SECONDS = 10.0  # what Ray gets to end the controller


def run(run_dir: Path, launch: runs.Launch, seen: lease.Lease | None) -> int:
    """Run attempts on Ray until one ends the run; return its exit code."""
    options, began = launch.options, max(runs.attempts(run_dir), default=-1)
    (low, high), per_worker = options["workers"], options["resources_per_worker"]
    job = ray_batch.note(run_dir)
    if low < high:  # Ray takes a node that has just died for one that may be used
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(ELASTIC_START_SECONDS))
    with ExitStack() as stack:
        relay = stack.enter_context(Relay())
        seen = stack.enter_context(lease.announce(run_dir, seen))  # or nobody could stop it yet
        if options["address"] is None:
            stack.enter_context(ray_cluster.started(high, per_worker))
        else:
            stack.enter_context(ray_cluster.joined(options["address"]))
        if "GPU" not in per_worker and ray_cluster.has_gpus():
            per_worker["GPU"] = 1.0

        def stops() -> bool:
            return relay.received is not None or (run_dir / "STOP").exists()

        if not ray_cluster.wait_for_room(low, per_worker, options["wait"], stops):
            return told(NOBODY_RAN)
        if read_config_json(run_dir).job == "generate":
            return told(ray_generate.run(run_dir, launch, seen, job, relay))
        engine = Engine(partial(trainer, run_dir.absolute(), launch, seen, job))
        engine.start()
        left = follow(engine, relay, run_dir, launch, began)
    newest = max(runs.attempts(run_dir), default=-1)
    if newest > began:
        release(run_dir, newest)
    ended = runs.read_outcome(run_dir, newest) if newest > began else None
    outcome = ended or left or engine.verdict()
    if left is not None and outcome.code == runs.FAILED:  # it waited to go on
        outcome = left
    if newest > began and ended is None:
        runs.write_outcome(run_dir, newest, outcome)
    return told(outcome)


def told(outcome: runs.Outcome) -> int:
    """Tell a person how the run ended; return its exit code."""
    if outcome.code != runs.FINISHED:
        print(outcome.reason, file=sys.stderr)
    if outcome.code == runs.STOPPED:
        print("the same command continues the run", file=sys.stderr)
    return outcome.code


def follow(
    engine: Engine, relay: Relay, run_dir: Path, launch: runs.Launch, began: int
) -> runs.Outcome | None:
    """Return None when Ray has ended the run, or why it is left before.

    Raises UserError where Ray finds no room to begin. Where it loses it on the way, the run waits
    for nodes to come back.
    """
    low, per_worker = launch.options["workers"][0], launch.options["resources_per_worker"]
    ran_at = room_at = time.monotonic()
    while engine.is_alive():
        engine.join(LOOK_SECONDS)
        if relay.leaves:
            reason = "left at once: nothing was saved, older checkpoints are whole"
            return runs.Outcome(runs.STOPPED, reason, -1)
        newest, now = max(runs.attempts(run_dir), default=-1), time.monotonic()
        works = newest > began and runs.read_outcome(run_dir, newest) is None
        if works:
            ran_at = now
        if works and relay.received is not None:
            ask_to_stop(run_dir, newest, f"signal {relay.received.name}")
        stops = relay.received is not None or (run_dir / "STOP").exists()
        if stops and not works and (newest <= began or now - ran_at > LEAVE_SECONDS):
            return NOBODY_RAN
        if works or ray_cluster.free_room(per_worker) >= low:
            room_at = now
        elif now - room_at > launch.options["wait"]:
            lacking = ray_cluster.too_busy(low, per_worker)
            if newest <= began:
                raise lacking
            print(f"waiting to go on: {lacking}", file=sys.stderr, flush=True)
            room_at = now
    return None


def release(run_dir: Path, attempt: int) -> None:
    """Remove the lease of a controller that was ended with Ray, before the run was."""
    deadline = time.monotonic() + RELEASE_SECONDS
    while (held := lease.read(run_dir)) and held.attempt == attempt:
        if lease.is_gone(held.owner):
            (run_dir / lease.NAME).unlink(missing_ok=True)
        elif time.monotonic() > deadline:
            return
        time.sleep(0.1)


class Engine(threading.Thread):
    """Ray Train at work, in a thread: in the main one it would hear signals, and abort."""

    def __init__(self, trainer: Callable[[], Any]) -> None:
        super().__init__(name="ray", daemon=True)
        self._trainer = trainer
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            self._trainer().fit()
        except Exception as error:
            self._error = error

    def verdict(self) -> runs.Outcome:
        """Say how it went where no attempt could."""
        cause = getattr(self._error, "controller_failure", self._error)
        if "No module named 'dist_sft" in str(cause):
            return runs.Outcome(runs.WRONG_INPUT, NO_PACKAGE, -1)
        code = runs.WRONG_INPUT if isinstance(cause, UserError) else runs.FAILED
        return runs.Outcome(code, str(cause or "Ray ended the run without a word"), -1)


def trainer(
    run_dir: Path, launch: runs.Launch, seen: lease.Lease | None, job: batch_job.Job | None
) -> Any:
    """Return Ray's trainer for a run folder, which is its storage, too."""
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig

    from dist_sft import ray_controller, ray_elastic, ray_worker

    options = launch.options
    low, high = options["workers"]
    per_worker = options["resources_per_worker"]
    gpus = bool(per_worker.get("GPU"))
    threads = ray_cluster.threads_for(read_config_json(run_dir).threads_per_worker, per_worker)
    work = ray_worker.Work(str(run_dir), options["folder"], gpus, threads)
    # Ray would look for the checkpoints of an earlier launch, which may be gone by now.
    (run_dir / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
    backend = ray_controller.RunConfig(work, options["restarts"], seen, job)
    return ray_elastic.Trainer(
        ray_worker.run_rank,
        train_loop_config=asdict(work),
        torch_config=backend,
        scaling_config=ScalingConfig(
            num_workers=low if low == high else (low, high),
            use_gpu=gpus,
            resources_per_worker=dict(per_worker),
            elastic_resize_monitor_interval_s=options["resize_every"],
        ),
        run_config=RunConfig(
            name=run_dir.name,
            storage_path=str(run_dir.parent),
            # How often is decided by the callback, which knows whether there was progress.
            failure_config=FailureConfig(max_failures=-1),
            callbacks=[ray_controller.Attempts(), ray_controller.Starts(backend)],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
