"""Ray in an allocation of a real SLURM cluster: nodes with their own addresses."""

import re
import sys
from pathlib import Path

import pytest
from launching import ROOT
from ray_run import RayRun
from slurm_cluster import Cluster
from slurm_run import ENVIRONMENT, EVERY, check_like, make, run_here

pytestmark = [pytest.mark.slow, pytest.mark.matrix, pytest.mark.timeout(400)]


def test_two_nodes_do_as_one_machine(slurm: Cluster, tmp_path: Path) -> None:
    """The job is cut short, put back, and ends; nothing is left of its cluster."""
    whole = run_here(make(tmp_path, "here"))
    recipe = make(tmp_path, "there")
    node = slurm.run("scontrol", "--oneliner", "show", "node", "n1").stdout
    (cpus,) = re.findall(r"CPUTot=(\d+)", node)  # Ray packs workers on one node where they fit
    job = slurm.submit(
        "--nodes=2", "--exclusive", f"--output={tmp_path}/job.out", ROOT / "slurm/ray.sbatch",
        "train", recipe, "--workers=2", f"--resources-per-worker=CPU={cpus}",
        cwd=tmp_path,
        env=ENVIRONMENT | {"DIST_SFT_PYTHON": sys.executable},
    )  # fmt: skip
    run = RayRun(recipe.with_suffix(""), None)
    run.wait_for_step(EVERY + 10)
    slurm.run("scancel", "--signal=USR1", "--batch", str(job))
    try:
        slurm.wait_for(job, "COMPLETED", seconds=200)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{(tmp_path / 'job.out').read_text()}") from None
    check_like(whole, run, attempts=2)
    assert run.outcomes()[0][1].startswith("stopped by signal SIGUSR1 ")
    assert len(set(run.hosts(1))) == 2
    assert not list(tmp_path.glob(".ray-*"))
    assert not list(Path("/tmp").glob(f"ray-{job}-*"))
