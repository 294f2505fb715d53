"""Processes of this machine: who they are, whether they live, and that none is left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

PR_SET_PDEATHSIG = 1  # linux/prctl.h
KILL_SECONDS = 10.0  # what the kernel gets to end a process; one that waits for a disk may stay


def here() -> str:
    """Return where process numbers mean what they mean to this process, and which of them it sees.

    Hosts and containers that share a name differ in this, and so does a host after it was started
    again. With the `hidepid` option of /proc, users see only their own processes.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}/user {os.getuid()}"


def start_of(pid: int) -> str | None:
    """Return when a process started, in ticks since boot, or None where it has ended.

    From the kernel, as process numbers are used again: psutil tells seconds of the clock, which may
    be set.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # the name in brackets may hold anything
    return None if fields[0] == "Z" else fields[19]


def state_of(pid: int) -> str | None:
    """Return what the kernel says a process does, or None where it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        state: str = psutil.Process(pid).status()
        if state not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return state
    return None


def kill(pids: Iterable[int]) -> None:
    """Kill processes, and see them ended."""
    pids = list(pids)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + KILL_SECONDS
    while any(state_of(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)


PARENT = "DIST_SFT_PARENT"
"""Name of the variable by which a process tells its child its number."""


def die_with_parent() -> None:
    """Let the kernel kill this process as soon as the one that started it has ended.

    A killed launcher must not leave workers behind that hold GPUs until they notice. A parent that
    named itself may have ended since: a rank imports for seconds before it comes here.
    """
    parent = int(os.environ.get(PARENT) or os.getppid())
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:  # it was faster
        os._exit(1)
