"""What tests on clusters share: SLURM, Ray, folders for their users, undisturbed runs."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray_cluster
from slurm_cluster import Cluster, slurm_cluster, unavailable
from slurm_run import common, make, make_slow, run_here


@contextmanager
def cluster(nodes: int, **features: Any) -> Iterator[Cluster]:
    """Start a cluster, or skip the test where that can't be: in CI it must."""
    if reason := unavailable(accounting=features.get("accounting", False)):
        if os.environ.get("DIST_SFT_REQUIRE_CLUSTERS") == "1":
            pytest.fail(f"DIST_SFT_REQUIRE_CLUSTERS is set, but no SLURM cluster: {reason}")
        pytest.skip(f"no SLURM cluster: {reason}")
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        Path(name).chmod(0o755)
        with slurm_cluster(Path(name), nodes, **features) as started:
            yield started


@pytest.fixture(scope="session")
def shared_slurm() -> Iterator[Cluster]:
    """Start 4 nodes."""
    with cluster(4) as started:
        yield started


@pytest.fixture(scope="session")
def rich_slurm() -> Iterator[Cluster]:
    """Start 3 nodes with GPUs, accounting, and no signal at a preemption but TERM."""
    conf = "KillWait=10"
    with cluster(3, accounting=True, gpus=2, preempt_signal=False, extra_conf=conf) as started:
        yield started


@pytest.fixture
def slurm(shared_slurm: Cluster) -> Iterator[Cluster]:
    """Give a test the cluster with all nodes idle; what it breaks is repaired after it."""
    yield shared_slurm
    shared_slurm.reset()


@pytest.fixture
def rich(rich_slurm: Cluster) -> Iterator[Cluster]:
    """Give a test that cluster with all nodes idle."""
    yield rich_slurm
    rich_slurm.reset()


@pytest.fixture
def everyones_folder() -> Iterator[Path]:
    """Make a folder that all users may write to; `tmp_path` is for root alone."""
    with tempfile.TemporaryDirectory(prefix="everyones-") as name:
        Path(name).chmod(0o777)
        yield Path(name)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the recipe of the tests on this machine, undisturbed."""
    with common(tmp_path_factory, "undisturbed") as folder:
        run_dir = folder / "run"
        if not (run_dir / "model").exists():
            run_here(make_slow(folder, "run", attempts=0))
    return run_dir


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Write the recipe, slow in its first attempt; the path of its run folder has a space."""
    return make_slow(tmp_path, "the run")


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[ray_cluster.Cluster]:
    """Start two nodes with a worker's room each."""
    with (
        tempfile.TemporaryDirectory(prefix="ray-") as name,
        ray_cluster.ray_cluster(Path(name), 1) as started,
    ):
        started.add()
        yield started


@pytest.fixture
def ray(shared_ray: ray_cluster.Cluster) -> Iterator[ray_cluster.Cluster]:
    """Give a test that cluster; a node that it took away is replaced after it."""
    yield shared_ray
    shared_ray.repair(nodes=2)


@pytest.fixture(scope="session")
def whole_for_ray(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run on this machine, undisturbed, by two ranks."""
    return run_here(make(tmp_path_factory.mktemp("undisturbed"), "run"))
