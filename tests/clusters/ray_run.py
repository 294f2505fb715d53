"""A small run on Ray: launched, disturbed, watched."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil
from launching import ROOT, read
from machines import Machine
from ray_cluster import Cluster

from dist_sft import node, report, runs

SECONDS = 180  # of a machine that does other things, too
ENDING = suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess)
"""A process may end while it is looked at."""


class Driver:
    """`launch/ray_job.py` in a process group of its own, as a terminal would start it."""

    def __init__(
        self,
        *arguments: str | Path,
        environment: Mapping[str, str] | None = None,
        on: Machine | None = None,
    ) -> None:
        command = [sys.executable, str(ROOT / "launch/ray_job.py"), *map(str, arguments)]
        self.process = subprocess.Popen(
            command if on is None else on.command(*command, cwd=ROOT),
            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
            env=(os.environ if environment is None else environment)
            | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def finish(self, code: int = 0, seconds: float = SECONDS) -> str:
        """Wait until it has ended with this code; return what it printed."""
        try:
            out, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            out, _ = self.process.communicate()
            raise AssertionError(f"not finished in {seconds} s:\n{out}") from None
        assert self.process.returncode == code, out
        return out

    def ended(self) -> bool:
        return self.process.poll() is not None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the whole group, as a terminal does."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """End it, and what it started on this machine."""
        with ENDING:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with ENDING:
                    process.kill()
            self.process.kill()


class RayRun:
    """A run folder, and who runs it."""

    def __init__(self, run_dir: Path, driver: Driver | None) -> None:
        self.run_dir, self.driver = run_dir, driver

    def steps(self) -> list[int]:
        path = self.run_dir / "metrics.jsonl"
        return [line["step"] for line in report.read_steps(path)] if path.exists() else []

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: (self.steps() or [0])[-1] >= step, f"step {step}")

    def wait_until(self, happened: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not happened():
            assert self.driver or time.monotonic() < deadline, what
            if self.driver and (time.monotonic() > deadline or self.driver.ended()):
                self.driver.kill()
                raise AssertionError(f"{what}: {self.driver.process.communicate()[0]}")
            time.sleep(0.05)

    def ranks(self, job: str = "train") -> list[psutil.Process]:
        """Return the processes of the ranks of the newest attempt, by their numbers."""
        attempt = max(runs.attempts(self.run_dir), default=0)
        command = node.rank_command(self.run_dir, job, attempt)[1:]
        found = {}
        for process in psutil.process_iter():
            with ENDING:
                if process.cmdline()[1:] == command:
                    found[int(process.environ()["RANK"])] = process
        return [process for _, process in sorted(found.items())]

    def outcomes(self) -> list[tuple[int, str]]:
        """Return the code and the reason of every attempt."""
        found = [runs.read_outcome(self.run_dir, a) for a in runs.attempts(self.run_dir)]
        return [(o.code, o.reason) if o else (-1, "") for o in found]

    def hosts(self, attempt: int) -> list[str]:
        path = runs.attempt_dir(self.run_dir, attempt) / "ray.json"
        return json.loads(read(path))["hosts"]


def stopped(run: RayRun, attempt: int, by: str) -> int:
    """Return the step after which an attempt stopped; it is saved."""
    code, reason = run.outcomes()[attempt]
    assert code == runs.STOPPED, reason
    match = re.fullmatch(rf"stopped by {by} after step (\d+), which is saved", reason)
    assert match, reason
    return int(match[1])


def check_no_secret(ray: Cluster, run: RayRun, *secrets: str) -> None:
    """Look into all that the run and the cluster have written, and into what Ray tells."""
    files = [path for path in run.run_dir.rglob("*") if path.is_file()]
    token = Path(ray.environment["RAY_AUTH_TOKEN_PATH"])
    files += [path for path in ray.folder.rglob("*") if path.is_file() and path != token]
    assert any(path.name.startswith("python-core-driver-") for path in files), "Ray's own logs"
    for secret in (*secrets, token.read_text()):
        assert not [path for path in files if secret.encode() in path.read_bytes()]
        assert secret not in ray.jobs()
        assert secret not in ray.dashboard_says("/api/train/v2/runs/v1")


def launch(ray: Cluster | None, recipe: Path, *options: str, **variables: str) -> RayRun:
    """Launch a recipe with two workers, unless told otherwise, on a cluster or on none."""
    where = [] if ray is None else ["--address", ray.address]
    size = [] if any("workers" in option for option in options) else ["--workers=2"]
    environment = (ray.environment if ray else os.environ) | variables
    driver = Driver("train", recipe, *size, *where, *options, environment=environment)
    return RayRun(recipe.with_suffix(""), driver)
