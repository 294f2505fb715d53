"""Where a run went back to an older checkpoint, as its folder remembers it. Imports no torch."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_sft.errors import UserError
from dist_sft.runs import write_atomically

FILE = "rollbacks.json"


@dataclass(frozen=True)
class Rollback:
    """Going back from `step` to the state after `checkpoint`; the steps between count for nothing.

    The run goes on with the step after `step`, as it would meet the same batches in the same state
    again (Chowdhery et al., 2022, arXiv:2204.02311, section 5.1).
    """

    checkpoint: int
    step: int

    def covers(self, step: int) -> bool:
        """Tell whether a step is one of those that were gone back over."""
        return self.checkpoint < step <= self.step

    def spoils(self, step: int) -> bool:
        """Tell whether the checkpoint of a step holds what was gone back from.

        That of `step` itself does not: it can only have been saved afterwards.
        """
        return self.checkpoint < step < self.step


def read_rollbacks(run_dir: Path) -> list[Rollback]:
    """Return the rollbacks of a run, from its `rollbacks.json`."""
    return [Rollback(line["checkpoint"], line["step"]) for line in _read(run_dir)]


def record_rollback(run_dir: Path, rollback: Rollback, attempt: int, reason: str) -> None:
    """Write a rollback down before the run acts on it: every later attempt must know."""
    line = {"time": time.time(), "attempt": attempt, **asdict(rollback), "reason": reason}
    text = json.dumps([*_read(run_dir), line], indent=1, ensure_ascii=False)
    write_atomically(run_dir / FILE, text + "\n")


def _read(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / FILE
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text("utf-8")) if path.exists() else []
    except ValueError as error:
        raise UserError(f"{path} is no JSON any more: {error}") from None
    return found
