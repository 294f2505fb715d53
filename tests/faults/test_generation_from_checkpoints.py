"""Answers straight from a sharded training checkpoint are those of the exported model."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_generation
import tiny_recipe
from forked_runs import Group, Warm, Way
from tiny_generation import output_of

from dist_sft import local, manifest, parts, runs

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


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_goes_on_with_the_checkpoint_that_it_began_with(
    warm: Warm, training: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(steps: int) -> Path:
        return warm.run(
            tiny_recipe.write(
                training, tmp_path / "trained", train={"steps": steps}, checkpoint={"keep": 9},
                optimizer={"lr": 1e-2, "schedule": "constant"},
            ),
            1,
        )  # fmt: skip

    run_dir = train(4)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"row {n};"}) + "\n" for n in range(ROWS)))
    recipe = {
        "job": "generate",
        "model": {"path": str(run_dir)},
        "input": [{"path": str(prompts)}],
        "cache_dir": str(tmp_path / "cache"),
        "generate": {"max_new_tokens": 12, "part_rows": 4, "temperature": 1.0},
    }
    undisturbed = tiny_generation.write(recipe, tmp_path / "undisturbed")
    warm.run(undisturbed, 1, job="generate")
    path = tiny_generation.write(recipe, tmp_path / "answers")
    group = warm.start(path, 1, Way(seconds_per_step=0.02), job="generate")
    group.wait_until(lambda: len(parts.finished(group.run_dir)) >= 2)
    group.kill()
    assert 2 <= len(parts.finished(group.run_dir)) < 8
    train(6)  # meanwhile there is a newer one
    warm.run(path, 1, job="generate")
    same = output_of(tmp_path / "answers").read_bytes()
    assert same == output_of(tmp_path / "undisturbed").read_bytes()
    capsys.readouterr()
    assert local.main(["generate", str(path)]) == runs.FINISHED
    assert "is finished already" in capsys.readouterr().out
    # Who wants the newer one says so.
    local.main(["generate", str(path), "--prepare", "--reuse-unchanged"])
    Group(warm, group.run_dir, runs.start_attempt(group.run_dir), 1, Way(), "generate").finish()
    assert output_of(tmp_path / "answers").read_bytes() != same
