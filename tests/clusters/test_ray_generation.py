"""Generation on a real Ray cluster: workers are killed one by one, and the bytes are the same."""

from pathlib import Path

import pytest
import tiny_generation
from launching import run as run_here
from ray_cluster import Cluster
from ray_run import Driver, RayRun
from tiny_generation import output_of, write

from dist_sft import parts, runs, status

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
ROWS = 400
GENERATE = {"max_new_tokens": 32, "part_rows": 4, "batch_tokens": 300}  # one row at a time: slow


def test_killed_workers_cost_their_parts_alone(ray: Cluster, tmp_path: Path) -> None:
    """A rank and a Ray worker; a third worker has no room, until rank 0 loses its place to it.

    A stop, and the same command goes on.
    """
    recipe = tiny_generation.make(tmp_path, ROWS)
    undisturbed = write(recipe, tmp_path / "undisturbed", generate=GENERATE)
    code, _, err = run_here(undisturbed, workers=1, job="generate")
    assert code == runs.FINISHED, err

    path, run_dir = write(recipe, tmp_path / "run", generate=GENERATE), tmp_path / "run"
    words = ("generate", path, "--min-workers=1", "--max-workers=3", "--address", ray.address)
    first = RayRun(run_dir, Driver(*words, environment=ray.environment))
    first.wait_until(lambda: len(first.ranks("generate")) == 2, "two workers")
    before = len(parts.finished(run_dir))
    first.wait_until(lambda: len(parts.finished(run_dir)) > before + 3, "parts of both")
    killed, other = first.ranks("generate")
    killed.kill()
    in_its_place = "another process in its place"
    first.wait_until(lambda: len({*first.ranks("generate")} - {killed, other}) == 1, in_its_place)
    assert other in first.ranks("generate"), "it was not disturbed"
    told = f"{run_dir}: launched by ray, workers: 2 (wanted: 1 to 3)"
    first.wait_until(lambda: told in status.status(run_dir), "status of both")
    (run_dir / "STOP").touch()
    out = first.driver.finish(runs.STOPPED)
    assert "ended by SIGKILL" in out
    assert "starting it again (1 of 3 without a new part)" in out
    assert "stopped by STOP file; " in out
    stopped_at = len(parts.finished(run_dir))
    assert stopped_at < ROWS // 4

    again = RayRun(run_dir, Driver(*words, environment=ray.environment))
    again.wait_until(lambda: len(again.ranks("generate")) == 2, "two workers")
    worker = again.ranks("generate")[1].parent()
    worker.kill()
    out = again.driver.finish()
    assert "its Ray worker failed" in out
    assert output_of(run_dir).read_bytes() == output_of(tmp_path / "undisturbed").read_bytes()
    assert [code for code, _ in again.outcomes()] == [runs.STOPPED, runs.FINISHED]
    finished = Driver(*words, environment=ray.environment)
    assert "is finished already" in finished.finish()


@pytest.mark.matrix
def test_wrong_input_is_not_tried_again(ray: Cluster, tmp_path: Path) -> None:
    recipe = tiny_generation.make(tmp_path, 40)
    path = write(recipe, tmp_path / "run", generate={**GENERATE, "max_new_tokens": 100000})
    words = ("generate", path, "--workers=2", "--address", ray.address)
    out = Driver(*words, environment=ray.environment).finish(runs.WRONG_INPUT)
    assert "generate.max_new_tokens: got 100000" in out
    assert runs.attempts(tmp_path / "run") == [0]
