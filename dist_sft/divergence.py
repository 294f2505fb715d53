"""A step whose loss or gradient is not finite: stop, leave it out, or go back to a checkpoint.

No engine lets such a step touch weights or moments; what is decided here is how the run goes on.
Loss and norm are equal on all ranks, so that every rank decides the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from torch import Tensor

from dist_sft import world
from dist_sft.batches import Batch
from dist_sft.store import Dataset

Policy = Literal["stop", "skip", "rollback"]
Verdict = Literal["taken", "skipped", "rollback"]

MAX_OVERFLOWS = 15  # steps in a row; the loss scale is halved in each, and is 65536 at first
MAX_NAMED = 20  # rows in a message
ADVICE = (
    "Look at the rows with `dist-sft inspect RECIPE --row N`; lower optimizer.lr, lengthen "
    "optimizer.warmup_steps, or set optimizer.clip"
)


class Diverged(RuntimeError):
    """Report a loss or gradient that is not finite."""


class Streaks(TypedDict):
    """How many steps in a row, up to now, were not taken."""

    skipped: int
    overflows: int


class Guard:
    """Judge every step; remember how many in a row were not taken."""

    def __init__(self, policy: Policy, max_skipped: int, before: Streaks | None = None) -> None:
        """Go on from the streaks that were under way `before`."""
        self._policy = policy
        self._max_skipped = max_skipped
        self._skipped = before["skipped"] if before else 0
        self._overflows = before["overflows"] if before else 0

    @property
    def streaks(self) -> Streaks:
        """Return what a checkpoint has to remember, for a stop must not make a streak shorter."""
        return {"skipped": self._skipped, "overflows": self._overflows}

    def judge(
        self,
        step: int,
        loss: float,
        grad_norm: float,
        *,
        overflowed: bool,
        name_rows: Callable[[], BadRows],
    ) -> tuple[Verdict, str]:
        """Say whether the step was taken, and if not, what was wrong and what to do.

        `overflowed`: float16's loss scale was too high, which passes by itself. `name_rows` is
        called on every rank or on none. Raises Diverged where the run must stop.
        """
        scaling = overflowed and math.isfinite(loss)
        self._overflows = self._overflows + 1 if scaling else 0
        if self._overflows >= MAX_OVERFLOWS:
            raise Diverged(
                f"steps {step - self._overflows + 1} to {step} were all skipped: gradients "
                "overflow float16 however small the loss scale is made. Use model.dtype: bfloat16"
            )
        if scaling or (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._skipped = 0
            return "taken", ""
        reason = explain_divergence(loss, grad_norm, step, name_rows())
        if self._policy == "stop":
            raise Diverged(f"{reason}. {ADVICE}, or see train.on_divergence")
        if self._skipped < self._max_skipped:
            self._skipped += 1
            return "skipped", reason
        if self._policy == "skip":
            raise Diverged(
                f"{reason}, after {self._skipped} steps in a row were left out for the same reason "
                f"(train.max_skipped_steps: {self._max_skipped}). {ADVICE}"
            )
        self._skipped = 0
        return "rollback", reason


@dataclass(frozen=True)
class BadRows:
    """The rows of a step, over all ranks, whose micro-batch's loss is not finite; or all of it."""

    bad: list[str]
    all: list[str]


def name_rows(batches: Sequence[Batch], losses: Sequence[Tensor], dataset: Dataset) -> BadRows:
    """Name the rows that a step was computed from; every rank calls this together."""
    finite = [bool(torch.isfinite(loss)) for loss in losses]
    names = [
        [f"{name} row {row}" for name, row in map(dataset.locate, map(int, batch.samples))]
        for batch in batches
    ]
    bad = [name for good, rows in zip(finite, names, strict=True) if not good for name in rows]
    return BadRows(world.gather(bad), world.gather([name for rows in names for name in rows]))


def explain_divergence(loss: float, grad_norm: float, step: int, rows: BadRows) -> str:
    """Say what stopped being finite, where, and in which rows."""
    what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient's norm is {grad_norm}"
    suspects = rows.bad or rows.all
    which = "the micro-batches of these rows" if rows.bad else "its rows"
    more = f" and {len(suspects) - MAX_NAMED} more" if len(suspects) > MAX_NAMED else ""
    return f"the {what} in step {step}; {which}: {', '.join(suspects[:MAX_NAMED])}{more}"
