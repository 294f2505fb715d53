"""Workers of a generation run, in the process of a test."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_sft import generate, local, parts, runs
from dist_sft.console import Console
from dist_sft.runs import Outcome


def work(
    path: Path, patch: pytest.MonkeyPatch, *options: str, rank: int = 0, world: int = 1
) -> Outcome:
    """Do what one worker of a launch does, in this process."""
    assert local.main(["generate", str(path), "--prepare", *options]) == runs.FINISHED
    return attempt(path.with_suffix(""), patch, rank, world)


def attempt(
    run_dir: Path,
    patch: pytest.MonkeyPatch,
    rank: int = 0,
    world: int = 1,
    number: int | None = None,
) -> Outcome:
    number = runs.start_attempt(run_dir) if number is None else number
    variables = {
        "RANK": rank, "LOCAL_RANK": 0, "GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1, "WORLD_SIZE": world,
    }  # fmt: skip
    for name, value in variables.items():
        patch.setenv(name, str(value))
    outcome = generate.generate(run_dir, number, Console(None))
    if rank == 0:
        runs.write_outcome(run_dir, number, outcome)
    return outcome


def rows_in(text: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def after(count: int, happens: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Let something happen when a worker hands in a part for this time."""
    commit, calls = parts.commit, Counter[str]()

    def committed(*arguments: Any) -> bool:
        calls["commit"] += 1
        done = commit(*arguments)
        if calls["commit"] == count:
            happens()
        return done

    patch.setattr(parts, "commit", committed)


def launch(path: Path, *options: str) -> int:
    return local.main(["generate", str(path), *options])
