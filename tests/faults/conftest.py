"""What several tests of faults share: a process that forks ranks, and a run that finished."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_recipe
import torch.distributed as dist
from forked_runs import Warm
from tiny_recipe import Finished

from dist_sft import manifest


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Start the process that forks ranks."""
    with Warm(tmp_path_factory.mktemp("warm") / "log") as process:
        yield process


@pytest.fixture(scope="session")
def finished(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Run once, undisturbed; the tests work on copies. Checkpoints are those of steps 8 and 10."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = tiny_recipe.make_recipe(folder)
    path = tiny_recipe.write(recipe, folder / "run", train={"steps": 10})
    run_dir = warm.run(path, 2)
    assert list(manifest.folders(run_dir)) == [8, 10]
    return Finished(recipe, run_dir)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """Make this process a world of one rank."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()
