"""Stop at a step boundary: a signal or the STOP file raises a flag that the ranks agree on."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType


class StopFlag:
    """Remember that somebody asked this rank to stop, and who."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / "STOP"
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
        return "STOP file" if self._file.exists() else None
