"""What a person sees: a progress bar on a terminal, and the same as plain lines in the log."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 2.0


def redirect_output(log: Path) -> RichConsole:
    """Send everything this process prints to its log; return a console on the old stdout.

    File descriptors are redirected, so that libraries in C++ end up in the log as well.
    """
    terminal = _lenient(os.dup(1))
    with open(log, "a", encoding="utf-8") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = _lenient(1), _lenient(2)
    return RichConsole(file=terminal, highlight=False, soft_wrap=True)


class _Lenient(io.TextIOWrapper):
    """A terminal that may go away, a log on a disk that may be full: a run outlives both."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def _lenient(descriptor: int) -> _Lenient:
    stream = os.fdopen(descriptor, "wb", closefd=False)
    return _Lenient(stream, encoding="utf-8", line_buffering=True)


class Console:
    """Tell one person what is going on: rank 0 speaks to the terminal, every rank to its log."""

    def __init__(self, terminal: RichConsole | None) -> None:
        self._terminal = terminal
        self._bar: Progress | None = None
        self._last_line = 0.0
        self._total, self._unit = 0, "step"
        self._warm: tuple[float, int] | None = None  # when the first step ended, and its number

    def say(self, line: str) -> None:
        """Print one line."""
        print(line, flush=True)
        if self._terminal is not None:
            (self._bar.console if self._bar else self._terminal).print(line, markup=False)

    def start(self, total: int, done: int, what: str = "training", unit: str = "step") -> None:
        """Begin to show progress: `done` of `total` units of the work that is called `what`."""
        self._total, self._unit = total, unit
        if self._terminal is None or not self._terminal.is_terminal:
            return
        self._bar = Progress(
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._terminal,
            speed_estimate_period=120,
            redirect_stdout=False,  # what is printed belongs in the log, and is redirected there
            redirect_stderr=False,
        )
        self._bar.add_task("", total=total, completed=done)
        self._bar.start()

    def is_due(self) -> bool:
        """Tell whether it is time for another line."""
        return time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES

    def step(self, step: int, text: str, *, important: bool) -> None:
        """Show a finished step; lines come every few seconds, but always for important steps."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, description=text)
        now = time.monotonic()
        self._warm = self._warm or (now, step)
        if important or self.is_due():
            self._last_line = now
            line = f"{self._unit} {step}/{self._total}  {text}{self._eta(now, step)}"
            print(line, flush=True)
            if self._terminal is not None and self._bar is None:
                self._terminal.print(line, markup=False)

    def _eta(self, now: float, step: int) -> str:
        """Foretell the time left from the steps so far, but for the first, which warms up."""
        began, first = self._warm or (now, step)
        if step == first or step == self._total:
            return ""
        seconds = (now - began) / (step - first) * (self._total - step)
        return f"  ETA {timedelta(seconds=round(seconds))}"

    def close(self) -> None:
        """Take the progress bar down."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def printable(text: str, also: str = "") -> str:
    """Replace what no terminal can show, or what could steer it: a model says anything."""
    return "".join(c if (c.isprintable() and c != "\ufffd") or c in also else "·" for c in text)
