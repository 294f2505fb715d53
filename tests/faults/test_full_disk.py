"""A disk that is full for a while costs checkpoints, not the run."""

import errno
import itertools
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_recipe
from forked_runs import Group, Warm, Way, losses
from launching import SECONDS, start, wait_for_step

from dist_sft import manifest, runs
from dist_sft.config import read_config_json
from dist_sft.report import read_steps

FULL, FREE, STEPS = 7, 11, 14  # checkpoints are due after steps 4, 8 and 12
KILOBYTE = 1024
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Write a recipe."""
    recipe = tiny_recipe.make_recipe(tmp_path)
    # Ranks that are held within a step do not meet in another one, where they would commit.
    saving = recipe["checkpoint"] | {"asynchronous": False}
    return tiny_recipe.write(recipe, tmp_path / "run", train={"steps": STEPS}, checkpoint=saving)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of two megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
        refusal = done.stderr.strip() if done.returncode else None
    except FileNotFoundError as error:
        refusal = str(error)
    if refusal:
        pytest.skip(f"no file system may be mounted here ({refusal}); the other test does without")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path) -> int:
    """Write until nothing more fits; return how many bytes that took."""
    for number in itertools.count():
        try:
            with open(disk / f"ballast-{number}", "wb", buffering=0) as file:
                written = file.write(bytes(16 * KILOBYTE))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return number * 16 * KILOBYTE
        if written < 16 * KILOBYTE:
            return number * 16 * KILOBYTE + written
    raise AssertionError


def failures(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line.get("event") == "checkpoint_failed"]


def wait_before(group: Group, step: int, newest: int) -> None:
    """Wait until all ranks are held before a step, and the checkpoint is there."""
    group.wait_until(lambda: group.is_held(step))
    group.wait_until(lambda: newest in manifest.folders(group.run_dir))


def check_failed_save(group: Group, reason: str) -> None:
    """The save of step 8 has failed, is told, left nothing, and the one before is whole."""
    run_dir = group.run_dir
    group.wait_until(lambda: bool(failures(run_dir)))
    (event,) = failures(run_dir)
    assert event["step"] == 8
    assert reason in event["reason"]
    group.wait_until(lambda: os.listdir(run_dir / "checkpoints") == ["step-00000004"])
    assert manifest.check(manifest.folder_of(run_dir, 4))[1] == []


def check_end(group: Group) -> None:
    """The run has finished, with the saves after the failed one."""
    group.finish()
    assert runs.is_finished(read_config_json(group.run_dir))
    assert len(failures(group.run_dir)) == 1
    assert len(losses(group.run_dir)) == STEPS
    assert sorted(os.listdir(group.run_dir / "checkpoints")) == ["step-00000012", "step-00000014"]
    for folder in manifest.folders(group.run_dir).values():
        assert manifest.check(folder)[1] == []


def test_a_full_disk(warm: Warm, path: Path, small_disk: Path) -> None:
    run_dir = path.with_suffix("")
    (small_disk / "checkpoints").mkdir()
    group = warm.start(path, 2, Way(hold_before=(1, FULL, FREE)))
    (run_dir / "checkpoints").symlink_to(small_disk / "checkpoints")
    group.let_go(1)

    wait_before(group, FULL, newest=4)
    assert fill(small_disk) > 100 * KILOBYTE, "it was full before"
    group.let_go(FULL)

    wait_before(group, FREE, newest=4)
    check_failed_save(group, os.strerror(errno.ENOSPC))
    for ballast in small_disk.glob("ballast-*"):
        ballast.unlink()
    group.let_go(FREE)
    check_end(group)


def test_a_full_run_folder(small_disk: Path, tmp_path: Path) -> None:
    """Metrics and logs are on the full disk, too: lines are lost, and the run is not."""
    recipe = tiny_recipe.make_recipe(tmp_path)
    run_dir = small_disk / "run"
    saving = {"every": None}  # pruning would make room
    path = tiny_recipe.write(recipe, run_dir, train={"steps": 60}, checkpoint=saving)
    process = start(path)
    wait_for_step(run_dir, 5, process)
    fill(small_disk)
    lost = len(losses(run_dir))
    assert process.stdout
    seen = []
    for line in process.stdout:
        seen.append(line)
        if re.match(r"step [3-9]\d/", line):
            break
    assert len(losses(run_dir)) < lost + 15, "it was not full"  # a page may have had room
    for ballast in small_disk.glob("ballast-*"):
        ballast.unlink()
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, out + err
    told = "".join(seen) + out
    assert "metrics.jsonl cannot be written, lines are lost: No space left" in told
    steps = [line["step"] for line in read_steps(run_dir / "metrics.jsonl")]
    assert steps[:5] == [1, 2, 3, 4, 5]
    assert steps[-1] == 60
    assert len(steps) < 60
    assert manifest.check(manifest.folder_of(run_dir, 60))[1] == []


@pytest.mark.parametrize("limited", [(1,), (0, 1)], ids=["rank 1", "all ranks"])
def test_files_that_may_not_grow(warm: Warm, path: Path, limited: tuple[int, ...]) -> None:
    """The same without a mount: for a while a rank's file may not become as large as it must."""
    group = warm.start(path, 2, Way(hold_before=(FULL, FREE)))
    wait_before(group, FULL, newest=4)
    files = manifest.folder_of(group.run_dir, 4).glob("rank-*")
    needed = min(file.stat().st_size for file in files)
    assert needed > 64 * KILOBYTE, "logs and metrics must stay below the limit"
    group.limit_files(limited, needed - KILOBYTE)
    group.let_go(FULL)

    wait_before(group, FREE, newest=4)
    check_failed_save(group, f"rank {limited[0]}: ")
    assert os.strerror(errno.EFBIG) in failures(group.run_dir)[0]["reason"]
    assert ("rank 0: " in failures(group.run_dir)[0]["reason"]) == (0 in limited)
    group.limit_files(limited, None)
    group.let_go(FREE)
    check_end(group)
