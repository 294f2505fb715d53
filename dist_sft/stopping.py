"""Stop at a step boundary: a signal or the STOP file raises a flag that the ranks agree on.

A node hears signals (`Relay`) and tells its ranks in a file beside their heartbeats; a rank that
gets a signal itself remembers it until a step ends (`StopFlag`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import ClassVar, Protocol, Self

from dist_sft.watchdog import FOLDER

ONE_SIGNAL_SECONDS = 1.0
"""Within it a signal that comes again is the same one: shells and schedulers send to a process and
to its group."""


REASON = "stop"
"""Name of the file, in the folder of heartbeats, that says why the ranks shall stop."""
BLANK = b" " * 64


class Asked(Protocol):
    """Who knows whether ranks were asked to stop."""

    @property
    def received(self) -> object | None:
        """Return what asked them to, or None."""

    @property
    def leaves(self) -> bool:
        """Tell whether they shall be ended at once."""


class Notice:
    """The file in which ranks of this node read why they shall stop.

    It has its size before it is needed: then even a full disk takes what it says.
    """

    def __init__(self, hearts: Path) -> None:
        self._file = os.open(hearts / REASON, os.O_WRONLY | os.O_CREAT, 0o600)
        os.pwrite(self._file, BLANK, 0)

    def write(self, why: str) -> None:
        os.pwrite(self._file, why.encode()[: len(BLANK)].ljust(len(BLANK)), 0)

    def close(self) -> None:
        os.close(self._file)


class StopFlag:
    """Remember that somebody asked this rank to stop, and who."""

    def __init__(self, file: Path | None, environment: Mapping[str, str] = os.environ) -> None:
        """Look for `file` before every step; one rank does, for the others hear of it."""
        self._file = file
        self._told = Path(environment[FOLDER]) / REASON if environment.get(FOLDER) else None
        self._signal: int | None = None

    def listen(self) -> None:
        """Raise the flag on USR1, TERM and INT from now on; handlers do nothing else."""
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._raise)

    def _raise(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number

    @property
    def reason(self) -> str | None:
        """Return why this rank was asked to stop, or None."""
        if self._signal is not None:
            return f"signal {signal.Signals(self._signal).name}"
        return self.told or ("STOP file" if self._file and self._file.exists() else None)

    @property
    def told(self) -> str | None:
        """Return why the node of this rank wants it to stop, or None."""
        there = self._told is not None and self._told.exists()
        return (self._told.read_text().strip() or None) if self._told and there else None

    @property
    def is_termination(self) -> bool:
        """Tell whether this rank alone heard TERM, and its node knows of no wish to stop.

        So torchrun ends the other ranks when one has failed.
        """
        return self._signal == signal.SIGTERM and self._told is not None and self.told is None


class Relay:
    """Tell the ranks of this node about the first signal that asks it to stop.

    They checkpoint and end. A closed terminal asks for the same as TERM, unless somebody said
    `nohup`. Who sends INT or TERM again does not want to wait for the checkpoint: the node
    `leaves`; but a scheduler that says TERM twice has KILL for that.
    """

    HEARD: ClassVar = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._impatient = (
            (signal.SIGINT,) if environment.get("SLURM_JOB_ID") else (signal.SIGINT, signal.SIGTERM)
        )
        self.received: signal.Signals | None = None
        self.signals = 0
        """How many came."""
        self.leaves = False
        """Whether the ranks shall be ended at once."""
        self._asked_at: float | None = None
        self._notice: Notice | None = None

    def __enter__(self) -> Self:
        self._before = {
            number: signal.signal(number, self._receive)
            for number in self.HEARD
            if signal.getsignal(number) != signal.SIG_IGN
        }
        return self

    def __exit__(self, *_: object) -> None:
        if self._notice is not None:
            self._notice.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def attach(self, hearts: Path) -> None:
        """Tell the ranks that look into this folder from now on, and of what came before."""
        self._notice = Notice(hearts)
        self._tell()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.signals += 1
        what = "stopping as soon as what is done is saved"
        if number in self._impatient:
            if self._asked_at is None:
                self._asked_at = time.monotonic()
                what += "; once more to leave at once, without saving"
            elif not self.leaves and time.monotonic() - self._asked_at > ONE_SIGNAL_SECONDS:
                self.leaves = True
                what = "leaving at once"
            else:
                return
        elif self.received is not None:
            return
        self.received = self.received or signal.Signals(number)
        with contextlib.suppress(OSError):  # the terminal may be what went away
            os.write(2, f"\n{signal.Signals(number).name}: {what}\n".encode())
        self._tell()

    def _tell(self) -> None:
        if self.received and self._notice is not None:
            self._notice.write(f"signal {self.received.name}")
