"""Runs on a real SLURM cluster, and what happens to them there."""

import json
from pathlib import Path

import pytest
from launching import ROOT
from slurm_cluster import Cluster
from slurm_run import EVERY, STEPS, check_like, launch, make, run_here, submit

from dist_sft import report, runs

SCRIPT = ROOT / "slurm/train.sbatch"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run on this machine, undisturbed."""
    return run_here(make(tmp_path_factory.mktemp("undisturbed"), "run"))


@pytest.fixture
def recipe(whole: Path) -> Path:
    """Write the same recipe with another run folder; its path has a space."""
    number = len(list(whole.parent.glob("run *.yaml")))
    return make(whole.parent, f"run {number}")


def test_two_nodes_do_as_one_machine(slurm: Cluster, whole: Path, recipe: Path) -> None:
    run = submit(slurm, recipe)
    run.finish()
    check_like(whole, run, attempts=1)
    hosts = json.loads((run.run_dir / "logs/attempt-0/roll_call.json").read_text())["nodes"]
    assert sorted(node["host"] for node in hosts) == ["n1", "n2"]

    again = launch(slurm, "train", recipe, "--nodes=2", "--workers-per-node=1")
    assert f"{run.run_dir} is finished already" in again.stdout
    by_hand = slurm.submit("--nodes=2", f"--output={run.run_dir}/by-hand", SCRIPT, run.run_dir)
    slurm.wait_for(by_hand, "COMPLETED")
    assert "is finished already" in (run.run_dir / "by-hand").read_text()
    assert runs.attempts(run.run_dir) == [0]


def test_usr1_saves_and_goes_on_in_the_same_job(slurm: Cluster, whole: Path, recipe: Path) -> None:
    run = submit(slurm, recipe)
    run.wait_for_step(EVERY + 10)
    slurm.run("scancel", "--signal=USR1", "--batch", str(run.job))
    run.wait_until(lambda: runs.read_outcome(run.run_dir, 0) is not None, "an outcome")
    outcome = runs.read_outcome(run.run_dir, 0)
    assert outcome is not None
    assert outcome.code == runs.STOPPED
    assert outcome.reason == f"stopped by signal SIGUSR1 after step {outcome.step}, which is saved"
    run.finish()
    assert slurm.show(run.job)["Restarts"] == "1"
    check_like(whole, run, attempts=2)
    assert f"continuing after step {outcome.step} " in run.log
