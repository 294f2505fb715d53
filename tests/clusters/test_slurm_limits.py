"""Runs on a real SLURM cluster whose time is up, or that others push aside."""

import json
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from slurm_run import (
    DISTURBED,
    Submitted,
    by_hand,
    check_like,
    launch,
    runs_on,
    status,
    stopped,
    submit,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
matrix = pytest.mark.matrix


STOP_WORKERS = "kill -STOP $(pgrep -f 'dist_sft[.]train')"


def move_end(run: Submitted, seconds: int) -> None:
    """Let the time limit of a job be so near, where it may be minutes off."""
    run.cluster.run("scontrol", "update", f"JobId={run.job}", f"EndTime=now+{seconds}")


def have_time(run: Submitted) -> None:
    run.cluster.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=10")


def preempt(run: Submitted, nodes: int) -> None:
    """Let a job of a higher partition take all nodes for a moment."""
    run.wait_for_step(DISTURBED)
    other = run.cluster.submit(
        *("--partition=high", f"--nodes={nodes}", "--exclusive", "--output=/dev/null"),
        "--wrap=sleep 3",
    )
    run.cluster.wait_for(other, "COMPLETED")


@matrix
def test_a_job_whose_time_is_up_without_a_warning_is_put_back(
    rich: Cluster, whole: Path, recipe: Path
) -> None:
    """First workers end within KillWait, then one does not."""
    launch(rich, "train", recipe, "--nodes=2", "--workers-per-node=1", "--prepare")
    run = by_hand(rich, recipe.with_suffix(""), "--time=1", "--signal=B:CONT@1")
    run.slow(0.1, attempts=2)
    run.wait_for_step(DISTURBED)
    rich.run("sh", "-c", STOP_WORKERS, on="n2")  # until SLURM sends CONT before TERM
    run.wait_for_restart()
    assert stopped(run, 0).asked_by == "signal SIGTERM"
    run.wait_until(lambda: rich.state(run.job) == "RUNNING", "the second start")
    again = rf"(while {STOP_WORKERS}; do sleep 0.1; done) >/dev/null 2>&1 &"
    run.wait_for_step(runs_on(run, 1))
    rich.run("sh", "-c", again, on="n2")
    move_end(run, 1)  # SLURM looks every 30 s
    run.wait_for_restart(2)
    told = run.log.partition("attempt 1: ")[2]
    assert "not all workers have ended in time; the job ends without them" in told
    have_time(run)
    run.finish()
    check_like(whole, run, attempts=3)


@matrix
def test_a_job_whose_time_is_up_is_put_back(slurm: Cluster, whole: Path, recipe: Path) -> None:
    """SLURM looks every 30 s whether a job is to hear of it, and tells it up to 30 s early.

    So one with a limit of a minute, say, may hear of it before there is anything to save.
    """
    run = submit(slurm, recipe, "--time=10", "--lead=30")
    run.slow(0.4)
    run.wait_for_step(DISTURBED)
    move_end(run, 45)
    run.wait_for_restart()
    have_time(run)
    assert stopped(run, 0).asked_by == "signal SIGUSR1"
    run.finish()
    check_like(whole, run, attempts=2)


@matrix
def test_a_worker_that_cannot_save_in_time_is_not_waited_for(
    slurm: Cluster, whole: Path, recipe: Path
) -> None:
    launch(slurm, "train", recipe, "--nodes=2", "--workers-per-node=1", "--prepare")
    run = by_hand(slurm, recipe.with_suffix(""), "--signal=B:CONT@1")
    run.wait_for_step(DISTURBED)
    slurm.run("sh", "-c", STOP_WORKERS, on="n2")
    move_end(run, 30)
    run.signal("USR1")
    run.wait_for_restart()
    have_time(run)
    assert "not all workers have ended in time; the job ends without them" in run.log
    run.finish()
    check_like(whole, run, attempts=2)


def test_a_job_whose_workers_alone_hear_of_a_preemption_goes_on_later(
    rich: Cluster, whole: Path, recipe: Path
) -> None:
    """Without preempt_send_user_signal; its state is known from the accounting afterwards."""
    run = submit(rich, recipe, "--partition", "low")
    preempt(run, nodes=3)
    assert stopped(run, 0).reason.startswith("stopped by signal SIGTERM ")
    run.finish()
    check_like(whole, run, attempts=2)
    assert json.loads((run.run_dir / "logs/attempt-0/slurm.json").read_text())["preempted"]
    ended = f"job {run.job}: COMPLETED, exit code 0, after 00:0"
    run.wait_until(lambda: ended in status(run), "the accounting knows", 10)


@matrix
def test_a_job_that_is_preempted_without_grace_goes_on_later(
    rich: Cluster, whole: Path, recipe: Path
) -> None:
    run = submit(rich, recipe, "--partition", "kill")
    preempt(run, nodes=3)
    run.finish()
    check_like(whole, run, attempts=2)


@matrix
@pytest.mark.parametrize("partition", ["low", "cancel"])
def test_a_preempted_job_goes_on_later(
    slurm: Cluster, whole: Path, recipe: Path, partition: str
) -> None:
    """Also where SLURM would only cancel it."""
    run = submit(slurm, recipe, "--partition", partition)
    preempt(run, nodes=4)
    stopped(run, 0)
    run.finish()
    check_like(whole, run, attempts=2)
