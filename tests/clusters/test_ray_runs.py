"""Runs on real Ray clusters, and what happens to them there."""

import json
import random
import secrets
import signal
import stat
import sys
import time
from pathlib import Path

import psutil
import pytest
from launching import ROOT, read
from ray_cluster import Cluster
from ray_run import Driver, RayRun, check_no_secret, launch, stopped
from slurm_run import EVERY, STEPS, check_like, check_whole, make, run_here

from dist_sft import report, runs, status

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
matrix = pytest.mark.matrix


@pytest.fixture
def whole(whole_for_ray: Path) -> Path:
    return whole_for_ray


@pytest.fixture
def recipe(whole: Path) -> Path:
    """Write the same recipe with another run folder, whose path has a space."""
    number = len(list(whole.parent.glob("run *.yaml")))
    return make(whole.parent, f"run {number}")


def test_two_nodes_do_as_one_machine(ray: Cluster, whole: Path, recipe: Path) -> None:
    """Metrics and checkpoints are reported to Ray, and its dashboard knows the run.

    No secret of who launches is anywhere.
    """
    secret = secrets.token_hex(16)
    run = launch(ray, recipe, HF_TOKEN=secret, WANDB_API_KEY=secret)
    run.wait_for_step(EVERY + 10)
    told = f'run="{run.run_dir}"'
    run.wait_until(lambda: told in ray.metrics(), "metrics")
    run.driver.finish()
    check_like(whole, run, attempts=1)

    (known,) = [
        one
        for one in json.loads(ray.dashboard_says("/api/train/v2/runs/v1"))["train_runs"]
        if one["run_settings"]["run_config"]["storage_path"] == str(run.run_dir.parent)
        and one["name"] == run.run_dir.name
    ]
    assert known["status"] == "FINISHED"
    (attempt,) = known["attempts"]
    assert {worker["node_ip"] for worker in attempt["workers"]} == {n.ip for n in ray.nodes}
    reported = json.loads(read(run.run_dir / "checkpoint_manager_snapshot.json"))
    last = reported["checkpoint_results"][-1]
    assert last["checkpoint_dir_name"] == f"checkpoints/step-{STEPS:08}"
    assert last["metrics"]["step"] == STEPS
    assert last["metrics"]["loss"] == report.read_steps(run.run_dir / "metrics.jsonl")[-1]["loss"]

    check_no_secret(ray, run, secret)
    again = launch(ray, recipe)
    assert "is finished already" in again.driver.finish()


@matrix
def test_zero_3(ray: Cluster, tmp_path: Path) -> None:
    """On one node and on two as by `launch/local.py`."""
    recipes = [make(tmp_path, n, 20, deepspeed="zero3") for n in ("here", "one", "two")]
    whole = run_here(recipes[0])
    for nodes, recipe in enumerate(recipes[1:], start=1):
        run = launch(ray, recipe, f"--resources-per-worker=CPU={nodes / 2}")
        run.driver.finish()
        check_like(whole, run, attempts=1, steps=20)
        assert len(list((run.run_dir / "logs/attempt-0").glob("node-*.json"))) == nodes


def test_a_ctrl_c_without_a_cluster(whole: Path, recipe: Path) -> None:
    """The driver, Ray and all that it started are gone; the same command continues."""
    run = launch(None, recipe)
    run.wait_for_step(EVERY + 10)
    started = psutil.Process(run.driver.process.pid).children(recursive=True)
    assert len(started) > 5
    token = Path(run.ranks()[0].environ()["RAY_AUTH_TOKEN_PATH"])
    assert [stat.S_IMODE(path.stat().st_mode) for path in (token, token.parent)] == [0o600, 0o700]
    assert (token.parent / "ray/session_latest").exists(), "Ray's own folder, open to all, is in it"
    run.driver.signal(signal.SIGINT)
    run.driver.finish(runs.STOPPED)
    step = stopped(run, 0, "signal SIGINT")
    assert EVERY < step < STEPS
    _, alive = psutil.wait_procs(started, timeout=15)
    assert not alive
    assert not run.ranks()
    assert not token.parent.exists()

    run = launch(None, recipe)
    run.driver.finish()
    check_like(whole, run, attempts=2)


def test_a_killed_rank_and_a_killed_worker(ray: Cluster, whole: Path, recipe: Path) -> None:
    steps = [start * EVERY + random.randrange(EVERY) for start in (1, 5)]
    print("kills after steps", steps)
    run = launch(ray, recipe)
    run.wait_for_step(steps[0])
    run.ranks()[1].kill()
    run.wait_until(lambda: len(runs.attempts(run.run_dir)) == 2, "another attempt")
    run.wait_for_step(steps[1])
    (line,) = [line for line in status.status(run.run_dir) if "launched by" in line]
    assert line.endswith("launched by ray, workers: 2 (wanted: 2)")
    run.ranks()[0].parent().kill()
    out = run.driver.finish()
    check_like(whole, run, attempts=3)
    (killed, told), (died, why), _ = run.outcomes()
    assert killed == died == runs.FAILED
    assert told.startswith("ended by SIGKILL, killed from outside")
    assert "rank 1 failed first" in told
    assert why.startswith("its Ray worker failed: ")
    assert "rank 0 failed first" in why
    assert out.count("restarts without a newer one: 1 of 3") >= 2


@matrix
def test_grows_and_shrinks_with_the_cluster(ray: Cluster, whole: Path, recipe: Path) -> None:
    """A node is killed, another one joins, and is drained."""
    run = launch(ray, recipe, "--min-workers=1", "--max-workers=2", "--resize-every=5")
    run.wait_for_step(EVERY + 10)
    ray.nodes.pop().kill()
    run.wait_until(lambda: len(runs.attempts(run.run_dir)) == 2, "an attempt on one node")
    run.wait_for_step(run.steps()[-1] + 10)
    (rank,) = run.ranks()
    rank.suspend()  # it would have finished before there is another node
    ray.add()
    asked = run.run_dir / "logs/attempt-1/stop"
    run.wait_until(asked.exists, "Ray wants another number of workers")
    rank.resume()
    run.wait_until(lambda: len(runs.attempts(run.run_dir)) == 3, "an attempt on two nodes")
    run.wait_for_step(run.steps()[-1] + 10)
    ranks = run.ranks()
    for rank in ranks:
        rank.suspend()
    ray.drain(ray.nodes[-1])
    for rank in ranks:
        rank.resume()
    run.wait_until(lambda: len(runs.attempts(run.run_dir)) == 4, "an attempt on what is left")
    run.driver.finish()
    assert [len(run.hosts(attempt)) for attempt in range(4)] == [2, 1, 2, 1]
    assert not list((ray.folder / "tmp").glob("dist_sft-*"))
    left = list(ray.folder.glob("0/session_2*/dist_sft-*"))
    assert len(left) <= 1, "at most of the worker whose peer was killed"
    stopped(run, 1, "Ray: another number of workers")
    stopped(run, 2, "Ray: a node is drained")
    check_whole(run, attempts=4)
    losses = [
        [line["loss"] for line in report.read_steps(folder / "metrics.jsonl")]
        for folder in (whole, run.run_dir)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@matrix
def test_wrong_input_is_not_tried_again(ray: Cluster, recipe: Path) -> None:
    run = launch(ray, recipe, "model.config.num_attention_heads=3")
    out = run.driver.finish(runs.WRONG_INPUT)
    assert "not a multiple of the number of attention heads (3)" in out
    assert runs.attempts(run.run_dir) == [0]


def test_a_cluster_that_is_too_small(ray: Cluster, recipe: Path) -> None:
    """It is said so; signals are heard while the launcher joins, and while it waits for room."""
    for number, seconds in ((signal.SIGTERM, 1), (signal.SIGUSR1, 6)):
        run = launch(ray, recipe, "--workers=3", "--wait=60")
        run.wait_until((run.run_dir / "lease.json").exists, "a launcher that joins")
        time.sleep(seconds)
        run.driver.signal(number)
        out = run.driver.finish(runs.STOPPED, seconds=60)
        assert "stopped while no worker was running" in out
        assert not runs.attempts(run.run_dir)
    run = launch(ray, recipe, "--workers=3", "--wait=2")
    out = run.driver.finish(runs.WRONG_INPUT, seconds=60)
    assert "--workers: got 3, each with CPU 1; the cluster has room for 2 (" in out
    assert not runs.attempts(run.run_dir)


def test_a_submitted_job(ray: Cluster, whole: Path, recipe: Path, tmp_path: Path) -> None:
    """From anywhere: cancelled, then resumed. No secret of who submits is anywhere."""
    environment = tmp_path / "runtime_env.yaml"
    variables = {"DIST_SFT_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    environment.write_text(json.dumps({"env_vars": variables}))
    where = ("--address", ray.http, "--runtime-env", str(environment))
    secret = secrets.token_hex(16)
    mine = ray.environment | {"HF_TOKEN": secret, "WANDB_API_KEY": secret}
    driver = Driver("train", recipe, "--workers=2", *where, environment=mine)
    run = RayRun(recipe.with_suffix(""), driver)
    run.wait_for_step(EVERY + 10)
    relative = Path("..", run.run_dir.name)  # to the job's folder
    elsewhere = ("--address", ray.http, "--folder", str(run.run_dir.parent / "any"))
    cancelled = Driver("cancel", relative, *elsewhere, environment=mine).finish()
    assert "ended: raysubmit_" in cancelled
    assert "step 1/600" in run.driver.finish(runs.STOPPED)
    stopped(run, 0, "STOP file")

    Driver("resume", run.run_dir, *where, environment=mine).finish()
    check_like(whole, run, attempts=2)
    check_no_secret(ray, run, secret)


@matrix
def test_a_node_that_does_not_see_the_run_folder(ray: Cluster, tmp_path: Path) -> None:
    """It is named before a model is loaded."""
    (tmp_path / "hidden").mkdir()
    hidden = make(tmp_path / "hidden", "run")
    ray.nodes.pop().kill()
    ray.add(hides=hidden.parent)
    run = launch(ray, hidden, "--wait=60")
    out = run.driver.finish(runs.FAILED)
    assert "attempt-0 is not there: run_dir must be a folder that every node sees" in out
    assert runs.attempts(run.run_dir) == [0]
    assert not (run.run_dir / "initial").exists()
