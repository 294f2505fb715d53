"""Runs on a real SLURM cluster, and what happens to them there."""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any, Literal

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
from dist_sft.config import read_config_json

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
matrix = pytest.mark.matrix


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run on this machine, undisturbed."""
    return run_here(make(tmp_path_factory.mktemp("undisturbed"), "run"))


@pytest.fixture
def recipe(whole: Path) -> Path:
    """Write the same recipe with another run folder, whose path has a space."""
    return another(whole)


LONG = 3000  # steps that outlive what SLURM takes to notice that a node is dead, 17 to 25 s


@pytest.fixture(scope="module")
def long_whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run for longer."""
    return run_here(make(tmp_path_factory.mktemp("long"), "run", LONG))


@pytest.fixture
def long_recipe(long_whole: Path) -> Path:
    return another(long_whole, LONG)


def another(whole: Path, steps: int = STEPS) -> Path:
    number = len(list(whole.parent.glob("run *.yaml")))
    return make(whole.parent, f"run {number}", steps)


def stopped(run: Submitted, attempt: int) -> runs.Outcome:
    """Wait until an attempt has stopped, with a checkpoint."""
    run.wait_until(lambda: runs.read_outcome(run.run_dir, attempt) is not None, "an outcome")
    outcome = runs.read_outcome(run.run_dir, attempt)
    assert outcome is not None
    assert outcome.code == runs.STOPPED, outcome
    assert outcome.reason.endswith(f"after step {outcome.step}, which is saved")
    assert EVERY < outcome.step < STEPS
    return outcome


def status(run: Submitted) -> str:
    """Return what `dist-sft status` says on the login node."""
    command = (sys.executable, "-m", "dist_sft.cli", "status", run.run_dir)
    return run.cluster.run(*command, env=ENVIRONMENT).stdout


def test_two_nodes_do_as_one_machine(slurm: Cluster, whole: Path, recipe: Path) -> None:
    run = submit(slurm, recipe)
    run.finish()
    check_like(whole, run, attempts=1)
    assert re.search(r"^all-reduce over 2 workers: [\d.]+ GB/s$", run.log, re.MULTILINE)
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
@pytest.mark.parametrize(("nodes", "workers"), [("2", 1), ("4", 2)])
def test_more_nodes_do_as_one_machine(
    slurm: Cluster, tmp_path: Path, nodes: str, workers: int, deepspeed: str
) -> None:
    here, there = (make(tmp_path, n, 8, deepspeed=deepspeed) for n in ("here", "there"))
    whole = run_here(here, workers=int(nodes) * workers)
    run = submit(slurm, there, nodes=nodes, workers=workers)
    run.finish(seconds=240)
    check_like(whole, run, attempts=1, steps=8)


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
    run.wait_for_step(EVERY + 10)
    told = status(run)
    assert f"job {run.job}: RUNNING\n" in told
    assert re.search(rf"^step \d+ of {STEPS}: .*; left: 0:0", told, re.MULTILINE)
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
    run.wait_for_step(EVERY + 10)
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
    run.wait_for_step(EVERY + 10)
    run.signal("USR1")
    run.finish("FAILED")
    assert "this job cannot be put back in the queue (" in run.log
    assert f"job {run.job}: " in status(run), "known, although sbatch submitted it"
    run = by_hand(slurm, run.run_dir)
    run.finish()
    check_like(whole, run, attempts=2)


def runs_on(run: Submitted, attempt: int) -> int:
    """Wait until an attempt has begun; return the step it goes on from."""
    metrics = run.run_dir / "metrics.jsonl"

    def lines() -> list[dict[str, Any]]:
        found = [json.loads(text) for text in metrics.read_text().splitlines()]
        return [line for line in found if line["attempt"] == attempt and "event" not in line]

    run.wait_until(lambda: bool(lines()), f"attempt {attempt}")
    return int(lines()[0]["step"])


def preempt(run: Submitted, nodes: int) -> None:
    """Let a job of a higher partition take all nodes for a moment."""
    run.wait_for_step(EVERY + 10)
    other = run.cluster.submit(
        *("--partition=high", f"--nodes={nodes}", "--exclusive", "--output=/dev/null"),
        "--wrap=sleep 3",
    )
    run.cluster.wait_for(other, "COMPLETED")


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


def lose(
    run: Submitted, node: str, how: Literal["power", "slurmd", "net"], whole: Path, steps: int
) -> None:
    """A node dies, and the job ends on another one as it would have ended."""
    run.wait_for_step(EVERY + 10)
    run.cluster.kill_node(node, how)
    run.wait_for_restart()
    run.finish()
    check_like(whole, run, attempts=2, steps=steps)
    hosts = json.loads((run.run_dir / "logs/attempt-1/slurm.json").read_text())["hosts"]
    assert node not in hosts


@pytest.mark.parametrize(
    ("node", "how"), [("n2", "power"), pytest.param("n1", "net", marks=matrix)]
)
def test_a_node_that_dies_is_replaced(
    slurm: Cluster, whole: Path, recipe: Path, node: str, how: Literal["power", "net"]
) -> None:
    lose(submit(slurm, recipe), node, how, whole, STEPS)


@matrix
def test_the_first_node_dies_and_the_status_says_what_slurm_does(
    rich: Cluster, whole: Path, recipe: Path
) -> None:
    run = submit(rich, recipe)
    lose(run, "n1", "power", whole, STEPS)
    assert "attempt 0: no outcome: it was killed (SLURM: NODE_FAIL)\n" in status(run)


@matrix
def test_a_node_whose_slurmd_dies_is_replaced(
    slurm: Cluster, long_whole: Path, long_recipe: Path
) -> None:
    """Its workers live until they miss the others, which SLURM ends when it notices."""
    lose(submit(slurm, long_recipe), "n2", "slurmd", long_whole, LONG)


@matrix
def test_what_lives_on_a_cut_off_node_commits_nothing(
    slurm: Cluster, long_whole: Path, long_recipe: Path
) -> None:
    """It needs no network to go on: all its workers are there."""
    run = submit(slurm, long_recipe, nodes="1", workers=2)
    run.wait_for_step(EVERY + 10)
    slurm.kill_node("n1", "net")
    run.wait_for_restart()
    run.wait_until(lambda: runs.read_outcome(run.run_dir, 0) is not None, "the orphan ends", 90)
    orphan = runs.read_outcome(run.run_dir, 0)
    assert orphan is not None
    assert orphan.code == runs.FAILED
    assert "a newer attempt works on" in orphan.reason or "has taken over" in orphan.reason
    run.finish()
    check_like(long_whole, run, attempts=2, steps=LONG)


@matrix
def test_a_dead_node_that_stays_dead_is_done_without(
    slurm: Cluster, whole: Path, recipe: Path
) -> None:
    run = submit(slurm, recipe, "--exclude=n3,n4", nodes="1-2")
    run.wait_for_step(EVERY + 10)
    slurm.kill_node("n2", "power")
    run.wait_for_restart()
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
    run.wait_for_step(EVERY + 10)
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


STOP_WORKERS = "kill -STOP $(pgrep -f 'dist_sft[.]train')"


@matrix
def test_a_worker_that_cannot_save_in_time_is_not_waited_for(
    slurm: Cluster, whole: Path, recipe: Path
) -> None:
    launch(slurm, "train", recipe, "--nodes=2", "--workers-per-node=1", "--prepare")
    run = by_hand(slurm, recipe.with_suffix(""), "--time=1", "--signal=B:CONT@1")
    run.wait_for_step(EVERY + 10)
    slurm.run("sh", "-c", STOP_WORKERS, on="n2")
    run.signal("USR1")
    run.wait_for_restart()
    assert "not all workers have ended in time; the job ends without them" in run.log
    run.finish()
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
    first.wait_for_step(EVERY + 10)
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
    recipe = make(tmp_path, "sweep")
    values = "optimizer.lr=1e-3,2e-3"
    array = submit(slurm, recipe, "--sweep", values, f"--site={tmp_path}/site.sh")
    first, second = (
        Submitted(slurm, array.run_dir / f"optimizer.lr={value}", array.job)
        for value in ("1e-3", "2e-3")
    )
    for run in (first, second):
        run.wait_for_step(EVERY + 10)
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
    assert losses[0][EVERY]["loss"] != losses[1][EVERY]["loss"]


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


@matrix
def test_a_job_whose_time_is_up_is_put_back(
    slurm: Cluster, long_whole: Path, long_recipe: Path
) -> None:
    """SLURM looks every 30 seconds: the signal comes in the first 30."""
    run = submit(slurm, long_recipe, "--time=1", "--lead=30")
    run.wait_for_restart()
    slurm.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=10")  # enough
    run.finish()
    outcome = runs.read_outcome(run.run_dir, 0)
    assert outcome is not None
    assert outcome.asked_by == "signal SIGUSR1"
    check_like(long_whole, run, attempts=2, steps=LONG)


@matrix
def test_a_job_whose_time_is_up_without_a_warning_is_put_back(
    rich: Cluster, whole: Path, recipe: Path
) -> None:
    """First workers end within KillWait, then one does not."""
    launch(rich, "train", recipe, "--nodes=2", "--workers-per-node=1", "--prepare")
    run = by_hand(rich, recipe.with_suffix(""), "--time=1", "--signal=B:CONT@1")
    run.wait_for_step(EVERY + 10)
    rich.run("sh", "-c", STOP_WORKERS, on="n2")  # until SLURM sends CONT before TERM
    run.wait_for_restart()
    assert stopped(run, 0).asked_by == "signal SIGTERM"
    run.wait_until(lambda: rich.state(run.job) == "RUNNING", "the second start")
    again = rf"(while {STOP_WORKERS}; do sleep 0.1; done) >/dev/null 2>&1 &"
    run.wait_for_step(runs_on(run, 1))
    rich.run("sh", "-c", again, on="n2")
    run.wait_until(lambda: rich.show(run.job)["Restarts"] == "2", "a third start", 120)
    told = run.log.partition("attempt 1: ")[2]
    assert "not all workers have ended in time; the job ends without them" in told
    rich.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=10")
    run.finish()
    check_like(whole, run, attempts=3)
