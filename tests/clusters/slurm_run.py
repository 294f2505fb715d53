"""A small run on the test cluster: submitted, disturbed, watched, compared."""

import fcntl
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_recipe
from launching import ROOT, read
from slurm_cluster import Cluster

from dist_sft import manifest, parts, report, runs, verify_resume

STEPS, EVERY = 600, 50  # a dozen milliseconds each: long enough to be disturbed
SLOW_STEPS, SLOW_EVERY = 200, 20  # of a run that is as slow as a test needs it
DISTURBED = SLOW_EVERY + 10  # the step at which something happens to it
ENVIRONMENT = {
    "PYTHONPATH": f"{ROOT}:{Path(__file__).parent / 'slowly'}",
    "OMP_NUM_THREADS": "1",
}


class Submitted(NamedTuple):
    """A job of a run folder."""

    cluster: Cluster
    run_dir: Path
    job: int

    @property
    def log(self) -> str:
        """What the batch shell said, of all its starts."""
        return read(self.run_dir / f"logs/slurm-{self.job}.out")

    def steps(self) -> list[int]:
        path = self.run_dir / "metrics.jsonl"
        return [line["step"] for line in report.read_steps(path)] if path.exists() else []

    def wait_for_step(self, step: int, seconds: float = 60) -> None:
        self.wait_until(lambda: (self.steps() or [0])[-1] >= step, f"step {step}", seconds)

    def wait_for_parts(self, count: int) -> None:
        """Wait until so many parts of a generation run are finished."""
        self.wait_until(lambda: len(parts.finished(self.run_dir)) >= count, f"{count} parts")

    def wait_until(
        self, happened: Callable[[], bool], what: str, seconds: float = 60, pause: float = 0.2
    ) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, f"not in {seconds:.0f} s: {what}\n{self.explain()}"
            time.sleep(pause)

    def slow(self, seconds: float, attempts: int = 1) -> None:
        """Let steps take longer by so much, in so many attempts from the first one on."""
        slow(self.run_dir, seconds, attempts)

    def signal(self, name: str, task: str = "") -> None:
        """Send a signal to the batch shell, as SLURM does before the time limit."""
        self.cluster.run("scancel", f"--signal={name}", "--batch", f"{self.job}{task}")

    def wait_for_restart(self, count: int = 1) -> None:
        """Wait until SLURM has put the job back so many times."""
        self.wait_until(
            lambda: self.cluster.show(self.job)["Restarts"] == str(count),
            f"start {count + 1}", 120, pause=0.5,
        )  # fmt: skip

    def finish(self, state: str = "COMPLETED", seconds: float = 120) -> None:
        """Wait until the job has ended, well unless told otherwise."""
        try:
            self.cluster.wait_for(self.job, state, seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.explain()}") from None

    def explain(self) -> str:
        logs = sorted((self.run_dir / "logs").glob("attempt-*/*"))
        ends = [f"--- {path}\n{read(path)[-1500:]}" for path in logs if path.is_file()]
        return "\n".join([f"--- the job's log\n{self.log}", *ends])


def make(folder: Path, name: str, steps: int = STEPS, **sections: Any) -> Path:
    """Write a recipe; runs of the same folder share their data."""
    settings = {
        "train": {"steps": steps},
        "eval": {"every": None},
        "checkpoint": {"every": EVERY, "keep": 3},
    }
    recipe = tiny_recipe.make_recipe(folder)
    return tiny_recipe.write(recipe, folder / name, **{**settings, **sections})


def make_slow(folder: Path, name: str, seconds: float = 0.1, attempts: int = 1) -> Path:
    """Write a recipe of few steps that take long in the first attempts."""
    saving = {"every": SLOW_EVERY, "keep": 3}
    recipe = make(folder, name, SLOW_STEPS, checkpoint=saving)
    slow(recipe.with_suffix(""), seconds, attempts)
    return recipe


def slow(run_dir: Path, seconds: float, attempts: int) -> None:
    """Tell the ranks of a run how slow they are; see `slowly`."""
    Path(f"{run_dir}.slow").write_text(f"{seconds} {attempts}")


def launch(
    cluster: Cluster, *arguments: str | Path, user: str | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run `launch/slurm.py` on the login node."""
    command = (sys.executable, ROOT / "launch/slurm.py", *arguments)
    return cluster.run(*command, env=ENVIRONMENT, user=user, check=check)


def submit(
    cluster: Cluster,
    recipe: Path,
    *options: str,
    nodes: str = "2",
    workers: int = 1,
    job: str = "train",
) -> Submitted:
    """Submit a recipe with so many workers on each of its nodes."""
    size = ("--nodes", nodes, f"--workers-per-node={workers}")
    return told(cluster, recipe, launch(cluster, job, recipe, *size, *options).stdout)


def told(cluster: Cluster, recipe: Path, text: str) -> Submitted:
    """Read the number of the job, the last one of a chain, from what a launcher printed."""
    return Submitted(
        cluster, recipe.with_suffix(""), int(re.findall(r"^job (\d+): ", text, re.MULTILINE)[-1])
    )


def by_hand(cluster: Cluster, run_dir: Path, *options: str) -> Submitted:
    """Submit a prepared run folder by sbatch alone."""
    output = f"--output={run_dir}/logs/slurm-%j.out"
    script = ROOT / "slurm/train.sbatch"
    job = cluster.submit(
        "--nodes=2", "--exclusive", output, *options, script, run_dir, env=ENVIRONMENT
    )
    return Submitted(cluster, run_dir, job)


def run_here(recipe: Path, workers: int = 2, job: str = "train") -> Path:
    """Run a recipe by `launch/local.py`, undisturbed."""
    command = [sys.executable, "launch/local.py", job, str(recipe), "--workers", str(workers)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | ENVIRONMENT, text=True, capture_output=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return recipe.with_suffix("")


@contextmanager
def common(tmp_path_factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """Give a folder that all of xdist's workers have in common, to one of them at a time."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def stopped(run: Submitted, attempt: int) -> runs.Outcome:
    """Wait until an attempt has stopped, with a checkpoint."""
    run.wait_until(lambda: runs.read_outcome(run.run_dir, attempt) is not None, "an outcome")
    outcome = runs.read_outcome(run.run_dir, attempt)
    assert outcome is not None
    assert outcome.code == runs.STOPPED, outcome
    assert outcome.reason.endswith(f"after step {outcome.step}, which is saved")
    assert SLOW_EVERY < outcome.step < SLOW_STEPS
    return outcome


def status(run: Submitted) -> str:
    """Return what `dist-sft status` says on the login node."""
    command = (sys.executable, "-m", "dist_sft.cli", "status", run.run_dir)
    return run.cluster.run(*command, env=ENVIRONMENT).stdout


def runs_on(run: Submitted, attempt: int) -> int:
    """Wait until an attempt has begun; return the step it goes on from."""
    metrics = run.run_dir / "metrics.jsonl"

    def lines() -> list[dict[str, Any]]:
        found = [json.loads(text) for text in metrics.read_text().splitlines()]
        return [line for line in found if line["attempt"] == attempt and "event" not in line]

    run.wait_until(lambda: bool(lines()), f"attempt {attempt}")
    return int(lines()[0]["step"])


def check_like(whole: Path, run: Submitted, attempts: int, steps: int | None = None) -> None:
    """The run has every step once, is bit-identical to an undisturbed one, and says how it went."""
    steps = steps or steps_of(run.run_dir)
    verdict = verify_resume.compare(whole, run.run_dir, steps)
    assert verdict.equal, verdict.told
    check_whole(run, attempts, steps)


def check_whole(run: Submitted, attempts: int, steps: int | None = None) -> None:
    steps = steps or steps_of(run.run_dir)
    assert run.steps() == list(range(1, steps + 1))
    assert runs.attempts(run.run_dir) == list(range(attempts))
    assert runs.read_outcome(run.run_dir, attempts - 1) == runs.Outcome(0, "finished", steps)
    folders = sorted(path.name for path in (run.run_dir / "checkpoints").iterdir())
    assert folders == [path.name for path in manifest.folders(run.run_dir).values()]


def steps_of(run_dir: Path) -> int:
    """Return how many steps a run is to take."""
    return int(json.loads((run_dir / "config.json").read_text())["train"]["steps"])
