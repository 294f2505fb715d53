"""Stop at a step boundary: a signal or the STOP file raises a flag that the ranks agree on.

A node relays signals to its ranks (`Relay`); a rank remembers them until a step ends (`StopFlag`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from types import FrameType
from typing import ClassVar, Self

ONE_SIGNAL_SECONDS = 1.0
"""Within it a signal that comes again is the same one: shells and schedulers send to a process and
to its group."""


class StopFlag:
    """Remember that somebody asked this rank to stop, and who."""

    def __init__(self, file: Path | None) -> None:
        """Look for `file` before every step; one rank does, for the others hear of it."""
        self._file = file
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
        return "STOP file" if self._file and self._file.exists() else None


class Relay:
    """Pass the first signal that asks this node to stop on to torchrun, and only that one.

    The ranks checkpoint and end; a second signal would make torchrun leave them alone. A closed
    terminal asks for the same as TERM, unless somebody said `nohup`. Who sends INT or TERM again
    does not want to wait for the checkpoint: the node `leaves`.
    """

    PASSED_ON: ClassVar = {
        signal.SIGTERM: signal.SIGTERM,
        signal.SIGINT: signal.SIGINT,
        signal.SIGUSR1: signal.SIGUSR1,
        signal.SIGHUP: signal.SIGTERM,
    }

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.signals = 0
        """How many came, those that were not passed on among them."""
        self.leaves = False
        """Whether the ranks shall be ended at once."""
        self._asked_at: float | None = None
        self._passed_on = False
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._before = {
            number: signal.signal(number, self._receive)
            for number in self.PASSED_ON
            if signal.getsignal(number) != signal.SIG_IGN
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def attach(self, child: subprocess.Popen[bytes]) -> None:
        """Send signals to this process from now on, and one that came before it started."""
        self._child = child
        self._pass_on()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.signals += 1
        what = "stopping as soon as a step ends"
        if number in (signal.SIGINT, signal.SIGTERM):
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
        if self.received and self._child and not self._passed_on:
            self._passed_on = True  # first: a handler may interrupt `attach`
            self._child.send_signal(self.PASSED_ON[self.received])
