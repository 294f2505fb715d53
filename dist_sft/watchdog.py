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

from dist_sft.process import start_of, state_of

FOLDER = "DIST_SFT_HEARTBEATS"
"""Name of the variable by which a node tells its ranks where to write."""
DUMP_SIGNAL = signal.SIGUSR2
DUMP_SECONDS = 3.0
SLOW = ("joining", "loading", "saving", "exporting", "merging")
"""Phases whose length depends on the size of the model, not of a micro-batch."""
EARLY = ("preparing", "joining")
"""Phases in which there is nothing to save yet, and nobody looks whether to stop."""
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
            self._me = f"{os.getpid()} {start_of(os.getpid())}"

    def beat(self, phase: str) -> None:
        """Show progress: a phase begins, or a part of it."""
        if self._file is not None:
            self._beats += 1
            text = f"{self._me} {self._beats} {self.step} {phase}"
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


@dataclass(frozen=True)
class _Beat:
    """What a rank's file says."""

    pid: int
    start: str
    number: int
    step: int
    phase: str

    def is_alive(self) -> bool:
        return start_of(self.pid) == self.start


@dataclass
class _Seen:
    beat: _Beat
    at: float
    ran_at: float
    """When its process was last found running, and not stopped."""


class Watchdog:
    """Watch the ranks of this node."""

    def __init__(self, folder: Path, seconds: float | None, slow_seconds: float | None) -> None:
        self._folder = folder
        # Encoding millions of rows takes as long as it takes.
        self._limits = {**dict.fromkeys(SLOW, slow_seconds), "preparing": None}
        self._limit = seconds
        self._seen: dict[int, _Seen] = {}

    def look(self) -> Stuck | None:
        """Return a rank that has been in one place for too long: best the one others wait for.

        How long is too long depends on the phase, but a stopped process is in none: `seconds` are
        its limit everywhere.
        """
        now = time.monotonic()
        stuck = []
        for rank, beat in self._beats().items():
            seen = self._seen.setdefault(rank, _Seen(beat, now, now))
            if seen.beat != beat:
                seen.beat, seen.at = beat, now
            if not beat.is_alive():
                continue
            stopped = state_of(beat.pid) in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
            if not stopped:
                seen.ran_at = now
            since = seen.ran_at if stopped else seen.at
            limit = self._limit if stopped else self._limits.get(beat.phase, self._limit)
            if limit is not None and now - since > limit:
                stuck.append(Stuck(rank, beat.step, beat.phase, now - since, stopped))
        return max(stuck, key=lambda found: (found.stopped, found.seconds), default=None)

    def is_early(self, ranks: int) -> bool:
        """Tell whether one of so many ranks has nothing to save yet, or has not begun."""
        beats = self._beats()
        return len(beats) < ranks or any(beat.phase in EARLY for beat in beats.values())

    def dump(self) -> None:
        """Let every rank write its threads' stacks into its log."""
        for beat in self._beats().values():
            if beat.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(beat.pid, DUMP_SIGNAL)
        time.sleep(DUMP_SECONDS)

    def living(self) -> list[int]:
        """Return the process numbers of the ranks that have not ended."""
        return [beat.pid for beat in self._beats().values() if beat.is_alive()]

    def _beats(self) -> dict[int, _Beat]:
        beats = {}
        for path in filter(lambda path: path.name.isdecimal(), self._folder.iterdir()):
            words = path.read_text().split()
            if words:  # it may be about to write
                pid, start, number, step, phase = words
                beats[int(path.name)] = _Beat(int(pid), start, int(number), int(step), phase)
        return beats
