"""Runs on a real SLURM cluster, and what happens to them there."""

import json
import re
import sys
from pathlib import Path
from typing import Literal

import pytest
from slurm_cluster import Cluster
from slurm_run import (
    ENVIRONMENT,
    EVERY,
    STEPS,
    Submitted,
    by_hand,
    check_like,
    check_whole,
    launch,
    make,
    run_here,
    submit,
    told,
)

from dist_sft import manifest, report, runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
matrix = pytest.mark.matrix


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run on this machine, undisturbed."""
    return run_here(make(tmp_path_factory.mktemp("undisturbed"), "run"))


@pytest.fixture
def recipe(whole: Path) -> Path:
    """Write the same recipe with another run folder, whose path has a space."""
    number = len(list(whole.parent.glob("run *.yaml")))
    return make(whole.parent, f"run {number}")


def stopped(run: Submitted, attempt: int) -> runs.Outcome:
    """Wait until an attempt has stopped, with a checkpoint."""
    run.wait_until(lambda: runs.read_outcome(run.run_dir, attempt) is not None, "an outcome")
    outcome = runs.read_outcome(run.run_dir, attempt)
    assert outcome is not None
    assert outcome.code == runs.STOPPED, outcome
    assert outcome.reason.endswith(f"after step {outcome.step}, which is saved")
    assert EVERY < outcome.step < STEPS
    return outcome


def test_two_nodes_do_as_one_machine(slurm: Cluster, whole: Path, recipe: Path) -> None:
    run = submit(slurm, recipe)
    run.finish()
    check_like(whole, run, attempts=1)
    called = json.loads((run.run_dir / "logs/attempt-0/roll_call.json").read_text())
    assert sorted(node["host"] for node in called["nodes"]) == ["n1", "n2"]

    again = launch(slurm, "train", recipe, "--nodes=2", "--workers-per-node=1")
    assert f"{run.run_dir} is finished already" in again.stdout
    more = by_hand(slurm, run.run_dir)
    more.finish()
    assert "is finished already" in more.log
    assert runs.attempts(run.run_dir) == [0]


@matrix
@pytest.mark.parametrize("deepspeed", ["zero2", "zero3"])
def test_four_nodes_with_two_workers_do_as_one_machine(
    slurm: Cluster, tmp_path: Path, deepspeed: str
) -> None:
    here, there = (make(tmp_path, n, 20, deepspeed=deepspeed) for n in ("here", "there"))
    whole = run_here(here, workers=8)
    run = submit(slurm, there, nodes="4", workers=2)
    run.finish(seconds=240)
    check_like(whole, run, attempts=1, steps=20)


def test_usr1_saves_and_goes_on_in_the_same_job(slurm: Cluster, whole: Path, recipe: Path) -> None:
    run = submit(slurm, recipe)
    run.wait_for_step(EVERY + 10)
    command = (sys.executable, "-m", "dist_sft.cli", "status", run.run_dir)
    told = slurm.run(*command, env=ENVIRONMENT).stdout
    assert f"job {run.job}: RUNNING\n" in told
    assert re.search(rf"^step \d+ of {STEPS}: .*; left: 0:0", told, re.MULTILINE)
    slurm.run("scancel", "--signal=USR1", "--batch", str(run.job))
    outcome = stopped(run, 0)
    assert outcome.reason.startswith("stopped by signal SIGUSR1 ")
    run.finish()
    assert slurm.show(run.job)["Restarts"] == "1"
    check_like(whole, run, attempts=2)
    assert run.log.count("starting workers: 2") == 2, "the log of every start is there"
    assert f"continuing after step {outcome.step} " in run.log


@matrix
def test_a_preempted_job_goes_on_later(slurm: Cluster, whole: Path, recipe: Path) -> None:
    run = submit(slurm, recipe, "--partition", "low")
    run.wait_for_step(EVERY + 10)
    other = slurm.submit(
        "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 3"
    )
    slurm.wait_for(other, "COMPLETED")
    stopped(run, 0)
    run.finish()
    check_like(whole, run, attempts=2)


@pytest.mark.parametrize(
    ("node", "how"),
    [
        ("n2", "power"),
        pytest.param("n1", "power", marks=matrix),
        pytest.param("n2", "slurmd", marks=matrix),
        pytest.param("n1", "net", marks=matrix),
    ],
)
def test_a_node_that_dies_is_replaced(
    slurm: Cluster,
    whole: Path,
    recipe: Path,
    node: str,
    how: Literal["power", "slurmd", "net"],
) -> None:
    run = submit(slurm, recipe)
    run.wait_for_step(EVERY + 10)
    slurm.kill_node(node, how)
    run.wait_until(lambda: slurm.show(run.job)["Restarts"] == "1", "a second start", 90)
    run.finish()
    check_whole(run, attempts=len(runs.attempts(run.run_dir)))
    check_like(whole, run, attempts=2 if how != "slurmd" else len(runs.attempts(run.run_dir)))
    hosts = json.loads((run.run_dir / "logs/attempt-1/slurm.json").read_text())["hosts"]
    assert node not in hosts


@matrix
def test_what_lives_on_a_cut_off_node_commits_nothing(slurm: Cluster, tmp_path: Path) -> None:
    """It needs no network to go on: all its workers are there."""
    steps = 4000
    here, there = (make(tmp_path, name, steps) for name in ("here", "there"))
    run = submit(slurm, there, nodes="1", workers=2)
    run.wait_for_step(EVERY + 10)
    slurm.kill_node("n1", "net")
    run.wait_until(lambda: slurm.show(run.job)["Restarts"] == "1", "a second start", 90)
    run.wait_until(lambda: runs.read_outcome(run.run_dir, 0) is not None, "the orphan ends", 90)
    orphan = runs.read_outcome(run.run_dir, 0)
    assert orphan is not None
    assert orphan.code == runs.FAILED
    assert "a newer attempt works on" in orphan.reason or "has taken over" in orphan.reason
    run.finish(seconds=200)
    check_like(run_here(here), run, attempts=2, steps=steps)


@matrix
def test_a_dead_node_that_stays_dead_is_done_without(
    slurm: Cluster, whole: Path, recipe: Path
) -> None:
    run = submit(slurm, recipe, "--exclude=n3,n4", nodes="1-2")
    run.wait_for_step(EVERY + 10)
    slurm.kill_node("n2", "power")
    run.wait_until(lambda: slurm.show(run.job)["Restarts"] == "1", "a second start", 90)
    run.finish()
    check_whole(run, attempts=2)
    assert json.loads((run.run_dir / "logs/attempt-1/slurm.json").read_text())["hosts"] == ["n1"]
    expected, found = (
        [line["loss"] for line in report.read_steps(folder / "metrics.jsonl")]
        for folder in (whole, run.run_dir)
    )
    assert found == pytest.approx(expected, rel=1e-4)
    changes = (run.run_dir / "changes.jsonl").read_text()
    assert '"nodes": "2 -> 1"' in changes


def test_a_cancelled_job_is_not_put_back_and_continues_when_submitted_again(
    slurm: Cluster, whole: Path, recipe: Path
) -> None:
    run = submit(slurm, recipe)
    run.wait_for_step(EVERY + 10)
    slurm.run("scancel", str(run.job))
    outcome = stopped(run, 0)
    assert outcome.reason.startswith("stopped by signal SIGTERM ")
    slurm.wait_for(run.job, "CANCELLED")

    run = submit(slurm, recipe)
    run.wait_for_step(outcome.step + 10)
    refused = launch(slurm, "train", recipe, "--nodes=2", "--workers-per-node=1", check=False)
    assert refused.returncode == 2
    assert f"job {run.job} of {run.run_dir} is RUNNING" in refused.stderr
    second = by_hand(slurm, run.run_dir)
    second.finish("FAILED")
    assert "is in use by process" in second.log
    assert slurm.state(run.job) == "RUNNING"
    cancelled = launch(slurm, "cancel", run.run_dir)
    assert f"jobs that run save and stop: {run.job}" in cancelled.stdout
    assert stopped(run, 1).reason.startswith("stopped by STOP file ")
    assert slurm.state(run.job) == "FAILED", "with 75, and not put back"
    assert runs.attempts(run.run_dir) == [0, 1]

    run = told(slurm, recipe, launch(slurm, "resume", run.run_dir).stdout)
    run.finish()
    check_like(whole, run, attempts=3)


def test_a_crash_loop_ends(slurm: Cluster, recipe: Path) -> None:
    run = submit(slurm, recipe, "optimizer.lr=1e30", "--restarts=1")
    run.finish("FAILED")
    assert runs.attempts(run.run_dir) == [0, 1]
    assert f"gave up: 2 attempts of job {run.job} in a row brought no new checkpoint" in run.log
    assert "The last one: " in run.log
    assert "in step" in run.log.rpartition("The last one: ")[2]


@matrix
def test_a_chain_goes_on_where_requeueing_is_forbidden(
    slurm: Cluster, whole: Path, recipe: Path
) -> None:
    last = submit(slurm, recipe, "--chain", "3")
    first = Submitted(slurm, last.run_dir, last.job - 2)
    first.wait_for_step(EVERY + 10)
    slurm.run("scancel", "--signal=USR1", "--batch", str(first.job))
    first.finish("FAILED")
    last.finish()
    check_like(whole, last, attempts=2)
    assert "is finished already" in last.log


def test_a_sweep_is_an_array_of_runs(slurm: Cluster, tmp_path: Path) -> None:
    recipe = make(tmp_path, "sweep", 12)
    run = submit(slurm, recipe, "--sweep", "optimizer.lr=1e-3,2e-3")
    run.finish()
    folders = [run.run_dir / f"optimizer.lr={value}" for value in ("1e-3", "2e-3")]
    assert sorted(path for path in run.run_dir.iterdir() if "lr" in path.name) == folders
    losses = []
    for folder in folders:
        assert runs.read_outcome(folder, 0) == runs.Outcome(0, "finished", 12)
        losses.append([line["loss"] for line in report.read_steps(folder / "metrics.jsonl")])
    assert losses[0][0] == losses[1][0]
    assert losses[0][-1] != losses[1][-1]


@matrix
def test_a_job_of_another_user(slurm: Cluster, everyones_folder: Path) -> None:
    recipe = make(everyones_folder, "run", 12)
    for path in (everyones_folder, *everyones_folder.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    size = ("--nodes=2", "--workers-per-node=1")
    done = launch(slurm, "train", recipe, *size, user="nobody")
    run = told(slurm, recipe, done.stdout)
    run.finish()
    check_whole(run, attempts=1, steps=12)
    assert manifest.folder_of(run.run_dir, 12).owner() == "nobody"


FAKE_GPU = """#!/bin/sh
[ "$(hostname)" != n2 ] || echo "GPU 0: an imagined one"
"""


def test_a_bad_node_is_named_and_kept_out(slurm: Cluster, tmp_path: Path) -> None:
    """One of three nodes has a GPU, and the others have none."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvidia-smi").write_text(FAKE_GPU)
    (tmp_path / "bin/nvidia-smi").chmod(0o755)
    site = tmp_path / "site.sh"
    site.write_text(f"export PATH={tmp_path}/bin:$PATH\nunset CUDA_VISIBLE_DEVICES\n")
    recipe = make(tmp_path, "run", 12)
    options = (f"--site={site}", "--exclude-bad-nodes", "--exclude=n4")
    run = submit(slurm, recipe, *options, nodes="2-3")
    run.finish()
    assert "GPUs: n2 has 1; the other 2 have 0" in run.log
    check_whole(run, attempts=2, steps=12)
    assert slurm.show(run.job)["ExcNodeList"] == "n4,n2"


@matrix
@pytest.mark.timeout(600)
def test_a_job_whose_time_is_up_is_put_back(slurm: Cluster, tmp_path: Path) -> None:
    """SLURM looks at time limits every 30 seconds: the signal comes 30 to 60 seconds in."""
    steps = 6000
    here, there = (make(tmp_path, name, steps) for name in ("here", "there"))
    run = submit(slurm, there, "--time=1", "--lead=30")
    run.wait_until(lambda: runs.read_outcome(run.run_dir, 0) is not None, "a stop", 120)
    outcome = runs.read_outcome(run.run_dir, 0)
    assert outcome is not None
    assert outcome.reason.startswith("stopped by signal SIGUSR1 ")
    run.finish(seconds=240)
    check_like(run_here(here), run, len(runs.attempts(run.run_dir)), steps)
