"""Who else is on a Ray cluster: other jobs, strangers, and nodes without dist_sft."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ray_cluster import Cluster, ray_cluster
from ray_run import Driver, launch, stopped
from slurm_run import EVERY, check_like, check_whole, make, run_here

from dist_sft import runs

pytestmark = [pytest.mark.slow, pytest.mark.matrix, pytest.mark.timeout(500)]
STEPS = 300


def test_two_runs_at_a_time(ray: Cluster, tmp_path: Path) -> None:
    """They share the cluster; a third is refused for lack of room.

    It is resumed in the place of one that was cancelled, and nobody notices the others.
    """
    alone, one, two, three = (make(tmp_path, name, STEPS) for name in ("alone", "1", "2", "3"))
    whole = run_here(alone, workers=1)
    first, second = launch(ray, one, "--workers=1"), launch(ray, two, "--workers=1")
    first.wait_for_step(1)
    second.wait_for_step(1)
    third = launch(ray, three, "--workers=1", "--wait=2")
    again = launch(ray, one, "--workers=1")
    for rank in (*first.ranks(), *second.ranks()):
        rank.suspend()  # neither must end before the others were refused
    out = third.driver.finish(runs.WRONG_INPUT)
    assert "but in use: left are" in out
    assert "is in use by process" in again.driver.finish(runs.WRONG_INPUT)
    for rank in (*first.ranks(), *second.ranks()):
        rank.resume()

    first.wait_for_step(EVERY + 1)
    cancelled = Driver("cancel", first.run_dir, environment=ray.environment)
    assert "launch/ray_job.py resume" in cancelled.finish()
    first.driver.finish(runs.STOPPED)
    stopped(first, 0, "STOP file")
    nobody = Driver("cancel", first.run_dir, environment=ray.environment)
    assert "there is nothing to cancel" in nobody.finish(runs.WRONG_INPUT)

    for run, attempts in ((third, 1), (first, 2)):
        Driver("resume", run.run_dir, environment=ray.environment).finish()
        check_like(whole, run, attempts, STEPS)
    second.driver.finish()
    check_like(whole, second, attempts=1, steps=STEPS)


HOLDER = """
import ray, sys
ray.init(address=sys.argv[1])

@ray.remote(num_cpus=1)
class Other:
    def is_there(self):
        return True

other = Other.remote()
assert ray.get(other.is_there.remote())
print("holds", flush=True)
sys.stdin.read()
"""


@contextmanager
def somebody_else(ray: Cluster) -> Iterator[None]:
    """Use a CPU of the cluster within a block."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, ray.address],
        env=ray.environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout
        assert any(line == "holds\n" for line in process.stdout)
        yield
        process.communicate(timeout=60)


def test_a_run_that_may_grow_leaves_others_what_they_use(ray: Cluster, tmp_path: Path) -> None:
    """It works beside an actor, and is not ended again and again to grow into the actor's CPU.

    Where too little is left to begin, it hears a stop, as from `cancel`.
    """
    one, two = make(tmp_path, "1", STEPS), make(tmp_path, "2", STEPS)
    with somebody_else(ray):
        run = launch(ray, one, "--min-workers=1", "--max-workers=2", "--resize-every=1")
        run.driver.finish()
        check_whole(run, attempts=1, steps=STEPS)
        assert len(run.hosts(0)) == 1

        waits = launch(ray, two, "--min-workers=2", "--max-workers=3", "--wait=60")
        waits.wait_until((waits.run_dir / "lease.json").exists, "a launcher that waits")
        time.sleep(10)
        cancelled = Driver("cancel", waits.run_dir, environment=ray.environment)
        assert "launch/ray_job.py resume" in cancelled.finish()
        assert "stopped while no worker was running" in waits.driver.finish(runs.STOPPED)
        assert not runs.attempts(waits.run_dir)


@pytest.mark.parametrize("over", ["http", "ray"])
@pytest.mark.parametrize("token", ["0" * 64, None])
def test_a_stranger_is_refused(ray: Cluster, tmp_path: Path, token: str | None, over: str) -> None:
    """Who has another token, or none."""
    recipe = make(tmp_path, "run")
    stranger = {k: v for k, v in ray.environment.items() if not k.startswith("RAY_AUTH")}
    stranger |= {"HOME": str(tmp_path)}  # ~/.ray/auth_token may be a cluster's
    if token:
        stranger |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    address = {"http": ray.http, "ray": ray.address}[over]
    refused = Driver("train", recipe, "--address", address, environment=stranger)
    out = refused.finish(runs.WRONG_INPUT)
    if over == "http":
        assert f"--address: {address}: Authentication" in out
    else:
        assert f"--address: got {address}, and it cannot be joined" in out
        assert "InvalidAuthToken" in out or "Unauthenticated" in out, "not what a dead one says"
    assert not runs.attempts(recipe.with_suffix(""))


@pytest.fixture(scope="module")
def open_ray() -> Iterator[Cluster]:
    """Start a head for everybody, whose own Python cannot import dist_sft."""
    with tempfile.TemporaryDirectory(prefix="ray-") as name:
        (Path(name) / "sitecustomize.py").write_text(WITHOUT)
        with ray_cluster(Path(name), 1, open=True, variables={"PYTHONPATH": name}) as cluster:
            yield cluster


WITHOUT = """
import sys

class Without:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "dist_sft":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Without())
"""


@pytest.mark.parametrize("mode", ["disabled", "token"])
def test_an_open_cluster_is_warned_of(open_ray: Cluster, tmp_path: Path, mode: str) -> None:
    """Whatever the shell of who joins it has set; over http:// likewise."""
    recipe = make(tmp_path, "run")
    environment = open_ray.environment | {"RAY_AUTH_MODE": mode}
    for address in (open_ray.address, open_ray.http):
        size = ("--workers=2", "--wait=0", "--address", address)
        runtime = tmp_path / "env.yaml"
        runtime.write_text(json.dumps({"env_vars": {"DIST_SFT_PYTHON": "false"}}))
        over_http = ("--runtime-env", runtime) if address == open_ray.http else ()
        driver = Driver("train", recipe, *size, *over_http, environment=environment)
        out = driver.finish(runs.WRONG_INPUT)
        assert "warning: this cluster has no token authentication" in out
        assert "RAY_AUTH_MODE=token" in out


def test_a_cluster_without_dist_sft(open_ray: Cluster, tmp_path: Path) -> None:
    """On the head, for the launcher, and in Ray's own processes."""
    recipe = make(tmp_path, "run")
    where = ("--address", open_ray.http)
    job = Driver("train", recipe, *where, environment=open_ray.environment)
    out = job.finish(runs.WRONG_INPUT)
    assert "python cannot import dist_sft. Name one that can by DIST_SFT_PYTHON" in out

    run = launch(open_ray, recipe, "--workers=1")
    out = run.driver.finish(runs.WRONG_INPUT)
    assert "cannot import dist_sft" in out
    assert "the Python of `ray start`" in out
