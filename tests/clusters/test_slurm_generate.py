"""Generation on a real SLURM cluster: the same bytes as of one worker here, whatever happens."""

import json
import re
from pathlib import Path

import pytest
import tiny_generation
from slurm_cluster import Cluster
from slurm_run import Submitted, common, launch, run_here, slow, status, submit
from tiny_generation import ROWS, output_of, write

from dist_sft import parts, runs
from dist_sft.config import read_config_json

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
matrix = pytest.mark.matrix

PAUSE = 0.05  # seconds before each token
SAMPLED = {"temperature": 0.8, "top_p": 0.9}


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Answer on this machine, by one worker, undisturbed."""
    with common(tmp_path_factory, "answers") as folder:
        output = output_of(folder / "run")
        if not output.exists():
            recipe = write(tiny_generation.make(folder), folder / "run")
            run_here(recipe, workers=1, job="generate")
        return output.read_bytes()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Write the same recipe, slow in its first attempt."""
    slow(tmp_path / "the run", PAUSE, attempts=1)
    return write(tiny_generation.make(tmp_path), tmp_path / "the run")


def start(slurm: Cluster, recipe: Path, *options: str) -> Submitted:
    """Submit a recipe, and wait until some of it is done."""
    run = submit(slurm, recipe, *options, job="generate")
    run.wait_for_parts(3)
    return run


def check(answers: bytes, run: Submitted, attempts: int) -> None:
    """The answers are those of an undisturbed run, and nothing else is left."""
    assert output_of(run.run_dir).read_bytes() == answers
    assert runs.attempts(run.run_dir) == list(range(attempts))
    plan = parts.read_plan(run.run_dir)
    assert plan is not None
    finished = runs.Outcome(0, "finished", plan.parts)
    assert runs.read_outcome(run.run_dir, attempts - 1) == finished
    assert not (run.run_dir / "weights").exists()


def hosts(run: Submitted, attempt: int) -> list[str]:
    path = runs.attempt_dir(run.run_dir, attempt) / "slurm.json"
    return list(json.loads(path.read_text())["hosts"])


def test_generation_is_put_back_and_gives_the_same_bytes(
    slurm: Cluster, answers: bytes, recipe: Path
) -> None:
    run = start(slurm, recipe)
    told = status(run)
    assert f"job {run.job}: RUNNING\n" in told
    assert re.search(rf"^rows \d+ of {ROWS} .*; left: 0:0", told, re.MULTILINE)
    run.signal("USR1")
    run.wait_until(lambda: runs.read_outcome(run.run_dir, 0) is not None, "an outcome")
    outcome = runs.read_outcome(run.run_dir, 0)
    assert outcome is not None
    assert (outcome.code, outcome.asked_by) == (runs.STOPPED, "signal SIGUSR1")
    done = re.fullmatch(
        rf"stopped by signal SIGUSR1; (\d+) of {ROWS} rows are finished", outcome.reason
    )
    assert done
    assert 0 < int(done[1]) < ROWS
    run.finish()
    assert slurm.show(run.job)["Restarts"] == "1"
    check(answers, run, attempts=2)
    assert run.log.count("starting workers: 2") == 2
    again = launch(slurm, "generate", recipe, "--nodes=2", "--workers-per-node=1")
    assert f"{run.run_dir} is finished already: the answers are in " in again.stdout
    assert f"rows {ROWS} of {ROWS} (100.0%)" in status(run)


@matrix
@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_node_that_dies_is_replaced(
    slurm: Cluster, answers: bytes, recipe: Path, node: str
) -> None:
    """The other one goes on until SLURM ends it."""
    run = start(slurm, recipe)
    run.slow(10 * PAUSE)  # it could finish all of it alone
    slurm.kill_node(node)
    run.wait_for_restart()
    run.finish()
    assert node not in hosts(run, 1)
    check(answers, run, attempts=2)


@matrix
def test_who_is_left_finishes_what_a_dead_node_had_begun(
    slurm: Cluster, answers: bytes, recipe: Path
) -> None:
    """SLURM puts the job back all the same when it misses the node: there is nothing to do then."""
    run = start(slurm, recipe)
    slurm.kill_node("n2")
    run.slow(0)
    run.wait_until(output_of(run.run_dir).exists, "the answers")
    run.finish()
    check(answers, run, attempts=1)


@matrix
def test_a_chain_goes_on(slurm: Cluster, answers: bytes, recipe: Path) -> None:
    last = submit(slurm, recipe, "--chain", "3", job="generate")
    first = Submitted(slurm, last.run_dir, last.job - 2)
    first.wait_for_parts(3)
    first.signal("USR1")
    first.finish("FAILED")
    last.finish()
    check(answers, last, attempts=2)
    assert "is finished already" in last.log


@matrix
def test_a_sweep_has_answers_of_each_run(slurm: Cluster, tmp_path: Path) -> None:
    recipe = write(tiny_generation.make(tmp_path), tmp_path / "sweep", generate=SAMPLED)
    submit(slurm, recipe, "--sweep", "seed=1,2", nodes="1", job="generate")
    folders = [tmp_path / f"sweep/seed={seed}" for seed in (1, 2)]
    outputs = [output_of(tmp_path / "sweep").with_stem(f"sweep-answers-seed={n}") for n in (1, 2)]
    array = Submitted(slurm, folders[0], 0)
    array.wait_until(
        lambda: all(runs.is_finished(read_config_json(folder)) for folder in folders), "both", 120
    )
    told = [path.read_bytes() for path in outputs]
    assert [text.count(b"\n") for text in told] == [ROWS, ROWS]
    assert told[0] != told[1]
    assert not output_of(tmp_path / "sweep").exists()


@matrix
def test_a_training_run_answers_on_two_nodes(slurm: Cluster, tmp_path: Path, whole: Path) -> None:
    """Its sharded checkpoint is converted by one node, and read by both."""
    rows = tiny_generation.make(tmp_path) | {"model": {"path": str(whole)}}
    here, there = (write(rows, tmp_path / name) for name in ("here", "there"))
    run_here(here, workers=1, job="generate")
    run = submit(slurm, there, job="generate")
    run.finish()
    check(output_of(tmp_path / "here").read_bytes(), run, attempts=1)
    assert run.log.count("converting ") == 1
    assert "the checkpoint of step " in run.log
