"""Twenty kills at random moments, on changing numbers of workers: the same bytes come out."""

import random
import shutil
import time
from collections import Counter
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import tiny_generation
from forked_runs import Group, Warm, Way
from tiny_generation import output_of, write

from dist_sft import parts, runs

SEED, KILLS, ROWS, PART_ROWS = 6, 20, 600, 4
WORLDS = (1, 3, 2)
# When a kill is due: within so long after the start, after a worker has begun with a part, or after
# one was finished, however slow the machine is.
MOMENTS = {"starting": (6, 0.1), "working": (7, 0.8), "got on": (7, 0.2)}
SLOWLY = Way(seconds_per_step=0.008)
SAMPLED = {"temperature": 0.9, "top_k": 50, "num_samples": 2}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_generation.make(tmp_path_factory.mktemp("killed"), ROWS)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("sampling", "suffix"),
    [
        ({}, ".jsonl"),
        (SAMPLED, ".parquet"),
        pytest.param({}, ".parquet", marks=pytest.mark.matrix),
        pytest.param(SAMPLED, ".jsonl", marks=pytest.mark.matrix),
    ],
    ids=["greedy-jsonl", "sampled-parquet", "greedy-parquet", "sampled-jsonl"],
)
def test_kills_change_nothing(
    warm: Warm, recipe: dict[str, Any], sampling: dict[str, Any], suffix: str, tmp_path: Path
) -> None:
    generate = recipe["generate"] | {"part_rows": PART_ROWS} | sampling
    undisturbed, killed = (
        write(recipe, tmp_path / name, suffix, generate=generate)
        for name in ("undisturbed", "killed")
    )
    warm.run(undisturbed, 1, job="generate")
    rng = random.Random(SEED)
    fell: Counter[str] = Counter()
    finished = [0]
    moments = [name for name, (count, _) in MOMENTS.items() for _ in range(count)]
    rng.shuffle(moments)
    for moment, world in zip(moments, cycle(WORLDS), strict=False):
        group = warm.start(killed, world, SLOWLY, job="generate")
        if moment != "starting":
            group.wait_until(partial(any_begun, group))
        if moment == "got on":
            group.wait_until(partial(more_finished, group, finished[-1]))
        time.sleep(rng.uniform(0, MOMENTS[moment][1]))
        victim = rng.randrange(world)
        assert group.kill_one(victim), f"kill {fell.total() + 1} found worker {victim} dead"
        group.kill()  # as torchrun does with the others
        fell[where_it_fell(group)] += 1
        finished.append(len(parts.finished(group.run_dir)))
    run_dir = warm.run(killed, WORLDS[0], job="generate")

    print(f"{KILLS} kills: {dict(fell)}; finished parts: {finished}")
    assert runs.attempts(run_dir) == list(range(KILLS + 1))
    assert fell["starting"] >= 1
    assert fell["in a part"] >= 8
    assert len(set(finished)) > 5, "the kills must have fallen on a run that got on"
    assert finished[-1] < -(-ROWS // PART_ROWS), "and not on one that was finished"
    assert (
        output_of(run_dir, suffix).read_bytes()
        == output_of(undisturbed.with_suffix(""), suffix).read_bytes()
    )


def begun(group: Group) -> set[int]:
    """Return the parts that workers of this attempt have begun."""
    claims = runs.attempt_dir(group.run_dir, group.attempt) / "claims"
    return {int(path.name) for path in claims.glob("*")}


def any_begun(group: Group) -> bool:
    return bool(begun(group))


def more_finished(group: Group, parts_before: int) -> bool:
    return len(parts.finished(group.run_dir)) > parts_before


def where_it_fell(group: Group) -> str:
    """Tell what the workers of a killed attempt were doing."""
    if not begun(group):
        return "starting"
    return "in a part" if begun(group) - parts.finished(group.run_dir) else "between parts"


@pytest.mark.slow
def test_the_comparison_would_see_a_difference(
    warm: Warm, recipe: dict[str, Any], tmp_path: Path
) -> None:
    """Another composition of batches, or another seed, does change bytes of sampled answers."""
    outputs = []
    for name, seed in (("one", 1), ("other", 2), ("same", 1)):
        path = write(recipe, tmp_path / name, generate=recipe["generate"] | SAMPLED, seed=seed)
        warm.run(path, 2, job="generate")
        outputs.append(output_of(tmp_path / name).read_bytes())
        shutil.rmtree(tmp_path / name)
    assert outputs[0] != outputs[1]
    assert outputs[0] == outputs[2]
