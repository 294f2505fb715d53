"""How far a generation run is: what each worker says of itself, and what follows for the whole.

A worker's word is `logs/attempt-N/progress-R.json`, see `Word`. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from dist_sft import parts, runs
from dist_sft.console import Console
from dist_sft.parts import Plan, Tally
from dist_sft.stopping import StopFlag
from dist_sft.watchdog import Heart

LOOK_SECONDS = 1.0  # between two looks at what others do, and whether to stop
LISTING_SHARE = 20  # of a worker's time, one in so many seconds at most goes into listing parts
NOTICE_SECONDS = 3.0  # what a node gets to say that it heard a signal, too
PATIENCE_SECONDS = 5.0  # what others get to finish a part, where this worker has answered none
FAILURES_SHOWN = 5


class Interrupted(Exception):
    """Leave, as somebody asked this worker to stop; the text says who."""


class Abandoned(Exception):
    """Leave a part, as another worker has finished it."""


@dataclass
class Word:
    """What a worker says of itself."""

    tokens: int = 0
    """Generated in this attempt."""
    seconds: float = 0.0
    """Since it began to answer."""
    answered: int = 0
    """Rows of the parts that it has finished in this attempt."""
    part: int = -1
    rows: int = 0
    """Finished rows of that part."""


@dataclass(frozen=True)
class Overview:
    """How far the whole run is."""

    rows: int
    finished_rows: int
    """Those of finished parts, and those that workers of the newest attempt have finished."""
    tokens_per_second: float
    """Of all workers together, since they began."""
    rows_per_second: float
    age: float | None
    """Seconds since a worker of the newest attempt said something; None where none has."""

    @classmethod
    def read(cls, run_dir: Path, attempt: int, plan: Plan) -> Overview:
        """Look at a run folder, and at what the workers of this attempt say."""
        done = parts.finished(run_dir)
        finished = sum(len(plan.rows_of(part)) for part in done)
        words, ages = [], []
        for path in runs.attempt_dir(run_dir, attempt).glob("progress-*.json"):
            with contextlib.suppress(OSError, ValueError):  # it may be replaced in this moment
                words.append(Word(**json.loads(path.read_text(encoding="utf-8"))))
                ages.append(time.time() - path.stat().st_mtime)
        finished += sum(word.rows for word in words if word.part not in done)
        seconds = max((word.seconds for word in words), default=0.0) or 1e-9
        answered = sum(word.answered + word.rows for word in words)
        return cls(
            plan.rows,
            min(finished, plan.rows),
            sum(word.tokens for word in words) / seconds,
            answered / seconds,
            max(0.0, min(ages)) if ages else None,
        )

    @property
    def eta(self) -> str:
        """Return the time left in words, with a semicolon before; "" where nothing is known."""
        left = self.rows - self.finished_rows
        if not left or not self.rows_per_second:
            return ""
        return f"; left: {timedelta(seconds=round(left / self.rows_per_second))}"


class Progress:
    """Choose the parts that a worker answers, and tell how it gets on while it does."""

    def __init__(
        self,
        run_dir: Path,
        attempt: int,
        plan: Plan,
        worker: tuple[int, int],
        heart: Heart,
        stop: StopFlag,
        console: Console,
    ) -> None:
        """Know the run; `worker` is its number and how many there are.

        The first one shows on `console` how the run gets on.
        """
        self._run_dir, self._attempt, self._plan = run_dir, attempt, plan
        self._rank, self._workers = worker
        self._heart, self._stop, self._console = heart, stop, console
        self._file = runs.attempt_dir(run_dir, attempt) / f"progress-{self._rank}.json"
        self._began = time.monotonic()
        self._word, self._answers = Word(), 0
        self._looked = 0.0
        self._ended_at: float | None = None
        self._patience = PATIENCE_SECONDS
        self.rows_before = sum(len(plan.rows_of(part)) for part in parts.finished(run_dir))
        """Finished when this worker began."""

    @property
    def seconds(self) -> float:
        """Return the time since it began to answer."""
        return time.monotonic() - self._began

    def take(self) -> Iterator[int]:
        """Yield parts until all of the run are finished. Raises Interrupted.

        First those that nobody of this attempt has begun. Then those that others have not finished
        in the time that this worker needs for one: the first to finish counts, and both would give
        the same bytes.
        """
        self._began = time.monotonic()
        claims, taken, listed = parts.Claims(self._run_dir, self._attempt), set[int](), 0.0
        for part in parts.in_order(self._rank, self._workers, self._plan.parts):
            if time.monotonic() - listed >= LOOK_SECONDS:
                taken = claims.there() | parts.finished(self._run_dir)
                listed = time.monotonic()
                self._look()
            if part not in taken and claims.make(part):
                yield part
        since = time.monotonic()
        while True:
            began = time.monotonic()
            done = parts.finished(self._run_dir)
            missing = [part for part in range(self._plan.parts) if part not in done]
            if not missing:
                return
            self._heart.beat("waiting")
            self._look()
            self._tell()
            now = time.monotonic()
            if now - since > self._patience:
                yield missing[self._rank % len(missing)]
                since = time.monotonic()
            else:
                time.sleep(max(LOOK_SECONDS, LISTING_SHARE * (now - began)))

    @contextlib.contextmanager
    def working_on(self, part: int) -> Iterator[None]:
        """Tell that this worker answers a part; leave it where another one was faster."""
        began = time.monotonic()
        self._word.part, self._word.rows, self._answers = part, 0, 0
        try:
            yield
            self._patience = max(PATIENCE_SECONDS, time.monotonic() - began)
            self._word.answered += len(self._plan.rows_of(part))
            (runs.attempt_dir(self._run_dir, self._attempt) / runs.FRUITFUL).touch()
        except Abandoned:
            pass
        finally:
            self._word.part, self._word.rows = -1, 0
            self._tell()

    def tick(self, tokens: int, answers: int) -> None:
        """Hear that so many tokens were generated, and answers finished. Raises to leave."""
        self._heart.beat("generating")
        self._word.tokens += tokens
        self._answers += answers
        self._word.rows = self._answers // self._plan.samples
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            self._look()
            if parts.folder_of(self._run_dir, self._word.part).exists():
                raise Abandoned
            self._tell()

    def _look(self) -> None:
        """Raise Interrupted where somebody asked for a stop, or torchrun ends this worker."""
        self._looked = time.monotonic()
        if self._stop.is_termination:
            # The node hears a scheduler's TERM, too, perhaps a moment later.
            self._ended_at = self._ended_at or self._looked
            if self._looked - self._ended_at > NOTICE_SECONDS:
                raise RuntimeError("ended, as another worker has failed")
        elif self._stop.reason is not None:
            raise Interrupted(self._stop.reason)

    def _tell(self) -> None:
        """Say how this worker gets on; the first one, how the run does."""
        self._word.seconds = self.seconds
        temporary = self._file.with_suffix(f".{os.getpid()}.tmp")
        with contextlib.suppress(OSError):  # a full disk says so where it matters
            temporary.write_text(json.dumps(asdict(self._word)))
            temporary.rename(self._file)
        if self._rank == 0 and self._console.is_due():
            view = Overview.read(self._run_dir, self._attempt, self._plan)
            text = f"{view.tokens_per_second:,.0f} tokens/s"
            self._console.step(view.finished_rows, text, important=False)


def describe(tally: Tally) -> list[str]:
    """Return the end of a run in lines for a person."""
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(tally.reasons.items()))
    lines = [
        f"{tally.rows:,} rows, {tally.lines:,} answers ({reasons})",
        f"{tally.prompt_tokens:,} prompt tokens, {tally.generated_tokens:,} generated",
    ]
    if tally.prompts_truncated:
        lines.append(f"prompts cut on the left: {tally.prompts_truncated:,}")
    if tally.out_of_memory:
        lines.append(
            f"{tally.out_of_memory} batches did not fit into memory and were split: another run "
            "may give other bytes there; set a smaller generate.batch_tokens"
        )
    if tally.errors:
        listed = ", ".join(f"{reason} {count:,}" for reason, count in tally.errors.most_common())
        lines.append(f"rows that could not be answered: {tally.errors.total():,} ({listed})")
        lines += [f"  row {row}: {why}" for row, why in tally.failures[:FAILURES_SHOWN]]
    return lines
