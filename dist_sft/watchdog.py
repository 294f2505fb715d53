"""Notice that a rank hangs: each says what it does, its node watches whether that changes.

Ranks write into files of a folder on their own node, many times per step; the shared file system is
not involved, and no clocks are compared.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

FOLDER = "DIST_SFT_HEARTBEATS"
"""Name of the variable by which a node tells its ranks where to write."""
DUMP_SIGNAL = signal.SIGUSR2
DUMP_SECONDS = 3.0
SLOW = ("loading", "saving", "exporting")
"""Phases whose length depends on the size of the model, not of a micro-batch."""
WIDTH = 96


class Heart:
    """Say what this rank does. Does nothing where no node watches."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self.step = 0
        self._beats = 0
        self._file: int | None = None
        folder = environment.get(FOLDER)
        if folder:
            path = Path(folder) / environment["RANK"]
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)

    def beat(self, phase: str) -> None:
        """Show progress: a phase begins, or a part of it."""
        if self._file is not None:
            self._beats += 1
            text = f"{os.getpid()} {self._beats} {self.step} {phase}"
            os.pwrite(self._file, text.ljust(WIDTH).encode(), 0)


@dataclass(frozen=True)
class Stuck:
    """A rank that makes no progress."""

    rank: int
    step: int
    phase: str
    seconds: float
    stopped: bool
    """Its process is stopped (SIGSTOP, a debugger), which is why the others wait for it."""

    def __str__(self) -> str:
        where = f"{self.phase}, step {self.step}" if self.step else self.phase
        why = "its process is stopped" if self.stopped else "every rank's stacks are in its log"
        return f"rank {self.rank} has made no progress for {self.seconds:.0f} s ({where}): {why}"


@dataclass
class _Seen:
    text: str
    at: float
    ran_at: float
    """When its process was last found running, and not stopped."""


class Watchdog:
    """Watch the ranks of this node."""

    def __init__(self, folder: Path, seconds: float | None, slow_seconds: float | None) -> None:
        self._folder = folder
        # Encoding millions of rows takes as long as it takes.
        self._limits = {"preparing": None, **dict.fromkeys(SLOW, slow_seconds)}
        self._limit = seconds
        self._seen: dict[int, _Seen] = {}

    def look(self) -> Stuck | None:
        """Return a rank that has been in one place for too long: best the one others wait for.

        How long is too long depends on the phase, but a stopped process is in none: `seconds` are
        its limit everywhere.
        """
        now = time.monotonic()
        for path in filter(lambda path: path.name.isdecimal(), self._folder.iterdir()):
            text, rank = path.read_text(), int(path.name)
            if text and (rank not in self._seen or self._seen[rank].text != text):
                self._seen[rank] = _Seen(text, now, now)
        stuck = []
        for rank, seen in self._seen.items():
            pid, _, step, phase = seen.text.split()
            state = state_of(int(pid))
            if state is None:
                continue
            stopped = state in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
            if not stopped:
                seen.ran_at = now
            since = seen.ran_at if stopped else seen.at
            limit = self._limit if stopped else self._limits.get(phase, self._limit)
            if limit is not None and now - since > limit:
                stuck.append(Stuck(rank, int(step), phase, now - since, stopped))
        return max(stuck, key=lambda found: (found.stopped, found.seconds), default=None)

    def end(self) -> None:
        """Let every rank write its threads' stacks into its log, then kill it."""
        for number in (DUMP_SIGNAL, signal.SIGKILL):
            for seen in self._seen.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(seen.text.split()[0]), number)
            if number == DUMP_SIGNAL:
                time.sleep(DUMP_SECONDS)


def state_of(pid: int) -> str | None:
    """Return what the kernel says a process does, or None where it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        state: str = psutil.Process(pid).status()
        if state not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return state
    return None
