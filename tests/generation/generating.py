"""Workers of a generation run, in the process of a test."""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

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


KILLED = 99
EVENTS = ("os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir")


def work_until_killed(run_dir: Path, number: int, calls: int) -> None:
    """Be a worker that ends itself before it changes a name in its run folder after so many."""
    left = calls

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in EVENTS and any(str(one).startswith(str(run_dir)) for one in arguments):
            if left == 0:
                os._exit(KILLED)
            left -= 1

    torch.set_num_threads(1)
    sys.addaudithook(hook)
    code = 1
    try:
        code = attempt(run_dir, pytest.MonkeyPatch(), number=number).code
    finally:
        sys.stdout.flush()
        os._exit(code)
