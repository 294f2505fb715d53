"""A run that was killed, wherever, ends bit by bit where an undisturbed one does."""

import os
from pathlib import Path
from typing import Any

import pytest
import tiny_recipe
import torch
from forked_runs import Group, Warm, Way, computed, losses
from tiny_recipe import STEPS_PER_EPOCH

from dist_sft import manifest, runs
from dist_sft.pieces import Reader

STEPS = 14
KEYS = ("fp32", "exp_avg", "exp_avg_sq")
# Ranks that are held within a step do not meet in another one, where they would commit.
SAVED_AT_ONCE = {"asynchronous": False}
MATRIX = [pytest.mark.slow, pytest.mark.matrix]
OTHERS = [pytest.param(name, marks=MATRIX) for name in ("zero1", "zero3")]
SHARDINGS = pytest.mark.parametrize(
    "sharding",
    ["zero2", None, *OTHERS],
    ids=["zero2", "data-parallel", "zero1", "zero3"],
)
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_recipe.make_recipe(tmp_path_factory.mktemp("recipe"))


class Bench:
    """Runs of one recipe in one folder, an undisturbed one among them."""

    def __init__(self, folder: Path, recipe: dict[str, Any], warm: Warm, **sections: Any) -> None:
        def write(name: str) -> Path:
            sized = {"train": {"steps": STEPS}, **sections}
            return tiny_recipe.write(recipe, folder / name, **sized)

        self.warm, self.path = warm, write("killed")
        sharding = sections.get("deepspeed", "zero2")
        self.stage = sharding and int(sharding.removeprefix("zero"))
        self.undisturbed = warm.run(write("undisturbed"), 2)

    def kill_before(self, step: int, *, newest: int) -> Group:
        """Start the next attempt and kill it at a step, with this checkpoint as the newest."""
        group = self.warm.start(self.path, 2, Way(hold_before=(step,)))
        group.wait_until(lambda: group.is_held(step))
        group.wait_until(lambda: newest in manifest.folders(group.run_dir))
        assert max(manifest.folders(group.run_dir)) == newest
        assert group.kill()
        return group

    def finish(self) -> Path:
        """Run the last attempt; the whole run must equal the undisturbed one."""
        run_dir = self.warm.run(self.path, 2)
        assert losses(run_dir) == losses(self.undisturbed)
        ours, theirs = (Reader(manifest.folder_of(d, STEPS)) for d in (run_dir, self.undisturbed))
        assert ours.manifest["shapes"] == theirs.manifest["shapes"]
        assert ours.manifest["zero_stage"] == theirs.manifest["zero_stage"] == self.stage
        assert ours.manifest["optimizer_steps"] == theirs.manifest["optimizer_steps"] == STEPS
        for name in ours.manifest["shapes"]:
            for key in KEYS:
                assert torch.equal(ours.tensor(name, key), theirs.tensor(name, key)), (name, key)
                assert ours.tensor(name, key).any(), "nothing was learned"
        return run_dir


def steps_of(run_dir: Path, attempt: int) -> list[int]:
    """List the steps that an attempt computed."""
    return sorted({line["step"] for line in computed(run_dir) if line["attempt"] == attempt})


@SHARDINGS
def test_killed_after_the_last_step_of_an_epoch(
    sharding: str | None, recipe: dict[str, Any], warm: Warm, tmp_path: Path
) -> None:
    bench = Bench(
        tmp_path,
        recipe,
        warm,
        deepspeed=sharding,
        checkpoint=SAVED_AT_ONCE | {"every": STEPS_PER_EPOCH},
    )
    bench.kill_before(2 * STEPS_PER_EPOCH - 1, newest=STEPS_PER_EPOCH)
    run_dir = bench.finish()
    assert steps_of(run_dir, 1) == list(range(STEPS_PER_EPOCH + 1, STEPS + 1))


@SHARDINGS
def test_killed_and_continued_and_killed_again(
    sharding: str | None, recipe: dict[str, Any], warm: Warm, tmp_path: Path
) -> None:
    bench = Bench(
        tmp_path, recipe, warm, deepspeed=sharding, checkpoint=SAVED_AT_ONCE | {"every": 3}
    )
    bench.kill_before(6, newest=3)
    bench.kill_before(12, newest=9)
    run_dir = bench.finish()
    assert runs.attempts(run_dir) == [0, 1, 2]
    assert [steps_of(run_dir, n)[0] for n in range(3)] == [1, 4, 10]


@pytest.mark.parametrize("place", ["rank-00001.safetensors", "manifest.json"])
@SHARDINGS
def test_killed_in_the_first_save(
    sharding: str | None, place: str, recipe: dict[str, Any], warm: Warm, tmp_path: Path
) -> None:
    bench = Bench(tmp_path, recipe, warm, deepspeed=sharding)
    # Temporary names in front and behind, but for those of the folder.
    way = Way(hold_at_write=place if place.startswith("rank") else f".{place}")
    group = warm.start(bench.path, 2, way)
    group.wait_until(lambda: group.is_held("write"))
    (half_written,) = (group.run_dir / "checkpoints").iterdir()
    assert half_written.name.startswith(".step-00000004")
    assert not manifest.folders(group.run_dir)
    assert group.kill()
    run_dir = bench.finish()
    assert steps_of(run_dir, 1) == list(range(1, STEPS + 1)), (
        "anew: there was nothing to go on from"
    )
    assert not [name for name in os.listdir(run_dir / "checkpoints") if name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "path", "left"),
    [
        ("os.rename", "checkpoints/step-00000002", ["step-00000002"]),
        ("shutil.rmtree", "/.step-00000002.old", [".step-00000002.old"]),
        ("os.remove", "rank-00001.safetensors", [".step-00000002.old"]),
    ],
    ids=["before the rename", "after it", "while files go"],
)
def test_killed_while_old_checkpoints_go(
    call: str, path: str, left: list[str], recipe: dict[str, Any], warm: Warm, tmp_path: Path
) -> None:
    bench = Bench(tmp_path, recipe, warm, checkpoint=SAVED_AT_ONCE | {"every": 2, "keep": 2})
    group = warm.start(bench.path, 2, Way(hold_at=(call, path), hold_before=(8,)))
    group.wait_until(lambda: group.is_held("call"))
    group.wait_until(lambda: group.is_held(8))  # training goes on beside it
    checkpoints = group.run_dir / "checkpoints"
    assert [p.name for p in checkpoints.glob("*step-00000002*")] == left
    assert list(manifest.folders(group.run_dir))[-2:] == [4, 6]
    whole = len(list(manifest.folder_of(group.run_dir, 4).iterdir()))
    assert (len(list((checkpoints / left[0]).iterdir())) < whole) == (call == "os.remove")
    assert group.kill()
    run_dir = bench.finish()
    assert steps_of(run_dir, 1)[0] == 7
    assert not [name for name in os.listdir(run_dir / "checkpoints") if name.startswith(".")]
    assert min(manifest.folders(run_dir)) > 6
