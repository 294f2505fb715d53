"""Twenty kills at random moments, on changing numbers of ranks: every row still counts once."""

import random
import time
from collections import Counter, defaultdict
from itertools import cycle
from pathlib import Path

import pytest
import tiny_recipe
from forked_runs import Group, Warm, Way, computed, losses
from tiny_recipe import ROWS, STEPS_PER_EPOCH

from dist_sft import manifest, report, runs

SEED = 20
KILLS = 20
EPOCHS = 20
WORLDS = (2, 1, 3)
# When a kill is due: at any time after the start, after some steps, or once a save has begun.
MOMENTS = ("starting",) * 4 + ("training",) * 9 + ("saving",) * 7
STARTING_SECONDS = 1.0
TRAINING_STEPS, TRAINING_SECONDS = 10, 0.3
SAVING_SECONDS = (0, 0.005, 0.02, 0.1)
TOLERANCE = 1e-4


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_row_counts_once_whatever_is_killed(warm: Warm, tmp_path: Path) -> None:
    recipe = tiny_recipe.make_recipe(tmp_path)
    steps = EPOCHS * STEPS_PER_EPOCH

    def new_run(name: str) -> Path:
        return tiny_recipe.write(
            recipe,
            tmp_path / name,
            train={"steps": steps},
            optimizer={"lr": 2e-3},
            checkpoint={"every": 3},
        )

    rng = random.Random(SEED)
    moments = rng.sample(MOMENTS, KILLS)
    fell: list[str] = []
    newest: list[int] = []
    undisturbed = {world: warm.run(new_run(f"on-{world}"), world) for world in WORLDS}
    path = new_run("killed")
    for moment, world in zip(moments, cycle(WORLDS), strict=False):
        group = warm.start(path, world, Way(seconds_per_step=0.06))
        wait_for(moment, group, rng)
        before = list(manifest.folders(group.run_dir))
        assert group.kill(), f"kill {len(fell) + 1} did not hit a whole, unfinished run"
        fell.append(where_it_fell(group))
        newest.append(max(before, default=0))
    run_dir = warm.run(path, WORLDS[0])

    print(f"{len(fell)} kills: {Counter(fell)}; newest checkpoints at them: {newest}")
    assert len(fell) == KILLS
    assert runs.attempts(run_dir) == list(range(KILLS + 1))
    counts = Counter(fell)
    assert min(counts["starting"], counts["training"], counts["saving"]) >= 2, counts
    assert sum(step > 0 for step in newest) >= KILLS / 2
    assert len(set(newest)) > 5

    for folder in (run_dir, *undisturbed.values()):
        check_rows(recipe, folder, steps)
    replayed = Counter(
        step for step, _ in {(line["step"], line["attempt"]) for line in computed(run_dir)}
    )
    again = sum(times > 1 for times in replayed.values())
    print(f"{again} of {steps} steps were computed more than once, up to {max(replayed.values())}")
    assert again >= 5

    truth = losses(undisturbed[2])
    assert truth[-1] < 0.7 * truth[0], "the runs must have something to differ in"
    for folder in (undisturbed[1], undisturbed[3], run_dir):
        differences = [abs(a - b) / b for a, b in zip(losses(folder), truth, strict=True)]
        print(f"{folder.name}: losses differ from those on 2 ranks by up to {max(differences):.1e}")
        assert max(differences) < TOLERANCE


def wait_for(moment: str, group: Group, rng: random.Random) -> None:
    """Return at a random time of the kind that was asked for."""
    if moment == "starting":
        time.sleep(rng.uniform(0, STARTING_SECONDS))
        return
    steps = rng.randrange(TRAINING_STEPS)
    group.wait_until(lambda: steps_of(group) > steps)
    if moment == "training":
        time.sleep(rng.uniform(0, TRAINING_SECONDS))
    else:
        group.wait_until(lambda: bool(half_written(group)))
        time.sleep(rng.choice(SAVING_SECONDS))


def steps_of(group: Group) -> int:
    """Count the steps that this attempt has reported."""
    path = group.run_dir / "metrics.jsonl"
    if not path.exists():
        return 0
    return sum(line["attempt"] == group.attempt for line in report.read_steps(path))


def half_written(group: Group) -> list[Path]:
    return list((group.run_dir / "checkpoints").glob(".step-*"))


def where_it_fell(group: Group) -> str:
    if not steps_of(group):
        return "starting"
    return "saving" if half_written(group) else "training"


def check_rows(recipe: dict, run_dir: Path, steps: int) -> None:
    """Compare what counts of what the ranks computed with the rows that there are."""
    lines = computed(run_dir)
    counting: dict[int, int] = defaultdict(int)  # step -> its last attempt
    for line in lines:
        counting[line["step"]] = max(counting[line["step"]], line["attempt"])
    assert sorted(counting) == list(range(1, steps + 1))
    epochs: dict[int, Counter[int]] = defaultdict(Counter)
    for line in lines:
        if line["attempt"] == counting[line["step"]]:
            epoch = (line["step"] - 1) // STEPS_PER_EPOCH
            epochs[epoch].update(tiny_recipe.numbers_of(recipe, line["rows"]))
    assert sorted(epochs) == list(range(steps // STEPS_PER_EPOCH))
    once = Counter(range(ROWS))
    wrong = {epoch: (once - rows, rows - once) for epoch, rows in epochs.items() if rows != once}
    assert not wrong, f"epoch -> (missing, too often): {wrong}"
