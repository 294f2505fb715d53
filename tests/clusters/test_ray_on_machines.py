"""A Ray cluster of machines with networks, process trees and memories of their own."""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import machines
import pytest
from machines import Machine
from ray_cluster import RAY, SECONDS, environment, node_options
from ray_run import Driver, RayRun
from slurm_run import EVERY, check_like, make

from dist_sft import lease, runs

pytestmark = [pytest.mark.slow, pytest.mark.matrix, pytest.mark.timeout(500)]
HEAD, PORT = "10.77.0.254", 6379
NODES = {"n1": "10.77.0.1", "n2": "10.77.0.2"}


class Cluster:
    """The head, without room for workers, on a machine on which the launcher runs, too."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.environment = environment(folder) | {
            # A machine without power closes no connection: who is silent is dead after 3 s.
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
            "RAY_health_check_initial_delay_ms": "0",
        }
        (folder / "log").mkdir()
        (folder / "hosts").write_text(
            "".join(
                f"{a} {n}\n" for n, a in {**NODES, "head": HEAD, "localhost": "127.0.0.1"}.items()
            )
        )
        self.head = Machine("head", HEAD, folder / "log")
        self.nodes: dict[str, Machine] = {}
        self.head.run("mount", "--bind", str(folder / "hosts"), "/etc/hosts")
        self._start(self.head, 0, "--head", f"--port={PORT}", "--dashboard-host=127.0.0.1")
        for name in NODES:
            self.boot(name)

    def boot(self, name: str) -> None:
        (self._folder / f"log/{name}.env").unlink(missing_ok=True)
        self.nodes[name] = Machine(name, NODES[name], self._folder / "log", within=self.head)
        self._start(self.nodes[name], 1, f"--address={HEAD}:{PORT}")

    def _start(self, on: Machine, cpus: int, *options: str) -> None:
        own = ("RAY_", "OMP_", "PYTHONPATH")
        variables = [f"{k}={v}" for k, v in self.environment.items() if k.startswith(own)]
        on.start(
            "env", *variables, str(RAY), "start", "--block", "--disable-usage-stats", *options,
            *node_options(on.address, cpus), f"--temp-dir={self._folder}/{on.name}",
        )  # fmt: skip

        log = self._folder / f"log/{on.name}.env"
        deadline = time.monotonic() + SECONDS
        while "Ray runtime started" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)

    def close(self) -> None:
        self.head.power_off()
        for node in self.nodes.values():
            node.wait()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    if reason := machines.refusal():
        if os.environ.get("DIST_SFT_REQUIRE_CLUSTERS") == "1":
            pytest.fail(f"DIST_SFT_REQUIRE_CLUSTERS is set, but no machines: {reason}")
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="ray-") as name:
        started = Cluster(Path(name))
        try:
            yield started
        finally:
            started.close()


def test_a_machine_loses_power(cluster: Cluster, whole_for_ray: Path, tmp_path: Path) -> None:
    """Nobody sees its connections close; the run goes on when it is back."""
    recipe = make(whole_for_ray.parent, "on machines")
    where = ("--workers=2", "--wait=3", "--address", f"{HEAD}:{PORT}")
    driver = Driver("train", recipe, *where, environment=cluster.environment, on=cluster.head)
    run = RayRun(recipe.with_suffix(""), driver)
    run.wait_for_step(EVERY + 10)
    assert sorted(run.hosts(0)) == ["n1", "n2"]
    cluster.nodes["n2"].power_off()
    run.wait_until(lambda: run.outcomes()[0][0] == runs.FAILED, "an outcome")
    time.sleep(8)  # longer than --wait
    held = lease.read(run.run_dir)
    assert held is not None, "it owns its run while it waits"
    assert held.attempt == 0
    cluster.boot("n2")
    out = driver.finish()
    check_like(whole_for_ray, run, attempts=2)
    assert "waiting to go on: --workers: got 2, each with CPU 1; " in out
