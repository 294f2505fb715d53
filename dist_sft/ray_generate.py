"""Answer the parts of a generation run on Ray: an actor per worker, a task per part.

Ray places the actors, as many as there is room for, and says when one is lost; its part goes back
to the others. The launcher's process owns the run. It needs no torch.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from dist_sft import batch_job, config, lease, node, parts, ray_cluster, runs
from dist_sft.console import Console
from dist_sft.errors import UserError
from dist_sft.progress import Overview
from dist_sft.stopping import Relay

LOOK_SECONDS = 1.0
PAUSE_SECONDS = 5.0  # before the place of a lost worker is taken
Why = Callable[[], str | None]
"""Who asked for a stop, or None."""


def run(
    run_dir: Path,
    launch: runs.Launch,
    seen: lease.Lease | None,
    job: batch_job.Job | None,
    relay: Relay,
) -> runs.Outcome:
    """Answer all rows, or go on until a stop; return how it went."""
    attempt = lease.claim(run_dir, seen)
    if job is not None:
        batch_job.write(run_dir, attempt, job)
    with lease.hold(run_dir, attempt) as lost:
        crew = Crew(run_dir.absolute(), attempt, launch)
        try:
            outcome = crew.answer(lambda: why_to_stop(run_dir, relay, lost.is_set()))
        except UserError as error:
            outcome = runs.Outcome(runs.WRONG_INPUT, str(error), -1)
        finally:
            crew.dismiss()
        with contextlib.suppress(OSError):  # a full disk: the exit code still says it
            runs.write_outcome(run_dir, attempt, outcome)
    if outcome.code == runs.FINISHED:
        parts.clean_up(run_dir)
    return outcome


def why_to_stop(run_dir: Path, relay: Relay, is_lost: bool) -> str | None:
    """Return who asked for a stop, or None."""
    if relay.received is not None:
        return f"signal {relay.received.name}"
    if is_lost:
        return "another launcher, which has taken over"
    return "STOP file" if (run_dir / "STOP").exists() else None


class Worker:
    """What an actor does. Everything of torch is imported in here."""

    def __init__(self, run_dir: str, attempt: int, rank: int, folder: str) -> None:
        os.chdir(folder)
        self._run_dir, self._attempt, self._rank = Path(run_dir), attempt, rank

    def start(self, first: dict[str, Any] | None, workers: int) -> dict[str, Any]:
        """Find, or on the first worker make, what is needed, and load the model."""
        from dist_sft import generate, progress, stopping, watchdog, world

        if not (self._run_dir / "config.json").exists():
            raise UserError(
                f"run_dir: {socket.gethostname()} does not see {self._run_dir}: it must be a "
                "folder that every node sees, under the same path"
            )
        place = world.Place.from_environment()
        recipe = config.read_generation_config(self._run_dir)
        launch = runs.read_launch(self._run_dir)
        found = generate.prepare(
            self._run_dir, self._attempt, recipe, launch, place.device, print, first
        )
        plan = parts.read_plan(self._run_dir)
        assert plan is not None, "the first worker has written it"
        self._plan, self._recipe = plan, recipe
        self._progress = progress.Progress(
            self._run_dir, self._attempt, plan, (self._rank, workers), watchdog.Heart(),
            stopping.StopFlag(None), None,
        )  # fmt: skip
        self._answerer = generate.load_answerer(
            self._run_dir, recipe, plan, found, place, self._progress.tick
        )
        self._progress.begin()
        return found

    def answer(self, part: int) -> None:
        """Answer a part."""
        with self._progress.working_on(part):
            answered = self._answerer.answer(part)
            parts.commit(self._run_dir, self._attempt, self._plan, part, *answered)

    def finish(self) -> list[str]:
        """Make one file of all parts; return what to say."""
        from dist_sft import generate

        return generate.finish(
            self._run_dir, self._attempt, self._recipe, self._plan, self._answerer,
            self._progress.seconds, lambda phase: None, print,
        )  # fmt: skip


@dataclass
class Member:
    """An actor, and what it does."""

    actor: Any
    rank: int
    task: Any
    part: int | None = None
    """The part that it answers; None while it starts."""
    since: float = field(default_factory=time.monotonic)


class Crew:
    """The workers of one attempt, and the parts that are left."""

    def __init__(self, run_dir: Path, attempt: int, launch: runs.Launch) -> None:
        self._run_dir, self._attempt = run_dir, attempt
        self._options = launch.options
        self._recipe = config.read_config_json(run_dir)
        self._members: dict[Any, Member] = {}
        """By the task that each is at."""
        self._idle: list[Member] = []
        self._next_rank = 0
        self._in_vain = 0
        self._last_loss = 0.0

    def answer(self, stopped: Why) -> runs.Outcome:
        """Answer all parts and merge them; raises UserError for wrong input."""
        _, high = self._options["workers"]
        first = self._first(stopped)
        if isinstance(first, runs.Outcome):
            return first
        found, member = first
        plan = parts.read_plan(self._run_dir)
        assert plan is not None, "the first worker has written it"
        console = Console(None)
        done = parts.finished(self._run_dir)
        left = deque(part for part in range(plan.parts) if part not in done)
        workers = min(high, max(1, len(left)))
        print(f"attempt {self._attempt}: starting workers: up to {workers}", flush=True)
        console.start(plan.rows, sum(map(len, map(plan.rows_of, done))), "answering", "row")
        self._idle.append(member)
        while left or any(one.part is not None for one in self._members.values()):
            reason = stopped()
            if reason:
                return self._stopped(plan, reason)
            while self._idle and left:
                self._call(self._idle.pop(), "answer", left.popleft())
            patient = time.monotonic() - self._last_loss < PAUSE_SECONDS
            while len(self._members) + len(self._idle) < workers and left and not patient:
                self._hire(found, high)
            for one in self._ended():
                failure = self._failure(one)
                if failure is None:
                    self._in_vain = 0 if one.part is not None else self._in_vain
                    self._idle.append(one)
                    continue
                if one.part is not None:
                    left.appendleft(one.part)
                if self._in_vain > self._options["restarts"]:
                    return runs.Outcome(runs.FAILED, f"gave up: {failure}", -1)
            if console.is_due():
                view = Overview.read(self._run_dir, self._attempt, plan)
                text = f"{view.tokens_per_second:,.0f} tokens/s"
                console.step(view.finished_rows, text, important=False)
        return self._finish(plan, found, high, stopped)

    def dismiss(self) -> None:
        """End all workers."""
        for one in (*self._members.values(), *self._idle):
            with contextlib.suppress(Exception):  # Ray may be gone already
                ray.kill(one.actor)

    def _first(self, stopped: Why) -> runs.Outcome | tuple[dict[str, Any], Member]:
        """Start a worker, which prepares the run; return what it found."""
        low, high = self._options["workers"]
        began = time.monotonic()
        self._hire(None, high)
        while True:
            reason = stopped()
            if reason:
                return runs.Outcome(runs.STOPPED, f"stopped by {reason}", -1, asked_by=reason)
            for one in self._ended():
                failure = self._failure(one)
                if failure is None:
                    return ray.get(one.task), one
                if self._in_vain > self._options["restarts"]:
                    return runs.Outcome(runs.FAILED, f"gave up: {failure}", -1)
                self._hire(None, high)
            placed = any(self._is_placed(one) for one in self._members.values())
            if placed:
                began = time.monotonic()
            elif time.monotonic() - began > self._options["wait"]:
                raise ray_cluster.too_busy(low, self._options["resources_per_worker"])

    def _is_placed(self, one: Member) -> bool:
        from ray.util.state import get_actor

        with contextlib.suppress(Exception):  # the dashboard may not be there to say
            state = get_actor(one.actor._actor_id.hex())
            return bool(state is None or state.state not in ("PENDING_CREATION", "RESTARTING"))
        return True

    def _hire(self, first: dict[str, Any] | None, workers: int) -> None:
        """Ask Ray for one more worker."""
        per_worker = dict(self._options["resources_per_worker"])
        gpus = int(per_worker.pop("GPU", 0))
        threads = node.threads_for(self._recipe.threads_per_worker, workers, gpus)
        rank, self._next_rank = self._next_rank, self._next_rank + 1
        variables = {
            "RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": workers, "GROUP_RANK": 0,
            "GROUP_WORLD_SIZE": 1, **node.rank_environment(threads, gpus),
            **({} if gpus else {"CUDA_VISIBLE_DEVICES": ""}),
        }  # fmt: skip
        actor = (
            ray.remote(Worker)
            .options(
                num_cpus=per_worker.pop("CPU", 1),
                num_gpus=gpus,
                resources=per_worker,
                runtime_env={"env_vars": {name: str(value) for name, value in variables.items()}},
            )
            .remote(str(self._run_dir), self._attempt, rank, self._options["folder"])
        )
        task = actor.start.remote(first, workers)
        self._members[task] = Member(actor, rank, task)

    def _call(self, one: Member, method: str, part: int | None = None) -> None:
        """Let a worker do something."""
        one.part, one.since = part, time.monotonic()
        one.task = getattr(one.actor, method).remote(*([] if part is None else [part]))
        self._members[one.task] = one

    def _ended(self) -> list[Member]:
        """Return the workers whose task has ended, within a moment; end those that hang."""
        if not self._members:
            time.sleep(LOOK_SECONDS)
            return []
        tasks, _ = ray.wait(
            list(self._members), num_returns=len(self._members), timeout=LOOK_SECONDS
        )
        for one in self._members.values():
            self._end_if_stuck(one)
        return [self._members.pop(task) for task in tasks]

    def _end_if_stuck(self, one: Member) -> None:
        """End a worker that has said nothing for longer than the watchdog allows."""
        limit = self._recipe.watchdog.seconds
        if one.part is None or limit is None or time.monotonic() - one.since < limit:
            return
        said = runs.attempt_dir(self._run_dir, self._attempt) / f"progress-{one.rank}.json"
        age = time.time() - said.stat().st_mtime if said.exists() else limit + 1
        if age > limit:
            print(f"worker {one.rank} has made no progress for {age:.0f} s: ended", flush=True)
            ray.kill(one.actor)

    def _failure(self, one: Member) -> str | None:
        """Return why a worker's task has failed, or None; raises UserError for wrong input."""
        try:
            ray.get(one.task)
            return None
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            what = f"{type(error.cause).__name__}: {error.cause}"
            with contextlib.suppress(Exception):
                ray.kill(one.actor)
        except RayActorError as error:
            if "No module named 'dist_sft" in str(error):
                from dist_sft.ray_driver import NO_PACKAGE

                raise UserError(NO_PACKAGE) from None
            what = f"it was lost ({type(error).__name__})"
        at = "as it started" if one.part is None else f"at part {one.part}"
        failure = f"worker {one.rank} failed {at}: {what}"
        print(failure, file=sys.stderr, flush=True)
        self._in_vain += 1
        self._last_loss = time.monotonic()
        return failure

    def _finish(
        self, plan: parts.Plan, found: dict[str, Any], workers: int, stopped: Why
    ) -> runs.Outcome:
        """Let a worker merge the parts; another one where that is lost."""
        while True:
            if not self._members and self._idle:
                self._call(self._idle.pop(), "finish")
            elif not self._members:
                self._hire(found, workers)
            for one in self._ended():
                failure = self._failure(one)
                if failure is not None and self._in_vain > self._options["restarts"]:
                    return runs.Outcome(runs.FAILED, f"gave up: {failure}", -1)
                said = None if failure else ray.get(one.task)
                if isinstance(said, list):
                    print("\n".join(said), flush=True)
                    return runs.Outcome(runs.FINISHED, "finished", plan.parts)
                if failure is None:
                    self._idle.append(one)
            reason = stopped()
            if reason:
                return self._stopped(plan, reason)

    def _stopped(self, plan: parts.Plan, reason: str) -> runs.Outcome:
        done = parts.finished(self._run_dir)
        rows = sum(map(len, map(plan.rows_of, done)))
        told = f"stopped by {reason}; {rows} of {plan.rows} rows are finished"
        return runs.Outcome(runs.STOPPED, told, len(done), asked_by=reason)
