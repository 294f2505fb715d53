"""Runs on a real SLURM cluster whose nodes die."""

import json
from pathlib import Path
from typing import Literal

import pytest
from slurm_cluster import Cluster
from slurm_run import (
    DISTURBED,
    Submitted,
    check_like,
    check_whole,
    status,
    submit,
)

from dist_sft import report, runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
matrix = pytest.mark.matrix

OUTLIVES = 0.4  # seconds per step: a minute, where SLURM takes 17 to 25 s to miss a node


def lose(run: Submitted, node: str, how: Literal["power", "slurmd", "net"], whole: Path) -> None:
    """A node dies, and the job ends on another one as it would have ended."""
    run.wait_for_step(DISTURBED)
    run.cluster.kill_node(node, how)
    run.wait_for_restart()
    run.finish()
    check_like(whole, run, attempts=2)
    hosts = json.loads((run.run_dir / "logs/attempt-1/slurm.json").read_text())["hosts"]
    assert node not in hosts


@matrix
def test_what_lives_on_a_cut_off_node_commits_nothing(
    slurm: Cluster, whole: Path, recipe: Path
) -> None:
    """It needs no network to go on: all its workers are there."""
    run = submit(slurm, recipe, nodes="1", workers=2)
    run.wait_for_step(DISTURBED)
    run.slow(OUTLIVES)
    slurm.kill_node("n1", "net")
    run.wait_for_restart()
    run.wait_until(lambda: runs.read_outcome(run.run_dir, 0) is not None, "the orphan ends", 90)
    orphan = runs.read_outcome(run.run_dir, 0)
    assert orphan is not None
    assert orphan.code == runs.FAILED
    assert "a newer attempt works on" in orphan.reason or "has taken over" in orphan.reason
    run.finish()
    check_like(whole, run, attempts=2)


@matrix
def test_a_node_whose_slurmd_dies_is_replaced(slurm: Cluster, whole: Path, recipe: Path) -> None:
    """Its workers live until they miss the others, which SLURM ends when it notices."""
    run = submit(slurm, recipe)
    run.wait_for_step(DISTURBED)
    run.slow(OUTLIVES)
    lose(run, "n2", "slurmd", whole)


@pytest.mark.parametrize(
    ("node", "how"), [("n2", "power"), pytest.param("n1", "net", marks=matrix)]
)
def test_a_node_that_dies_is_replaced(
    slurm: Cluster, whole: Path, recipe: Path, node: str, how: Literal["power", "net"]
) -> None:
    lose(submit(slurm, recipe), node, how, whole)


@matrix
def test_the_first_node_dies_and_the_status_says_what_slurm_does(
    rich: Cluster, whole: Path, recipe: Path
) -> None:
    run = submit(rich, recipe)
    lose(run, "n1", "power", whole)
    assert "attempt 0: no outcome: it was killed (SLURM: NODE_FAIL)\n" in status(run)


@matrix
def test_a_dead_node_that_stays_dead_is_done_without(
    slurm: Cluster, whole: Path, recipe: Path
) -> None:
    run = submit(slurm, recipe, "--exclude=n3,n4", nodes="1-2")
    run.wait_for_step(DISTURBED)
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
