"""What `slurm/ray.sbatch` asks Python, and what it starts on every node."""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

pytest.importorskip("ray")

from dist_sft import batch_job, ray_batch, ray_job, ray_node, runs
from dist_sft.batch_job import Fate, Job
from dist_sft.config import read_recipe
from dist_sft.errors import UserError
from dist_sft.process import state_of
from dist_sft.runs import Launch, Outcome

JOB = Job("7", 0, [])
RUNS, ENDS = Fate(True), Fate(False)
PREEMPTED, TIMED_OUT = Fate(True, preempted=True), Fate(False, timed_out=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make the job's own folder, which knows a run that has begun an attempt."""
    run_dir = tmp_path / "my run"
    (run_dir / "logs/attempt-0").mkdir(parents=True)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"run_dir: {run_dir}\nmodel: {{path: m}}\ndata: {{train: [{{path: rows.json}}]}}\n"
    )
    (run_dir / "config.json").write_text(read_recipe(recipe).to_json())
    runs.write_launch(run_dir, Launch("ray", 1, 2, {"restarts": 1}, "x"))
    batch_job.write(run_dir, 0, JOB)
    (tmp_path / "run_dir").write_text(str(run_dir))
    return tmp_path


SAVED = Outcome(runs.STOPPED, "saved", 3, asked_by="signal SIGTERM")
LOST = Outcome(runs.FAILED, "a node died", -1)


@pytest.mark.parametrize(
    ("code", "outcome", "asked", "fate", "answer"),
    [
        (0, None, "USR1", RUNS, "exit 0"),
        (2, None, "", RUNS, "exit 2"),
        (75, Outcome(75, "saved", 3, asked_by="signal SIGUSR1"), "USR1", RUNS, "requeue"),
        (75, LOST, "USR1", RUNS, "requeue"),  # it waited for nodes
        (75, SAVED, "TERM", PREEMPTED, "requeue"),
        (1, None, "USR1", RUNS, "requeue"),  # it was too slow
        (75, SAVED, "TERM", TIMED_OUT, "requeue"),
        (75, SAVED, "TERM", ENDS, "wait"),  # cancelled
        (75, SAVED, "TERM", RUNS, "exit 75"),  # a person's wish
        (75, Outcome(75, "saved", 3, asked_by="STOP file"), "", RUNS, "exit 75"),
        (1, LOST, "", RUNS, "requeue"),
    ],
)
def test_how_a_job_ends(
    folder: Path, code: int, outcome: Outcome | None, asked: str, fate: Fate, answer: str
) -> None:
    if outcome is not None:
        runs.write_outcome(folder / "my run", 0, outcome)
    assert ray_batch.end(folder, code, asked, fate, JOB) == answer


@pytest.mark.parametrize(
    ("code", "asked", "fate", "answer"),
    [
        (75, "USR1", RUNS, "requeue"),  # while it waited for room
        (75, "TERM", PREEMPTED, "requeue"),
        (75, "TERM", ENDS, "wait"),
        (75, "TERM", RUNS, "exit 75"),
        (1, "", RUNS, "exit 1"),  # Ray did not start
        (1, "TERM", PREEMPTED, "requeue"),
    ],
)
@pytest.mark.parametrize("job", [JOB, None])
def test_how_a_job_ends_that_began_no_attempt(
    folder: Path, code: int, asked: str, fate: Fate, answer: str, job: Job | None
) -> None:
    """Of an earlier start of the job, or of none at all, there is one."""
    if job is None:
        (folder / "run_dir").unlink()
    assert ray_batch.end(folder, code, asked, fate, Job("7", 1, [])) == answer


def test_a_job_without_progress_is_not_put_back_for_ever(folder: Path) -> None:
    for attempt in (1, 2):
        (folder / f"my run/logs/attempt-{attempt}").mkdir()
        batch_job.write(folder / "my run", attempt, JOB)
    assert ray_batch.end(folder, 1, "USR1", RUNS, JOB) == "exit 1"


def test_the_launcher_tells_which_run_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ray_batch.FOLDER, raising=False)
    assert ray_batch.note(tmp_path / "run") is None
    monkeypatch.setenv(ray_batch.FOLDER, str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert ray_batch.note(tmp_path / "run") == JOB
    assert (tmp_path / "run_dir").read_text() == str(tmp_path / "run")


def test_a_requeue_does_not_undo_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "STOP").touch()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(UserError, match="it was SLURM that started it again"):
        ray_job.remove_stop(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    ray_job.remove_stop(tmp_path)
    ray_job.remove_stop(tmp_path)
    assert not (tmp_path / "STOP").exists()


# A process that its parent leaves behind, and a folder that is open to all, as Ray's are; a node's
# Ray ends when told to.
RAY = """
import pathlib, subprocess, sys, time
subprocess.Popen(["sh", "-c", "sleep 611 &"]).wait()
folder, own = map(pathlib.Path, sys.argv[1:])
own.mkdir()
own.chmod(0o777)
(folder / "own").write_text(str(own))
(folder / f"up-{len(list(folder.glob('up-*')))}").touch()
while not (folder / "die").exists():
    time.sleep(0.05)
(folder / "die").unlink()
sys.exit(3)
"""
NODE = """
import sys
from pathlib import Path
from dist_sft import ray_node
ray_node.AGAIN_SECONDS = 0
ray_node.ray_command = lambda *words: [sys.executable, "-c", {program!r}, {folder!r}, words[-1]]
ray_node.own_address = lambda *_: "127.0.0.1"
sys.argv[1:] = ["localhost", "1", {folder!r}]
sys.exit(ray_node.main())
"""


JOB_ID = f"0{os.getpid()}"


class Started:
    """`ray_node` at work."""

    def __init__(self, folder: Path, node: int) -> None:
        self.folder = folder
        code = NODE.format(program=RAY, folder=str(folder))
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ
            | {"SLURM_NODEID": str(node), "SLURM_CPUS_ON_NODE": "1", "SLURM_JOB_ID": JOB_ID},
        )

    def wait_for(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not happened():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def below(self) -> list[psutil.Process]:
        """Return what it started, the orphans included."""
        sessions = {child.pid for child in psutil.Process(self.process.pid).children()}
        return [p for p in psutil.process_iter() if ray_node.session_of(p.pid) in sessions]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Callable[[int], Started]]:
    started: list[Started] = []

    def start(number: int) -> Started:
        started.append(Started(tmp_path, number))
        started[-1].wait_for((tmp_path / "up-0").exists)
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            (tmp_path / ray_node.OVER).touch()
            one.process.wait(timeout=30)


def test_a_notice_ends_no_ray(node: Callable[[int], Started]) -> None:
    """SLURM sends TERM to every process of a step."""
    one = node(0)
    below = one.below()
    assert len(below) == 2
    for process in (*below, one.process):
        process.send_signal(signal.SIGTERM)
    one.wait_for((one.folder / ray_node.NOTICE).exists)
    time.sleep(0.2)
    assert all(state_of(process.pid) for process in below)
    (one.folder / ray_node.OVER).touch()
    assert one.process.wait(timeout=30) == 0
    assert not psutil.wait_procs(below, timeout=5)[1]


def test_rays_folder_is_closed_to_others(node: Callable[[int], Started]) -> None:
    """What was left by the job before it was put back goes, too."""
    left = Path(f"/tmp/ray-{JOB_ID}-0-left")
    (left / "ray").mkdir(parents=True)
    one = node(0)
    folder = Path((one.folder / "own").read_text()).parent
    assert folder.parent == Path("/tmp")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not left.exists()
    (one.folder / ray_node.OVER).touch()
    assert one.process.wait(timeout=30) == 0
    assert not folder.exists()


def test_ray_is_started_again_on_a_node(node: Callable[[int], Started]) -> None:
    one = node(1)
    before = one.below()
    (one.folder / "die").touch()
    one.wait_for((one.folder / "up-1").exists)
    assert not psutil.wait_procs(before, timeout=5)[1]


def test_the_cluster_ends_with_its_head(node: Callable[[int], Started]) -> None:
    one = node(0)
    below = one.below()
    (one.folder / "die").touch()
    assert one.process.wait(timeout=30) == 3
    assert not psutil.wait_procs(below, timeout=5)[1]
