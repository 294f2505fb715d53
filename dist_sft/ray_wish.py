"""A wish that an attempt stops, from launcher or controller to Ray's workers: a file in its folder.

The workers are on other nodes, and all see the run folder.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from dist_sft import runs
from dist_sft.stopping import REASON


def ask_to_stop(run_dir: Path, attempt: int, why: str) -> None:
    """Ask the workers of an attempt to let their ranks save and end; the first wish counts."""
    with contextlib.suppress(OSError):
        path = runs.attempt_dir(run_dir, attempt) / REASON
        if not path.exists():
            runs.write_atomically(path, why)


def read_stop(run_dir: Path, attempt: int) -> str | None:
    """Return why the launcher or the controller wants this attempt to stop."""
    try:
        return (runs.attempt_dir(run_dir, attempt) / REASON).read_text(encoding="utf-8") or None
    except FileNotFoundError:
        return None
