"""What a Ray Train worker does: run one rank, as a process of its own, and tell Ray how it goes.

A rank needs a main thread for its signals, its own output and a way to die alone; Ray runs training
functions in a thread of its worker. So the worker starts the same program as everywhere and watches
it as a node does.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import ray
import ray.train
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.collective import broadcast_from_rank_zero
from ray.util.metrics import Gauge

from dist_sft import manifest, node, process, runs
from dist_sft.config import AnyRecipe, read_config_json
from dist_sft.ray_wish import read_stop
from dist_sft.stopping import Notice
from dist_sft.watchdog import FOLDER, Watchdog

ATTEMPT, NODES = "DIST_SFT_ATTEMPT", "DIST_SFT_NODES"
"""Names of variables by which the controller tells workers what Ray does not, as MASTER_ADDR."""
TICK_SECONDS = 2.0  # between two words with rank 0's worker; Ray takes reports no faster
WORDS_SECONDS = 60.0  # what workers give rank 0's to say its last word
LOOK_SECONDS = 1.0
TAIL_BYTES = 2**16
LAST_LINES = 15
DRAIN, RESIZE = "Ray: a node is drained", "Ray: another number of workers"
GOES_ON = (DRAIN, RESIZE)
"""Why ranks save and end although the run goes on at once, in another attempt."""


class RankFailed(RuntimeError):
    """Report to Ray that a rank has ended, and the run shall be started again."""


class Moved(RuntimeError):
    """Report to Ray that the ranks have saved, to go on in another place."""


@dataclass(frozen=True)
class Work:
    """What all workers of a run are told."""

    run_dir: str
    folder: str
    """The launcher's working folder, which paths of the recipe may be relative to."""
    gpus: bool
    threads: int = 1
    """Of a rank's computation."""


class Told:
    """Why this rank was asked to stop; passed on to it once."""

    leaves = False

    def __init__(self, hearts: Path) -> None:
        self.received: str | None = None
        self._notice, self._lock = Notice(hearts), threading.Lock()

    def tell(self, why: str) -> None:
        with self._lock:
            if self.received is None:
                self.received = why
                self._notice.write(why)

    def close(self) -> None:
        """Say nothing any more, as the rank has ended."""
        with self._lock:
            self.received = self.received or "its end"
            self._notice.close()


class News(NamedTuple):
    """What rank 0's worker tells the others."""

    stop: str | None
    reports: bool
    """Whether all report to Ray now: a report is a collective."""
    over: bool


def run_rank(config: dict[str, Any]) -> None:
    """Run one rank to its end; raise where Ray shall start the run again."""
    work = Work(**config)
    logging.getLogger().setLevel(logging.WARNING)  # Ray tells of every report
    here, run_dir = ray.train.get_context(), Path(work.run_dir)
    attempt, rank = int(os.environ[ATTEMPT]), here.get_world_rank()
    recipe = read_config_json(run_dir)
    gpus = node.count_gpus() if work.gpus else 0
    place = {
        "RANK": rank,
        "LOCAL_RANK": here.get_local_rank(),
        "WORLD_SIZE": here.get_world_size(),
        "LOCAL_WORLD_SIZE": here.get_local_world_size(),
        "GROUP_RANK": here.get_node_rank(),
        "GROUP_WORLD_SIZE": os.environ[NODES],
    }
    with started(work, recipe, attempt, place, work.threads, gpus) as (child, watchdog, told):
        ended, lost = threading.Event(), threading.Event()
        link = threading.Thread(
            target=talk, args=(run_dir, attempt, rank, told, ended, lost), daemon=True, name="talk"
        )
        link.start()
        node.watch(child, watchdog, told, run_dir, attempt, 1, lost)
        judge(run_dir, attempt, rank, child.returncode, told.received)
        ended.set()
        link.join(WORDS_SECONDS)


@contextlib.contextmanager
def started(
    work: Work, recipe: AnyRecipe, attempt: int, place: Mapping[str, Any], threads: int, gpus: int
) -> Iterator[tuple[subprocess.Popen[bytes], Watchdog, Told]]:
    """Run a rank's process within a block; `place` has the variables that say who it is."""
    run_dir, limits = Path(work.run_dir), recipe.watchdog
    with ExitStack() as stack:
        folder = TemporaryDirectory(prefix="dist_sft-", dir=session_folder())
        hearts = Path(stack.enter_context(folder))
        watchdog = Watchdog(hearts, limits.seconds, limits.slow_seconds)
        stack.callback(lambda: process.kill(watchdog.living()))
        errors = stack.enter_context(
            open(log_of(run_dir, attempt, place["RANK"]), "a", encoding="utf-8")
        )
        child = subprocess.Popen(
            node.rank_command(run_dir, recipe.job, attempt),
            cwd=work.folder,
            env=os.environ
            | node.rank_environment(threads, gpus)
            | {name: str(value) for name, value in place.items()}
            | {FOLDER: str(hearts), process.PARENT: str(os.getpid())}
            | ({} if gpus else {"CUDA_VISIBLE_DEVICES": ""}),
            stderr=errors,
            start_new_session=True,
        )
        stack.callback(lambda: node.kill(child) if child.poll() is None else None)
        told = stack.enter_context(contextlib.closing(Told(hearts)))
        yield child, watchdog, told


def session_folder() -> str | None:
    """Return Ray's own folder on this node: what a killed worker leaves there goes with Ray."""
    here = ray._private.worker._global_node
    return str(here.get_session_dir_path()) if here else None


def log_of(run_dir: Path, attempt: int, rank: int) -> Path:
    """Return where is what a rank says before its own log begins."""
    return runs.attempt_dir(run_dir, attempt) / f"worker-{rank}.log"


def last_words(run_dir: Path, attempt: int, rank: int, code: int) -> str:
    """Say how a rank ended that could not say so itself."""
    words = log_of(run_dir, attempt, rank).read_text(encoding="utf-8", errors="replace")
    said = words.splitlines()[-LAST_LINES:] if code >= 0 else []
    return "\n".join([node.explain_exit(code), *said])


def judge(run_dir: Path, attempt: int, rank: int, code: int, asked: str | None) -> None:
    """Return where the run is over for now; raise where Ray shall start it again.

    What a rank could not say itself is written down in its place.
    """
    if code == 0 and asked not in GOES_ON:
        return
    if code == 0 and rank != 0 and asked in GOES_ON:
        await_outcome(run_dir, attempt)  # Ray ends rank 0 as soon as another worker has moved
    if code == 0 or (asked and code < 0):
        with contextlib.suppress(OSError):
            if rank == 0 and runs.read_outcome(run_dir, attempt) is None:
                reason = f"stopped by {asked} before the workers could write a checkpoint"
                left = runs.Outcome(runs.STOPPED, reason, -1, asked_by=asked)
                runs.write_outcome(run_dir, attempt, left)
        outcome = runs.read_outcome(run_dir, attempt)
        if asked in GOES_ON and not (outcome and outcome.code == runs.FINISHED):
            raise Moved(asked)
        return
    if not runs.has_failed(run_dir, attempt, rank):
        reason = last_words(run_dir, attempt, rank, code)
        with contextlib.suppress(OSError):
            runs.write_failure(
                run_dir, attempt, rank, runs.Outcome(runs.FAILED, reason, -1), killed=code < 0
            )
    raise RankFailed(f"rank {rank}: {node.explain_exit(code)}")


def await_outcome(run_dir: Path, attempt: int) -> None:
    """Return when rank 0 has said how it went, or a rank has failed; it may export the model."""
    deadline = time.monotonic() + node.OUTCOME_SECONDS
    while runs.read_outcome(run_dir, attempt) is None and node.blame(run_dir, attempt) is None:
        if time.monotonic() > deadline:
            return
        time.sleep(LOOK_SECONDS)


def talk(
    run_dir: Path,
    attempt: int,
    rank: int,
    told: Told,
    ended: threading.Event,
    lost: threading.Event,
) -> None:
    """Hear what all ranks shall do, and report to Ray, until rank 0 has ended.

    Every worker takes part in every round. One that does not come any more has failed, and Ray ends
    all of them.
    """
    reporter = Reporter(run_dir, attempt)
    while True:
        over = ended.wait(TICK_SECONDS)
        news = None
        if rank == 0:
            stop, reports = None, False
            with contextlib.suppress(OSError):  # the file system may answer next time
                if max(runs.attempts(run_dir), default=0) > attempt:
                    lost.set()
                stop, reports = read_stop(run_dir, attempt), reporter.has_news()
            news = News(stop, reports, over)
        news = News(*broadcast_from_rank_zero(news))
        if news.stop:
            told.tell(news.stop)
        elif ray.train.get_preemption_info() is not None:
            told.tell(DRAIN)
        if news.reports:
            ray.train.report(
                reporter.metrics,
                checkpoint=reporter.checkpoint() if rank == 0 else None,
                checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
            )
        if news.over:
            return


class Reporter:
    """Read in the run folder what there is to report to Ray.

    Its dashboard shows runs and their workers, but no number that is reported to Ray Train. So they
    are told to Ray's metrics, too, which it shows with Grafana.
    """

    def __init__(self, run_dir: Path, attempt: int) -> None:
        self._run_dir, self._attempt = run_dir, attempt
        self._step = self._saved = 0
        self._newest = max(manifest.folders(run_dir), default=0)
        self._gauge = Gauge("dist_sft", "Numbers of the newest step", ("run", "number"))
        self.metrics: dict[str, Any] = {}

    def has_news(self) -> bool:
        """Look for a step that was not reported yet."""
        line = last_step(self._run_dir / "metrics.jsonl", self._attempt)
        if line is None or line["step"] == self._step:
            return False
        self._step = line["step"]
        self.metrics = dict(flatten(line))
        self._newest = max(manifest.folders(self._run_dir), default=0)
        for name, value in (*self.metrics.items(), ("checkpoint", self._newest)):
            if isinstance(value, int | float):
                self._gauge.set(value, {"run": str(self._run_dir), "number": name})
        return True

    def checkpoint(self) -> Checkpoint | None:
        """Return the newest checkpoint, once."""
        if self._newest <= self._saved:
            return None
        self._saved = self._newest
        return Checkpoint(str(manifest.folder_of(self._run_dir, self._newest)))


def flatten(line: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return a step's numbers under names as trackers have them, as eval_loss/zh."""
    return [
        (f"{name}/{key}" if key else name, number)
        for name, value in line.items()
        for key, number in (value.items() if isinstance(value, dict) else [("", value)])
    ]


def last_step(metrics: Path, attempt: int) -> dict[str, Any] | None:
    """Return the newest step that this attempt took, from the end of its metrics."""
    try:
        with metrics.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return None
    for text in reversed(lines):
        with contextlib.suppress(ValueError):  # half a line
            line: dict[str, Any] = json.loads(text)
            if "loss" in line and line["attempt"] == attempt:
                return line
    return None
