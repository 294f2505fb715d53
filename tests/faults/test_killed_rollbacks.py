"""A run that is killed while it goes back to a checkpoint ends as one that nobody disturbed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_recipe
from forked_runs import Warm, Way
from tiny_models import POISON, write_poisoned_model

from dist_sft import manifest, runs, verify_resume
from dist_sft.rollback import FILE, Rollback, read_rollbacks

STEPS = 14
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return a recipe of which one row makes the loss infinite, once in every epoch."""
    folder = tmp_path_factory.mktemp("poisoned")
    recipe = tiny_recipe.make_recipe(folder)
    write_poisoned_model(folder / "model", recipe["model"]["config"])
    rows = json.loads((folder / "row.json").read_text())
    rows[17]["instruction"] = POISON
    (folder / "row.json").write_text(json.dumps(rows))
    return recipe | {
        "model": {"path": str(folder / "model")},
        "train": recipe["train"] | {
            "steps": STEPS, "packing": "off", "on_divergence": "rollback", "max_skipped_steps": 0,
        },
        "checkpoint": {"every": 3, "keep": 9},
        "seed": 5,
    }  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(
    recipe: dict[str, Any], warm: Warm, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    return warm.run(tiny_recipe.write(recipe, folder / "run"), 2)


WAYS = {
    "not written down": Way(hold_at_write=f".{FILE}"),
    "not restored": Way(hold_at=("open", f"/{manifest.NAME}"), hold_once_there=FILE),
    "restored": Way(),
}


@pytest.mark.parametrize("place", WAYS)
def test_killed_while_it_goes_back(
    place: str, recipe: dict[str, Any], undisturbed: Path, warm: Warm, tmp_path: Path
) -> None:
    first, *others = read_rollbacks(undisturbed)
    assert first == Rollback(3, 5), "a good step is lost, too"
    assert others, "one more comes after it"
    after = first.step + 1
    held = {"not written down": "write", "not restored": "call", "restored": after}[place]
    way = replace(WAYS[place], hold_before=(after,))
    path = tiny_recipe.write(recipe, tmp_path / "run")
    group = warm.start(path, 2, way)
    group.wait_until(lambda: group.is_held(held))
    assert read_rollbacks(group.run_dir) == ([] if place == "not written down" else [first])
    assert max(manifest.folders(group.run_dir)) == first.checkpoint
    assert group.kill()

    run_dir = warm.run(path, 2)
    said = (runs.attempt_dir(run_dir, 1) / "rank-0.log").read_text()
    assert f"continuing after step {first.checkpoint}" in said
    assert (f"steps {first.checkpoint + 1} to {first.step} are passed over" in said) == (
        place != "not written down"
    )
    assert read_rollbacks(run_dir) == [first, *others], "nothing was met a second time"
    assert verify_resume.compare(undisturbed, run_dir, STEPS).equal
