"""Runs on a real SLURM cluster, and what people do to them."""

import re
import time
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from slurm_run import (
    DISTURBED,
    ENVIRONMENT,
    SLOW_EVERY,
    SLOW_STEPS,
    Submitted,
    by_hand,
    check_like,
    check_whole,
    launch,
    make,
    make_slow,
    runs_on,
    status,
    stopped,
    submit,
    told,
)

from dist_sft import manifest, report, runs
from dist_sft.config import read_config_json

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
matrix = pytest.mark.matrix


# Commands of a job run in a container of its own, without any of SLURM's.
CONTAINER = """#!/bin/sh
exec unshare --mount sh -c '
    for tool in sacct scancel scontrol squeue srun; do mount --bind /dev/null /usr/bin/$tool; done
    echo "a banner"
    exec "$@"' container "$@"
"""


def test_usr1_saves_and_goes_on_in_the_same_job(
    slurm: Cluster, tmp_path: Path, whole: Path, recipe: Path
) -> None:
    (tmp_path / "container").write_text(CONTAINER)
    (tmp_path / "container").chmod(0o755)
    (tmp_path / "site.sh").write_text(f"in_job=({tmp_path}/container)\n")
    run = submit(slurm, recipe, f"--site={tmp_path}/site.sh")
    run.wait_for_step(DISTURBED)
    told = status(run)
    assert f"job {run.job}: RUNNING\n" in told
    assert re.search(rf"^step \d+ of {SLOW_STEPS}: .*; left: 0:0", told, re.MULTILINE)
    run.signal("USR1")
    outcome = stopped(run, 0)
    assert outcome.reason.startswith("stopped by signal SIGUSR1 ")
    run.finish()
    assert slurm.show(run.job)["Restarts"] == "1"
    check_like(whole, run, attempts=2)
    assert run.log.count("starting workers: 2") == 2, "the log of every start is there"
    assert f"continuing after step {outcome.step} " in run.log


@matrix
def test_signals_of_a_person(slurm: Cluster, whole: Path, recipe: Path) -> None:
    """USR1 to the workers alone puts the job back; TERM to the batch shell alone ends it."""
    run = submit(slurm, recipe)
    run.slow(0.1, attempts=2)
    run.wait_for_step(DISTURBED)
    slurm.run("scancel", "--signal=USR1", str(run.job))
    assert stopped(run, 0).asked_by == "signal SIGUSR1"
    run.wait_for_restart()
    run.wait_for_step(runs_on(run, 1) + 10)
    run.signal("TERM")
    assert stopped(run, 1).asked_by == "signal SIGTERM"
    run.finish("FAILED")
    assert slurm.show(run.job)["Restarts"] == "1"
    run = told(slurm, recipe, launch(slurm, "resume", run.run_dir).stdout)
    run.finish()
    check_like(whole, run, attempts=3)


@matrix
def test_where_requeueing_is_forbidden_the_log_says_so(
    slurm: Cluster, whole: Path, recipe: Path
) -> None:
    """By hand, and with options that make srun start more than one task on a node."""
    launch(slurm, "train", recipe, "--nodes=2", "--workers-per-node=1", "--prepare")
    run = by_hand(slurm, recipe.with_suffix(""), "--no-requeue", "--ntasks-per-node=2", "-c2")
    run.wait_for_step(DISTURBED)
    run.signal("USR1")
    run.finish("FAILED")
    assert "this job cannot be put back in the queue (" in run.log
    assert f"job {run.job}: " in status(run), "known, although sbatch submitted it"
    run = by_hand(slurm, run.run_dir)
    run.finish()
    check_like(whole, run, attempts=2)


def test_a_cancelled_job_is_not_put_back_and_continues_when_submitted_again(
    slurm: Cluster, whole: Path, recipe: Path
) -> None:
    run = submit(slurm, recipe)
    run.slow(0.1, attempts=2)
    run.wait_for_step(DISTURBED)
    slurm.run("scancel", str(run.job))
    outcome = stopped(run, 0)
    assert outcome.reason.startswith("stopped by signal SIGTERM ")
    slurm.wait_for(run.job, "CANCELLED")
    cancelled_job = run.job

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
    assert slurm.state(cancelled_job) == "CANCELLED"
    assert slurm.show(cancelled_job)["Restarts"] == "0"


# What the commands of a job run in, as a container: slow where the test says so.
SLOW = """#!/bin/sh
case "$*" in *"batch_job {command}"*)
    if mkdir "{folder}/{command}" 2>/dev/null; then sleep 6; fi
esac
exec "$@"
"""


def slow_site(folder: Path, command: str) -> str:
    """Return the option for a site where the first `command` of the batch shell takes long."""
    (folder / "slow.sh").write_text(SLOW.format(folder=folder, command=command))
    (folder / "slow.sh").chmod(0o755)
    (folder / "site.sh").write_text(f"in_job=('{folder}/slow.sh')\n")
    return f"--site={folder}/site.sh"


@matrix
def test_a_job_that_is_cancelled_while_it_decides_stays_cancelled(
    slurm: Cluster, tmp_path: Path, recipe: Path
) -> None:
    run = submit(slurm, recipe, slow_site(tmp_path, "end"))
    run.wait_for_step(DISTURBED)
    run.signal("USR1")
    run.wait_until((tmp_path / "end").exists, "the batch shell asks what to do")
    slurm.run("scancel", str(run.job))
    slurm.wait_for(run.job, "CANCELLED")
    time.sleep(8)  # longer than a job waits that was put back
    assert slurm.show(run.job)["Restarts"] == "0"
    assert slurm.state(run.job) == "CANCELLED"
    assert runs.attempts(run.run_dir) == [0]


@matrix
def test_a_signal_before_workers_start_puts_the_job_back(
    slurm: Cluster, tmp_path: Path, whole: Path, recipe: Path
) -> None:
    run = submit(slurm, recipe, slow_site(tmp_path, "begin"))
    run.wait_until((tmp_path / "begin").exists, "the batch shell begins")
    run.signal("USR1")
    run.finish()
    assert slurm.show(run.job)["Restarts"] == "1"
    check_like(whole, run, attempts=2)


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
    first.wait_for_step(DISTURBED)
    first.signal("USR1")
    first.finish("FAILED")
    last.finish()
    check_like(whole, last, attempts=2)
    assert "is finished already" in last.log


BUSY_CONTROLLER = """
scontrol() {{
    case "$1,$2" in requeue,* | --oneliner,show) ;; *) command scontrol "$@"; return ;; esac
    if mkdir "{folder}/busy-$1" 2>/dev/null; then
        echo "Unable to contact slurm controller" >&2
        return 1
    fi
    command scontrol "$@"
}}
"""


def test_a_sweep_is_an_array_of_runs_with_lives_of_their_own(
    slurm: Cluster, tmp_path: Path
) -> None:
    """One is put back, at a second try, and one is cancelled."""
    (tmp_path / "site.sh").write_text(BUSY_CONTROLLER.format(folder=tmp_path))
    recipe = make_slow(tmp_path, "sweep")
    values = "optimizer.lr=1e-3,2e-3"
    array = submit(slurm, recipe, "--sweep", values, f"--site={tmp_path}/site.sh")
    first, second = (
        Submitted(slurm, array.run_dir / f"optimizer.lr={value}", array.job)
        for value in ("1e-3", "2e-3")
    )
    for run in (first, second):
        run.slow(0.1)
    for run in (first, second):
        run.wait_for_step(DISTURBED)
    first.signal("USR1", task="_0")
    told = launch(slurm, "cancel", second.run_dir).stdout
    assert f"jobs that run save and stop: {array.job}_1\n" in told
    assert stopped(second, 0).reason.startswith("stopped by STOP file ")
    first.wait_until(lambda: runs.is_finished(read_config_json(first.run_dir)), "the end", 120)
    check_whole(first, attempts=2)
    assert sorted(p.name for p in tmp_path.glob("busy*")) == ["busy---oneliner", "busy-requeue"]
    assert [slurm.show(f"{array.job}_{task}")["Restarts"] for task in (0, 1)] == ["1", "0"]
    assert runs.attempts(second.run_dir) == [0]
    losses = [report.read_steps(run.run_dir / "metrics.jsonl") for run in (first, second)]
    assert losses[0][0]["loss"] == losses[1][0]["loss"]
    assert losses[0][SLOW_EVERY]["loss"] != losses[1][SLOW_EVERY]["loss"]


def test_a_job_of_another_user(slurm: Cluster, everyones_folder: Path) -> None:
    """It gets no variable from the one who submits, and copies the data to a disk of the node."""
    recipe = make(everyones_folder, "run", 12)
    exports = " ".join(f"{name}='{value}'" for name, value in ENVIRONMENT.items())
    scratch = everyones_folder / "scratch"
    site = everyones_folder / "site.sh"
    site.write_text(f'export {exports} DIST_SFT_SCRATCH="{scratch}/$SLURM_JOB_ID"\n')
    for path in (everyones_folder, *everyones_folder.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    size = ("--nodes=2", "--workers-per-node=1", "--export=NONE", f"--site={site}")
    done = launch(slurm, "train", recipe, *size, user="nobody")
    run = told(slurm, recipe, done.stdout)
    run.finish()
    check_whole(run, attempts=1, steps=12)
    assert manifest.folder_of(run.run_dir, 12).owner() == "nobody"
    assert [path.name for path in scratch.iterdir()] == [str(run.job)]
    assert list(scratch.glob("*/*/meta.json"))


def test_gpus_that_are_not_as_asked(rich: Cluster, tmp_path: Path) -> None:
    """What SLURM gives are imagined ones."""
    few, broken = (
        submit(rich, make(tmp_path, name, 12), gpus, "--restarts=0", "--nodelist=n1,n2",
               workers=2)
        for name, gpus in (("few", "--gpus-per-node=1"), ("broken", "--gpus-per-node=2"))
    )  # fmt: skip
    few.finish("FAILED")
    told = "--workers-per-node is 2, SLURM gave this job 1 GPUs on this node, and 1 are visible"
    assert f"n1: {told}\n" in few.log
    assert f"n2: {told}\n" in few.log
    broken.finish("FAILED")
    told = "CUDA_VISIBLE_DEVICES=0,1 gives this worker GPUs, but torch "
    assert told in broken.log
    assert not few.steps()
    assert not broken.steps()


FAKE_GPU = """#!/bin/sh
[ "$(hostname)" != n2 ] || echo "GPU 0: an imagined one"
"""


def site_with_a_gpu(folder: Path) -> str:
    """Return the option for a site where n2 has a GPU, and no other node."""
    (folder / "bin").mkdir()
    (folder / "bin/nvidia-smi").write_text(FAKE_GPU)
    (folder / "bin/nvidia-smi").chmod(0o755)
    site = folder / "site.sh"
    site.write_text(f"export PATH={folder}/bin:$PATH\nunset CUDA_VISIBLE_DEVICES\n")
    return f"--site={site}"


def test_a_bad_node_is_named_and_kept_out(slurm: Cluster, tmp_path: Path) -> None:
    """One of three nodes has a GPU, and the others have none."""
    recipe = make(tmp_path, "run", 12)
    options = (site_with_a_gpu(tmp_path), "--exclude-bad-nodes", "--exclude=n4")
    run = submit(slurm, recipe, *options, nodes="2-3")
    run.finish()
    assert "GPUs: n2 has 1; the other 2 have 0" in run.log
    check_whole(run, attempts=2, steps=12)
    assert slurm.show(run.job)["ExcNodeList"] == "n4,n2"
