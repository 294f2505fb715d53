"""When checkpoints are made: in the background, one at a time; old ones go when new ones stay."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dist_sft import checkpoint
from dist_sft.config import Checkpoint
from dist_sft.engine import Engine
from dist_sft.export import persistent_buffers
from dist_sft.metrics import MetricsFile

DEFAULT_MINUTES = 15.0


class Saver:
    """Save without holding up training: for as long as the state is copied, and no longer.

    Every rank calls `save` and `finish` at the same step boundaries. In between, ranks vote with
    `is_written` whether the checkpoint that is under way can be finished.
    """

    def __init__(
        self,
        run_dir: Path,
        attempt: int,
        engine: Engine,
        facts: dict[str, Any],
        write_model: Callable[..., None],
        settings: Checkpoint,
        *,
        say: Callable[[str], None],
        beat: Callable[[str], None],
        metrics: MetricsFile | None,
    ) -> None:
        """Keep `facts` in every manifest; see `checkpoint.Saving` for `write_model`."""
        self._run_dir, self._attempt, self._engine = run_dir, attempt, engine
        self._facts, self._write_model, self._settings = facts, write_model, settings
        self._say, self._beat, self._metrics = say, beat, metrics
        self._snapshot = checkpoint.Snapshot(engine) if settings.asynchronous else None
        self._saving: checkpoint.Saving | None = None
        self._began = time.monotonic()  # of the last one
        self._blocked = 0.0
        self._succeeded = True
        self.seconds = 0.0
        """What the last checkpoint took, from its begin until it had its name."""
        self._pruning = threading.Thread(target=self._prune)

    @property
    def is_due(self) -> bool:
        """Tell on rank 0, whose clock counts, whether the last checkpoint is too long ago."""
        minutes = (time.monotonic() - self._began) / 60
        default = math.inf if self._settings.every else DEFAULT_MINUTES
        return dist.get_rank() == 0 and minutes >= (self._settings.minutes or default)

    @property
    def is_written(self) -> bool:
        """Tell whether this rank has done its part of the checkpoint that is under way."""
        return self._saving is not None and self._saving.is_written

    def save(self, step: int, **facts: Any) -> None:
        """Begin to save the state after `step`, when the checkpoint before is finished.

        `facts` about this step are kept in its manifest, beside those of the run.
        """
        self.finish()
        self._beat("saving")
        self._began = time.monotonic()
        self._saving = checkpoint.Saving(
            self._run_dir,
            step,
            self._engine,
            self._facts | facts,
            partial(self._write_model, buffers=persistent_buffers(self._engine.module)),
            self._attempt,
            self._settings.mode,
            self._snapshot,
        )
        self._blocked = time.monotonic() - self._began
        if not self._settings.asynchronous:
            self.finish()

    def finish(self) -> bool:
        """Commit what is under way, and prune; tell whether the last checkpoint could be saved.

        One that cannot be written does not end the run.
        """
        saving, self._saving = self._saving, None
        if saving is None:
            return self._succeeded
        self._beat("saving")
        began = time.monotonic()
        try:
            saving.finish()
            self._succeeded = True
        except checkpoint.SaveFailed as error:
            self._succeeded = False
            self._say(f"NOT SAVED: {error}")
            self._note(saving.step, "checkpoint_failed", reason=str(error))
            return False
        self.close()
        now = time.monotonic()
        self.seconds = now - self._began
        if not saving.is_there:
            self._note(
                saving.step,
                "checkpoint",
                seconds=self.seconds,
                blocked_seconds=self._blocked + now - began,
            )
        if dist.get_rank() == 0:
            self._pruning = threading.Thread(target=self._prune, name="prune", daemon=True)
            self._pruning.start()
        return True

    def close(self) -> None:
        """Wait until old checkpoints are gone."""
        if self._pruning.is_alive():
            self._pruning.join()

    def _prune(self) -> None:
        try:
            checkpoint.prune(self._run_dir, self._settings.keep, self._settings.keep_every)
        except OSError as error:
            self._say(f"old checkpoints cannot be removed: {error}")

    def _note(self, step: int, event: str, **values: Any) -> None:
        if self._metrics:
            self._metrics.write(step=step, event=event, **values)
