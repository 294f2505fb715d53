"""Generation on real Ray clusters: the bytes that one worker of `launch/local.py` gives."""

import json
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny_generation
from launching import run
from ray_cluster import Cluster
from ray_run import ENDING, Driver, RayRun
from tiny_generation import output_of, write

from dist_sft import parts, runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ROWS = 400
GENERATE = {"max_new_tokens": 40, "part_rows": 5, "batch_tokens": 600, "temperature": 0.8}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_generation.make(tmp_path_factory.mktemp("generation"), ROWS)


@pytest.fixture(scope="module")
def whole(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return what one worker gives that nobody disturbs."""
    path = write(recipe, tmp_path_factory.mktemp("whole") / "run", generate=GENERATE)
    code, _, err = run(path, workers=1, job="generate")
    assert code == runs.FINISHED, err
    return output_of(path.with_suffix("")).read_bytes()


def launch(ray: Cluster | None, path: Path, *options: str) -> RayRun:
    where = [] if ray is None else ["--address", ray.address]
    driver = Driver("generate", path, *where, *options, environment=ray and ray.environment)
    return RayRun(path.with_suffix(""), driver)


def wait_for_parts(run: RayRun, count: int) -> None:
    run.wait_until(lambda: len(parts.finished(run.run_dir)) >= count, f"{count} parts")


def actors(run: RayRun) -> list[psutil.Process]:
    """Return the processes of a run's actors on this machine."""
    found = []
    for process in psutil.process_iter():
        with ENDING:
            if process.name().startswith("ray::Worker") or "ray::Worker" in process.cmdline()[0]:
                found.append(process)
    return found


def test_a_killed_actor_costs_its_part_alone(
    ray: Cluster, recipe: dict[str, Any], whole: bytes, tmp_path: Path
) -> None:
    """Two workers, one of them killed; stopped, the run goes on without a cluster."""
    path = write(recipe, tmp_path / "run", generate=GENERATE)
    run = launch(ray, path, "--workers=2")
    wait_for_parts(run, 4)
    victims = actors(run)
    assert len(victims) == 2
    victims[0].kill()
    wait_for_parts(run, len(parts.finished(run.run_dir)) + 6)
    (run.run_dir / "STOP").touch()
    out = run.driver.finish(runs.STOPPED)
    assert "failed at part" in out
    assert f" of {ROWS} rows are finished" in out
    assert len(parts.finished(run.run_dir)) < ROWS // 5
    assert not actors(run)

    run = launch(None, path, "--workers=1")
    out = run.driver.finish()
    assert f"{ROWS} rows, {ROWS} answers" in out
    assert output_of(run.run_dir).read_bytes() == whole
    assert [code for code, _ in run.outcomes()] == [runs.STOPPED, runs.FINISHED]
    assert "is finished already" in launch(None, path, "--workers=1").driver.finish()


@pytest.mark.matrix
def test_a_lost_node_and_one_that_joins(
    ray: Cluster, recipe: dict[str, Any], whole: bytes, tmp_path: Path
) -> None:
    path = write(recipe, tmp_path / "run", generate=GENERATE)
    run = launch(ray, path, "--min-workers=1", "--max-workers=3")
    wait_for_parts(run, 4)
    ray.nodes[1].kill()
    wait_for_parts(run, len(parts.finished(run.run_dir)) + 6)
    ray.add()
    run.driver.finish()
    assert output_of(run.run_dir).read_bytes() == whole


@pytest.mark.matrix
def test_ctrl_c_ends_the_workers(recipe: dict[str, Any], whole: bytes, tmp_path: Path) -> None:
    path = write(recipe, tmp_path / "run", generate=GENERATE)
    run = launch(None, path, "--workers=2")
    wait_for_parts(run, 3)
    run.driver.signal(signal.SIGINT)
    assert "stopped by signal SIGINT" in run.driver.finish(runs.STOPPED)
    run = launch(None, path, "--workers=2")
    run.driver.finish()
    assert output_of(run.run_dir).read_bytes() == whole


@pytest.mark.matrix
def test_wrong_input_is_not_tried_again(
    ray: Cluster, recipe: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"question": "who?"}) + "\n")
    path = write(recipe, tmp_path / "run", input=[{"path": str(tmp_path / "in.jsonl")}])
    out = launch(ray, path, "--workers=1").driver.finish(runs.WRONG_INPUT)
    assert "fits no known format" in out
    assert "Traceback" not in out
    assert not output_of(tmp_path / "run").exists()
