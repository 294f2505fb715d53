"""Runs on several nodes of a real SLURM cluster, undisturbed: as on one machine, bit by bit."""

import json
import re
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from slurm_run import (
    by_hand,
    check_like,
    launch,
    make,
    run_here,
    submit,
)

from dist_sft import runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
matrix = pytest.mark.matrix


def test_two_nodes_do_as_one_machine(slurm: Cluster, whole: Path, recipe: Path) -> None:
    run = submit(slurm, recipe)
    run.slow(0)
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
