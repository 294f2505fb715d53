"""Stop at a step boundary: a signal or the STOP file raises a flag that the ranks agree on.

A node relays signals to its ranks (`Relay`); a rank remembers them until a step ends (`StopFlag`).

Schedulers send a signal to a node's process, to its whole group, or to every process of a job, and
torchrun between node and ranks abandons its ranks when it gets a second one. So torchrun ignores
all signals but one, which its node alone sends; why it does is in a file.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import ClassVar, Self

from dist_sft.watchdog import FOLDER

ONE_SIGNAL_SECONDS = 1.0
"""Within it a signal that comes again is the same one: shells and schedulers send to a process and
to its group."""


RELAYED = signal.SIGHUP
"""What a node sends to torchrun, and torchrun to its ranks."""
IGNORED = ("TERM", "INT", "USR1", "QUIT")
"""What torchrun is started with ignored, as a shell names them."""
REASON = "stop"
"""Name of the file, in the folder of heartbeats, that says which signal the node got."""


class StopFlag:
    """Remember that somebody asked this rank to stop, and who."""

    def __init__(self, file: Path | None, environment: Mapping[str, str] = os.environ) -> None:
        """Look for `file` before every step; one rank does, for the others hear of it."""
        self._file = file
        self._told = Path(environment[FOLDER]) / REASON if environment.get(FOLDER) else None
        self._signal: int | None = None

    def listen(self) -> None:
        """Raise the flag on signals from now on; handlers do nothing else."""
        for number in (RELAYED, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._raise)

    def _raise(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number

    @property
    def reason(self) -> str | None:
        """Return why this rank was asked to stop, or None."""
        if self._signal == RELAYED and self._told and self._told.exists():
            return f"signal {self._told.read_text()}"
        if self._signal is not None:
            return f"signal {signal.Signals(self._signal).name}"
        return "STOP file" if self._file and self._file.exists() else None


class Relay:
    """Pass the first signal that asks this node to stop on to torchrun, and only that one.

    The ranks checkpoint and end. A closed terminal asks for the same as TERM, unless somebody said
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
        """How many came, those that were not passed on among them."""
        self.leaves = False
        """Whether the ranks shall be ended at once."""
        self._asked_at: float | None = None
        self._passed_on = False
        self._child: subprocess.Popen[bytes] | None = None
        self._told: Path | None = None

    def __enter__(self) -> Self:
        self._before = {
            number: signal.signal(number, self._receive)
            for number in self.HEARD
            if signal.getsignal(number) != signal.SIG_IGN
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def attach(self, child: subprocess.Popen[bytes], hearts: Path) -> None:
        """Signal this process from now on, and for one that came before; say why in `hearts`."""
        self._child, self._told = child, hearts / REASON
        self._pass_on()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.signals += 1
        what = "stopping as soon as a step ends"
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
        self._pass_on()

    def _pass_on(self) -> None:
        if self.received and self._child and self._told and not self._passed_on:
            self._passed_on = True  # first: a handler may interrupt `attach`
            self._told.write_text(self.received.name)
            self._child.send_signal(RELAYED)
