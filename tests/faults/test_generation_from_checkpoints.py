"""Answers straight from a sharded training checkpoint are those of the exported model."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_generation
import tiny_recipe
from forked_runs import Warm
from tiny_generation import output_of

from dist_sft import manifest

ROWS = 30


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_recipe.make_recipe(tmp_path_factory.mktemp("training"))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("sharding", ["zero2", "zero3"])
def test_any_number_of_workers_reads_any_sharding(
    warm: Warm, training: dict[str, Any], sharding: str, tmp_path: Path
) -> None:
    path = tiny_recipe.write(
        training, tmp_path / "trained", train={"steps": 6}, optimizer={"lr": 1e-2},
        deepspeed=sharding,
    )  # fmt: skip
    run_dir = warm.run(path, 2)
    assert manifest.read(manifest.folder_of(run_dir, 6))["world_size"] == 2
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"row {n};"}) + "\n" for n in range(ROWS)))
    recipe = {
        "job": "generate",
        "input": [{"path": str(prompts)}],
        "cache_dir": str(tmp_path / "cache"),
        "generate": {"max_new_tokens": 12, "part_rows": 4, "temperature": 0.7, "num_samples": 2},
    }
    answers = {}
    for name, model, workers in (
        ("exported", run_dir / "model", 1),
        ("alone", run_dir, 1),
        ("three", run_dir, 3),
        ("older", manifest.folder_of(run_dir, 4), 2),
    ):
        path = tiny_generation.write(recipe, tmp_path / name, model={"path": str(model)})
        warm.run(path, workers, job="generate")
        answers[name] = output_of(tmp_path / name).read_bytes()
        converted = list((tmp_path / name / "weights").glob("*/*.safetensors"))
        assert len(converted) == (name != "exported"), "once for all workers"
    assert answers["alone"] == answers["three"] == answers["exported"]
    assert answers["older"] != answers["alone"], "there must be something to differ in"
