"""`slurm/ray.sbatch` with SLURM's commands and Python's programs played by small ones."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from launching import ROOT

from dist_sft import batch_job, runs
from dist_sft.batch_job import Job
from dist_sft.config import read_recipe
from dist_sft.runs import Launch

RUNNING = "JobId=7 JobState=RUNNING Reason=None Restarts=0 PreemptTime=None EndTime=Unknown"

SCONTROL = """#!/bin/bash
cd "$STAGE"
echo "scontrol $*" >>called
case "$*" in
"show hostnames"*) printf "127.0.0.1\\nn2\\n" ;;
*"show job"*) cat job ;;
"show config") echo "KillWait                = 4 sec" ;;
requeue*) sed -i 's/Restarts=0/Restarts=1/' job ;;
esac
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
# As the node, listens until the job is over; as the launcher, does what the test says.
PYTHON = """#!{python}
import os, signal, socket, sys, time
from pathlib import Path

stage, module, arguments = Path(os.environ["STAGE"]), sys.argv[2], sys.argv[3:]
with open(stage / "called", "a") as file:
    print(module, *arguments, file=file)
if module == "dist_sft.ray_node":
    (stage / "tried").touch()
    if os.environ.get("RAY") == "fails":
        sys.exit("no Ray here")
    assert Path(os.environ["RAY_AUTH_TOKEN_PATH"]).stat().st_mode & 0o077 == 0
    assert len(Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()) == 64
    port = 0 if os.environ.get("RAY") == "hangs" else int(arguments[1])
    with socket.create_server((arguments[0], port)):
        while not (Path(arguments[2]) / "over").exists():
            time.sleep(0.05)
    (stage / "ray ended").touch()
elif module == "dist_sft.ray_job":
    def hear(number, _):
        (stage / "heard").write_text(signal.Signals(number).name)
        if not (stage / "deaf").exists():
            sys.exit(75)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, hear)
    (stage / "up").touch()
    while not (stage / "code").exists():
        time.sleep(0.05)
    sys.exit(int((stage / "code").read_text()))
else:
    os.execv("{python}", ["{python}", *sys.argv[1:]])
"""


class Batch:
    """The batch script at work, in its folder."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder = folder
        programs = {"scontrol": SCONTROL, "srun": SRUN, "p": PYTHON.format(python=sys.executable)}
        for name, text in programs.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        (folder / "job").write_text(RUNNING)
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                ["bash", ROOT / "slurm/ray.sbatch", "train", "my recipe.yaml", "--workers=2"],
                cwd=folder,
                env=os.environ
                | {
                    "PATH": f"{folder}:{os.environ['PATH']}",
                    "PYTHONPATH": str(ROOT),
                    "STAGE": str(folder),
                    "DIST_SFT_PYTHON": str(folder / "p"),
                    "SLURM_JOB_ID": "7",
                    "SLURM_JOB_NUM_NODES": "2",
                    "SLURM_JOB_NODELIST": "n[1-2]",
                    **variables,
                },
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def called(self) -> str:
        return (self.folder / "called").read_text()

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def own(self) -> Path:
        return self.folder / ".ray-7"

    def wait_for(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not happened():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def finish(self, code: int) -> str:
        assert self.process.wait(timeout=60) == code, self.log
        assert (self.folder / "ray ended").exists()
        assert not self.own.exists()
        return self.log

    def heard(self) -> str:
        return (self.folder / "heard").read_text()

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def batch(tmp_path: Path) -> Iterator[Batch]:
    with closing(Batch(tmp_path)) as started:
        started.wait_for((tmp_path / "up").exists)
        yield started


@pytest.mark.parametrize("code", [runs.FINISHED, runs.WRONG_INPUT, runs.FAILED])
def test_a_run_that_ends_by_itself(batch: Batch, code: int) -> None:
    (batch.folder / "code").write_text(str(code))
    batch.finish(code)
    assert (
        "dist_sft.ray_job train my recipe.yaml --workers=2 --address 127.0.0.1:20007"
        in batch.called
    )
    assert "requeue" not in batch.called


def test_ray_does_not_start(tmp_path: Path) -> None:
    """It is no mistake of the recipe: what Ray said is shown, and the run is not begun."""
    with closing(Batch(tmp_path, RAY="fails")) as batch:
        assert batch.process.wait(timeout=60) == runs.FAILED, batch.log
        assert "Ray did not start on 127.0.0.1; the end of its log:\nno Ray here" in batch.log
        assert "dist_sft.ray_job" not in batch.called
        assert "requeue" not in batch.called
        assert not batch.own.exists()


@pytest.mark.parametrize("told", ["shell", "nodes"])
def test_a_preemption_while_ray_starts(tmp_path: Path, told: str) -> None:
    with closing(Batch(tmp_path, RAY="hangs")) as batch:
        batch.wait_for((tmp_path / "tried").exists)
        (tmp_path / "job").write_text(RUNNING.replace("PreemptTime=None", "PreemptTime=2026"))
        if told == "shell":
            batch.process.send_signal(signal.SIGTERM)
        else:
            (batch.own / "notice").touch()
        batch.finish(runs.STOPPED)
        assert "scontrol requeue incomplete 7\n" in batch.called
        assert "dist_sft.ray_job" not in batch.called


def test_a_run_that_is_slow_to_save_leaves_no_secret(batch: Batch) -> None:
    """KILL follows KillWait seconds after a cancelled job's TERM."""
    (batch.folder / "deaf").touch()
    (batch.folder / "job").write_text(RUNNING.replace("RUNNING", "COMPLETING"))
    asked_at = time.monotonic()
    batch.process.send_signal(signal.SIGTERM)
    batch.wait_for(lambda: not (batch.own / "token").exists())
    assert time.monotonic() - asked_at < 4, "KillWait"


def test_time_is_nearly_up(batch: Batch) -> None:
    batch.process.send_signal(signal.SIGUSR1)
    batch.finish(75)
    assert batch.heard() == "SIGUSR1"
    assert "scontrol requeue incomplete 7\n" in batch.called


def test_a_preemption_that_only_the_nodes_hear_of(batch: Batch) -> None:
    (batch.folder / "job").write_text(RUNNING.replace("PreemptTime=None", "PreemptTime=2026"))
    (batch.own / "notice").touch()
    batch.finish(75)
    assert batch.heard() == "SIGTERM"
    assert "scontrol requeue incomplete 7\n" in batch.called


def test_a_cancelled_job_is_not_put_back(batch: Batch) -> None:
    (batch.folder / "job").write_text(RUNNING.replace("RUNNING", "COMPLETING"))
    batch.process.send_signal(signal.SIGTERM)
    batch.wait_for((batch.folder / "ray ended").exists)
    batch.wait_for(lambda: not batch.own.exists())
    time.sleep(1)  # SLURM ends the script
    assert batch.process.poll() is None
    assert batch.heard() == "SIGTERM"
    assert "requeue" not in batch.called


def test_a_persons_term_ends_the_job(batch: Batch) -> None:
    batch.process.send_signal(signal.SIGTERM)
    batch.finish(75)
    assert "requeue" not in batch.called


def test_a_run_that_is_too_slow_goes_on_from_an_older_checkpoint(batch: Batch) -> None:
    run_dir = batch.folder / "run"
    (run_dir / "logs/attempt-0").mkdir(parents=True)
    recipe = batch.folder / "recipe.yaml"
    recipe.write_text(f"run_dir: {run_dir}\nmodel: {{path: m}}\ndata: {{train: [{{path: r}}]}}\n")
    (run_dir / "config.json").write_text(read_recipe(recipe).to_json())
    runs.write_launch(run_dir, Launch("ray", 1, 2, {"restarts": 3}, "x"))
    batch_job.write(run_dir, 0, Job("7", 0, []))
    (batch.own / "run_dir").write_text(str(run_dir))
    (batch.folder / "deaf").touch()
    end = datetime.now() + timedelta(seconds=4)
    (batch.folder / "job").write_text(RUNNING.replace("Unknown", f"{end:%Y-%m-%dT%H:%M:%S}"))
    batch.process.send_signal(signal.SIGUSR1)
    assert "the run has not ended in time" in batch.finish(75)
    assert "scontrol requeue incomplete 7\n" in batch.called
