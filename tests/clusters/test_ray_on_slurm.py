"""Ray in an allocation of a real SLURM cluster: nodes with their own addresses."""

import re
import sys
from pathlib import Path

import pytest
from launching import ROOT, read
from ray_run import RayRun, stopped
from slurm_cluster import Cluster
from slurm_run import ENVIRONMENT, EVERY, check_like, make

from dist_sft import runs

pytestmark = [pytest.mark.slow, pytest.mark.matrix, pytest.mark.timeout(400)]


def submit(slurm: Cluster, recipe: Path, *options: str) -> int:
    """Submit a recipe with a worker on each of two nodes."""
    node = slurm.run("scontrol", "--oneliner", "show", "node", "n1").stdout
    (cpus,) = re.findall(r"CPUTot=(\d+)", node)  # Ray packs workers on one node where they fit
    return slurm.submit(
        "--nodes=2", f"--output={recipe.parent}/job.out", *options, ROOT / "slurm/ray.sbatch",
        "train", recipe, "--workers=2", f"--resources-per-worker=CPU={cpus}",
        cwd=recipe.parent,
        env=ENVIRONMENT | {"DIST_SFT_PYTHON": sys.executable},
    )  # fmt: skip


def check_nothing_is_left(slurm: Cluster, job: int, folder: Path) -> None:
    assert not list(folder.glob(".ray-*"))
    assert not list(Path("/tmp").glob(f"ray-{job}-*"))
    for node in slurm.addresses:
        left = slurm.run("pgrep", "--full", f"/tmp/ray-{job}-", on=node, check=False)
        assert not left.stdout


def test_two_nodes_do_as_one_machine(slurm: Cluster, whole_for_ray: Path) -> None:
    """The job is cut short, put back, and ends; nothing is left of its cluster."""
    recipe = make(whole_for_ray.parent, "on slurm")
    job = submit(slurm, recipe)
    run = RayRun(recipe.with_suffix(""), None)
    run.wait_for_step(EVERY + 10)
    slurm.run("scancel", "--signal=USR1", "--batch", str(job))
    try:
        slurm.wait_for(job, "COMPLETED", seconds=200)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{read(recipe.parent / 'job.out')}") from None
    check_like(whole_for_ray, run, attempts=2)
    stopped(run, 0, "signal SIGUSR1")
    assert len(set(run.hosts(1))) == 2
    check_nothing_is_left(slurm, job, recipe.parent)


def test_a_preempted_job_goes_on_and_a_cancelled_one_does_not(
    rich: Cluster, tmp_path: Path
) -> None:
    """The preemption is announced to the processes on the nodes alone."""
    recipe = make(tmp_path, "run", 5000)
    job = submit(rich, recipe, "--partition=low")
    run = RayRun(recipe.with_suffix(""), None)
    run.wait_for_step(EVERY + 10)
    rich.submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    run.wait_until(lambda: rich.show(job)["Restarts"] == "1", "a second start")
    saved = stopped(run, 0, "signal SIGTERM")
    run.wait_until(lambda: len(runs.attempts(run.run_dir)) == 2, "another attempt")
    run.wait_for_step(saved + 10)

    rich.run("scancel", str(job))
    rich.wait_for(job, "CANCELLED", seconds=60)
    run.wait_until(lambda: run.outcomes()[1][0] != -1, "an outcome")
    assert rich.show(job)["Restarts"] == "1"
    out = read(tmp_path / "job.out")
    assert out.count("SIGTERM: stopping as soon as") == 2
    assert "Aborted" not in out, "as Ray's own handler does, three seconds after TERM"
    check_nothing_is_left(rich, job, tmp_path)
