"""Run the real launcher from tests, and watch it."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[1]
SECONDS = 240


def write(recipe: dict[str, Any], run_dir: Path) -> Path:
    """Write a recipe beside its run folder."""
    path = run_dir.parent / f"{run_dir.name}.yaml"
    path.write_text(yaml.safe_dump({**recipe, "run_dir": str(run_dir)}))
    return path


def start(
    recipe: Path, *overrides: str, workers: int = 2, job: str = "train"
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "launch/local.py", job, str(recipe), *overrides,
         "--workers", str(workers)],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")},
    )  # fmt: skip


def run(
    recipe: Path, *overrides: str, workers: int = 2, job: str = "train"
) -> tuple[int, str, str]:
    """Return (exit code, stdout, stderr)."""
    process = start(recipe, *overrides, workers=workers, job=job)
    out, err = process.communicate(timeout=SECONDS)
    return process.returncode, out, err


def ranks_of(launcher: subprocess.Popen[str], job: str = "train") -> list[psutil.Process]:
    """Return the processes of the ranks, as soon as torchrun has started them."""
    found = []
    for process in psutil.Process(launcher.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            command = process.cmdline()
            if f"dist_sft.{job}" in command and "dist_sft.deaf_torchrun" not in command:
                found.append(process)
    return found


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    metrics = run_dir / "metrics.jsonl"
    wait_until(lambda: read(metrics).count('"loss"') >= step, process)


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if happened():
            return
        time.sleep(0.01)
    if process.poll() is None:  # it, its torchrun and its ranks hold the pipes open
        for started in (*psutil.Process(process.pid).children(recursive=True), process):
            started.kill()
    raise AssertionError(f"it did not happen: {process.communicate()}")


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
