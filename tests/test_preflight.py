"""Refused before there is a run folder: paths that can only be local, and what needs GPUs."""

import os
from pathlib import Path
from typing import Any

import pytest

from dist_sft.config import Recipe, check
from dist_sft.paths import is_local, near_matches
from dist_sft.preflight import machine_mistakes, missing_paths


def recipe(folder: Path, **data: Any) -> Recipe:
    """Return a recipe whose paths exist, but for those in `data`."""
    (folder / "rows.jsonl").touch()
    settings = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(folder)},
        "data": {"train": [{"path": str(folder / "rows.jsonl")}]} | data,
    }
    return check(settings, "recipe.yaml")


@pytest.mark.parametrize(
    "path",
    ["/data/x", "./x", "../x", ".", "~someone/x", "a/b/c", "x/", "x.json", "org/X.JSONL", "x.csv",
     "org/x.parquet", "my rows"],
)  # fmt: skip
def test_what_can_only_be_local(path: str) -> None:
    assert is_local(path)


@pytest.mark.parametrize("path", ["gpt2", "org/name", "tatsu-lab/alpaca", "Qwen/Qwen2.5-0.5B", "_"])
def test_what_may_be_on_the_hub(path: str) -> None:
    assert not is_local(path)


def test_a_folder_that_may_not_be_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def listdir(folder: Path) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", listdir)
    assert near_matches("/secret/x") == " (the folder /secret cannot be read: Permission denied)"


def test_every_missing_path_is_named_at_once(tmp_path: Path) -> None:
    missing = {
        "train": [{"path": str(tmp_path / "rows.jsonl")}, {"path": str(tmp_path / "row.jsonl")}],
        "eval": [{"path": "org/name"}, {"path": "no/such/folder", "name": "x"}],
        "template": "./mine.jinja",
    }
    settings = recipe(tmp_path, **missing).model_dump()
    settings["model"] |= {"path": str(tmp_path / "m"), "tokenizer": "/nowhere/t"}
    rows = (
        "allowed: a .json, .jsonl, .csv, .parquet file, a folder written by Dataset.save_to_disk, "
        "a hub name"
    )
    here = Path.cwd()
    assert missing_paths(check(settings, "recipe.yaml")) == [
        f"data.train.1.path={tmp_path}/row.jsonl: no such file or folder; {rows}; "
        f"did you mean {tmp_path}/rows.jsonl?",
        f"data.eval.1.path=no/such/folder: no such file or folder; {rows} "
        f"(the folder no/such does not exist, seen from {here})",
        "data.template=./mine.jinja: no such file or folder; allowed: human-assistant, alpaca, "
        f"chatml, tokenizer, a Jinja file (looked in {here})",
        f"model.path={tmp_path}/m: no such file or folder; allowed: a folder with config.json and "
        f"safetensors weights, a finished run folder, a hub name (looked in {tmp_path})",
        "model.tokenizer=/nowhere/t: no such file or folder; allowed: a folder with "
        f"tokenizer.json, a hub name (the folder /nowhere does not exist, seen from {here})",
    ]


def test_nothing_is_said_where_nothing_is_missing(tmp_path: Path) -> None:
    assert missing_paths(recipe(tmp_path)) == []


def test_half_precision_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    settings = recipe(tmp_path).model_dump() | {"deepspeed": "zero1"}
    settings["model"]["dtype"] = "float16"
    half = check(settings, "recipe.yaml")
    assert machine_mistakes(half, workers=1, gpus=0) == [
        "model.dtype: float16 needs a GPU, and there is none here (CUDA_VISIBLE_DEVICES=); "
        "allowed here: auto, float32, bfloat16"
    ]
    assert machine_mistakes(half, workers=1, gpus=1) == []


@pytest.mark.parametrize(
    ("visible", "gpus", "there_are"),
    [
        ("0,3", 2, "there are 2 GPUs here (CUDA_VISIBLE_DEVICES=0,3)"),
        (None, 1, "there is 1 GPU here (CUDA_VISIBLE_DEVICES is not set)"),
    ],
)
def test_no_more_workers_than_gpus(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    gpus: int,
    there_are: str,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine_mistakes(recipe(tmp_path), workers=4, gpus=gpus) == [
        f"--workers: got 4, but {there_are} and every worker needs one of its own; allowed: 1 to "
        f"{gpus}, or with CUDA_VISIBLE_DEVICES= (empty) any number on CPU"
    ]
    assert machine_mistakes(recipe(tmp_path), workers=gpus, gpus=gpus) == []
    assert machine_mistakes(recipe(tmp_path), workers=4, gpus=0) == []
