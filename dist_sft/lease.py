"""Who owns a run folder now: one launcher at a time, and an old one can do no harm.

`lease.json` holds {owner, attempt, heartbeat}. The owner's first node renews it every few seconds
and removes it at the end. Nobody's clock is compared with another's: a second launcher watches
whether the heartbeat moves. What a take-over leaves behind alive is fenced off where it matters:
checkpoints are committed by the newest attempt only.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dist_sft import process
from dist_sft.errors import UserError
from dist_sft.runs import attempt_dir, attempts, start_attempt, write_atomically

NAME = "lease.json"
HEARTBEAT_SECONDS = 3.0
EXPIRY_SECONDS = 20.0  # longer than file systems of clusters keep an old content
ANNOUNCED = -1  # first heartbeat of who has yet to claim an attempt; from there on it falls
START_SECONDS = 240.0  # from the claim of a batch script to the first heartbeat of its first node


@dataclass(frozen=True)
class Owner:
    """The process that renews a lease."""

    host: str
    pid: int
    started: str
    """Start of the process in ticks since boot: process ids are used again."""
    here: str
    """Where its process number means anything; see `process.here`."""
    job: str | None = None
    """The SLURM job that it belongs to."""
    restart: int = 0
    """How often SLURM had put that job back in the queue."""

    @classmethod
    def me(cls) -> Owner:
        """Return this process."""
        env, pid = os.environ, os.getpid()
        restart = int(env.get("SLURM_RESTART_COUNT", 0))
        started = process.start_of(pid) or ""
        job = env.get("SLURM_JOB_ID")
        return cls(socket.gethostname(), pid, started, process.here(), job, restart)

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


@dataclass(frozen=True)
class Lease:
    """The content of `lease.json`."""

    owner: Owner
    attempt: int
    heartbeat: int


def read(run_dir: Path) -> Lease | None:
    """Return the lease, or None where nobody owns the run."""
    try:
        content = json.loads((run_dir / NAME).read_text(encoding="utf-8"))
        return Lease(Owner(**content["owner"]), content["attempt"], content["heartbeat"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"{run_dir / NAME} is damaged; remove it if no launcher works on this run"
        ) from None


def wait_until_free(run_dir: Path, say: Callable[[str], None] = print) -> Lease | None:
    """Return once no other launcher works on the run; raise UserError where one does.

    What is returned is the lease that was left behind: `claim` takes the run only as it is now.
    """
    lease = read(run_dir)
    if lease is None or (is_gone(lease.owner) and not _starts(lease)):
        return lease
    seconds = START_SECONDS if _starts(lease) else EXPIRY_SECONDS
    say(f"{run_dir} belongs to {lease.owner}; watching for {seconds:.0f} s if it is alive")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        now = read(run_dir)
        if now is None:
            return None
        if now != lease:
            raise _in_use(run_dir, now)
        time.sleep(min(0.5, EXPIRY_SECONDS / 10))
    say(f"{lease.owner} shows no sign of life: taking over")
    return lease


def claim(run_dir: Path, seen: Lease | None) -> int:
    """Claim the run's next attempt, where its lease still is as it was `seen`; return the number.

    Raises UserError where another launcher was faster. Of two in the same instant the one with the
    higher number stays, as the other finds out.
    """
    attempt = start_attempt(run_dir)
    now = read(run_dir)
    if now is not None and not _is_as_seen(now, seen):
        attempt_dir(run_dir, attempt).rmdir()  # or it would fence the other one off
        raise _in_use(run_dir, now)
    try:
        _write(run_dir, Lease(Owner.me(), attempt, 0))
    except OSError as error:
        attempt_dir(run_dir, attempt).rmdir()
        raise UserError(f"run_dir: {run_dir} cannot be written: {error.strerror}") from None
    return attempt


def _in_use(run_dir: Path, lease: Lease) -> UserError:
    return UserError(
        f"run_dir: {run_dir} is in use by {lease.owner} (attempt {lease.attempt}). Stop that "
        f"run first (`dist-sft stop {run_dir}`), or give another run_dir"
    )


def _write(run_dir: Path, lease: Lease) -> None:
    write_atomically(run_dir / NAME, json.dumps(asdict(lease)) + "\n")


@contextlib.contextmanager
def announce(run_dir: Path, seen: Lease | None) -> Iterator[Lease]:
    """Let others see within a block who is about to claim an attempt, or to let another process.

    The block gets the lease that is `seen` then. Raises UserError where somebody was faster.
    """
    now = read(run_dir)
    if now is not None and not _is_as_seen(now, seen):
        raise _in_use(run_dir, now)
    mine = Lease(Owner.me(), max(attempts(run_dir), default=-1) + 1, ANNOUNCED)

    def renew(beat: int) -> bool:
        now = read(run_dir)
        if now is None or not _is_as_seen(now, mine):
            return False  # it was claimed
        _write(run_dir, replace(mine, heartbeat=ANNOUNCED - beat))
        return True

    with contextlib.suppress(OSError):  # who claims says so
        _write(run_dir, mine)
    try:
        with _renewing(renew):
            yield mine
    finally:
        with contextlib.suppress(OSError, UserError):
            now = read(run_dir)
            if now is not None and _is_as_seen(now, mine):
                (run_dir / NAME).unlink()


def _is_as_seen(now: Lease, seen: Lease | None) -> bool:
    """Tell whether a lease is as it was seen; an announced one goes on to beat."""
    if seen is None or now.owner != seen.owner:
        return False
    return now == seen or max(now.heartbeat, seen.heartbeat) <= ANNOUNCED


@contextlib.contextmanager
def hold(run_dir: Path, attempt: int) -> Iterator[threading.Event]:
    """Own the run within a block: renew the lease until the block ends, then remove it.

    The event that the block gets is set when another launcher has taken over.
    """
    owner, lost = Owner.me(), threading.Event()

    def renew(beat: int) -> bool:
        if not owns(run_dir, attempt) and max(attempts(run_dir), default=0) > attempt:
            lost.set()
            return False
        _write(run_dir, Lease(owner, attempt, beat))
        return True

    _write(run_dir, Lease(owner, attempt, 0))
    try:
        with _renewing(renew):
            yield lost
    finally:
        with contextlib.suppress(OSError, UserError):
            if owns(run_dir, attempt):
                (run_dir / NAME).unlink()


@contextlib.contextmanager
def _renewing(renew: Callable[[int], bool]) -> Iterator[None]:
    """Call `renew` with 1, 2, ... every few seconds within a block, until it returns False."""
    ended = threading.Event()

    def keep() -> None:
        for beat in itertools.count(1):
            if ended.wait(HEARTBEAT_SECONDS):
                return
            with contextlib.suppress(OSError, UserError):  # a full disk must not end the run
                if not renew(beat):
                    return

    thread = threading.Thread(target=keep, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def owns(run_dir: Path, attempt: int) -> bool:
    """Tell whether the lease is this attempt's."""
    lease = read(run_dir)
    return lease is not None and lease.attempt == attempt


def _starts(lease: Lease) -> bool:
    """Tell whether a batch script of another job claimed this and its nodes have yet to begin."""
    return lease.heartbeat == 0 and lease.owner.job not in (None, Owner.me().job)


def is_gone(owner: Owner) -> bool:
    """Tell whether the owner is a process that ended here, or this job before a requeue."""
    me = Owner.me()
    if owner.job is not None and owner.job == me.job and owner.restart < me.restart:
        return True
    return owner.here == me.here and process.start_of(owner.pid) != owner.started
