"""Where a run goes on from: the newest good checkpoint, or an older one after it diverged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_sft import checkpoint, manifest, runs, world
from dist_sft.divergence import ADVICE, Diverged, Streaks
from dist_sft.engine import Engine
from dist_sft.errors import UserError
from dist_sft.manifest import Level
from dist_sft.rollback import Rollback, read_rollbacks, record_rollback

ORIGINS = {
    "data": "the encoded training data (a file of data.train, the template or the tokenizer)",
    "model": "the model that the run began from (its config, or the sizes of its files)",
}
"""What a checkpoint belongs to, by section of the recipe."""
SAY_WHAT = {"data": ("data",), "model": ("model.path", "model.revision", "model.config")}
"""Settings that say what these are: whoever lets one of them change expects something else."""


class Restorer:
    """Load checkpoints into the engine; every rank calls these methods together."""

    def __init__(
        self,
        run_dir: Path,
        attempt: int,
        engine: Engine,
        level: Level,
        options: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:
        """Take `trust_checkpoint` and `allow_change` from the launch's options."""
        self._run_dir, self._attempt, self._engine = run_dir, attempt, engine
        self._level, self._say = level, say
        self._trusting = bool(options.get("trust_checkpoint"))
        self._allowed: list[str] = options.get("allow_change", [])
        self.rollbacks = world.on_rank_0(lambda: read_rollbacks(run_dir))

    def passed(self, step: int) -> bool:
        """Tell whether the run went back over a step."""
        return any(rollback.covers(step) for rollback in self.rollbacks)

    def restore(self, facts: dict[str, Any]) -> tuple[int, Streaks | None]:
        """Load the newest good checkpoint; return its step and streaks, or 0 where there is none.

        Raises UserError where it was trained on other data, for the order of rows would be another
        one, or began from another model, unless a person has allowed that.
        """
        found = world.on_rank_0(lambda: list(manifest.folders(self._run_dir)))
        step = self._newest(lambda step: False)
        if step is None:
            if world.on_rank_0(lambda: bool(manifest.every_folder(self._run_dir))):
                raise UserError(
                    f"all checkpoints in {self._run_dir}/checkpoints are of steps that the run "
                    "went back over (rollbacks.json). Put the one that it went back to in its "
                    "place, or give another run_dir to start anew"
                )
            return 0, None
        folder = manifest.folder_of(self._run_dir, step)
        saved = manifest.read(folder)
        changed = {
            key: f"{saved[key][:12]} -> {facts[key][:12]}"
            for key in ORIGINS
            if saved[key] != facts[key]
        }
        for key in changed:
            if not self._allows(key):
                raise UserError(
                    f"{ORIGINS[key]} has changed since {folder} was written. Put it back, give "
                    f"another run_dir, or launch with --allow-change {key} to go on all the same"
                )
            self._say(f"goes on although {ORIGINS[key]} has changed since step {step}")
        if changed:
            hashes = {f"{key} (hash)": change for key, change in changed.items()}
            world.on_rank_0(lambda: runs.record_change(self._run_dir, self._attempt, hashes))
        checkpoint.restore(folder, self._engine)
        over = [str(newer) for newer in reversed(found) if newer > step]
        skipped = f", passed over: {', '.join(over)} (see above)" if over else ""
        self._say(
            f"continuing after step {step} (checked by {self._level}; checkpoints found: "
            f"{len(found)}{skipped})"
        )
        # A streak that led to going back ended there.
        return step, None if self.passed(step + 1) else saved.get("streaks")

    def go_back(self, step: int, reason: str) -> None:
        """Load the newest checkpoint that has not led to `step`; the steps since do not count.

        Raises Diverged where there is none.
        """
        # A stop right after going back has saved the same state once more.
        tried = {step for last in self.rollbacks[-1:] for step in (last.checkpoint, last.step)}
        target = self._newest(tried.__contains__)
        if target is None:
            older = "older " if tried else ""
            raise Diverged(f"{reason}; there is no {older}checkpoint to go back to. {ADVICE}")
        rollback = Rollback(target, step)

        def record() -> None:
            runs.check_newest(self._run_dir, self._attempt)
            record_rollback(self._run_dir, rollback, self._attempt, reason)

        world.on_rank_0(record)
        self.rollbacks.append(rollback)
        checkpoint.restore(manifest.folder_of(self._run_dir, target), self._engine)
        self._say(f"went back to step {target}; steps {target + 1} to {step} do not count")

    def _newest(self, ruled_out: Callable[[int], bool]) -> int | None:
        return checkpoint.newest_good(
            self._run_dir, self._level, self._say, trusting=self._trusting, ruled_out=ruled_out
        )

    def _allows(self, origin: str) -> bool:
        return any(
            name == origin or any(f"{name}.".startswith(f"{x}.") for x in SAY_WHAT[origin])
            for name in self._allowed
        )
