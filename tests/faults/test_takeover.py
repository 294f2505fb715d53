"""The real launcher: a run whose owner shows no sign of life is taken over, and stays taken."""

import os
import re
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import tiny_recipe
from forked_runs import Warm, Way
from launching import SECONDS, run, start, wait_for_step

from dist_sft import lease, manifest, runs, verify_resume
from dist_sft.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 150


def send(launcher: subprocess.Popen[str], number: signal.Signals) -> None:
    """Send a signal to a launcher and everything below it, as if its host stopped or came back."""
    for process in [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(True)]:
        process.send_signal(number)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_frozen_owner_is_succeeded_and_does_no_harm_when_it_thaws(
    warm: Warm, tmp_path: Path
) -> None:
    recipe = tiny_recipe.make_recipe(tmp_path)
    run_dir = tmp_path / "run"
    whole, path = (
        tiny_recipe.write(recipe, folder, train={"steps": STEPS}, eval={"every": 50})
        for folder in (tmp_path / "whole", run_dir)
    )
    warm.run(whole, 2)
    orphan = start(path)
    wait_for_step(run_dir, 6, orphan)
    send(orphan, signal.SIGSTOP)
    try:
        frozen = lease.read(run_dir)
        assert frozen
        assert frozen.owner.pid == orphan.pid
        assert not lease.is_gone(frozen.owner), "nothing but its heart tells that it is dead"
        assert 4 <= max(manifest.folders(run_dir)) < STEPS - 20, "it has something left to do"

        code, out, err = run(path)
        assert code == 0, out + err
        assert f"watching for {lease.EXPIRY_SECONDS:.0f} s if it is alive" in out
        assert f"{frozen.owner} shows no sign of life: taking over" in out
        assert "continuing after step" in out
        assert runs.attempts(run_dir) == [0, 1]
        assert runs.read_outcome(run_dir, 1) == runs.Outcome(0, "finished", STEPS)
        finished = contents(run_dir / "checkpoints") | contents(run_dir / "model")
    finally:
        send(orphan, signal.SIGCONT)
    out, err = orphan.communicate(timeout=SECONDS)
    assert orphan.returncode == 1, out + err
    noticed = f"a newer attempt works on {run_dir}|another launcher has taken over {run_dir}"
    assert re.search(noticed, err), "its ranks when they commit, or its node before"
    assert contents(run_dir / "checkpoints") | contents(run_dir / "model") == finished
    assert sorted(os.listdir(run_dir / "checkpoints")) == sorted(
        folder.name for folder in manifest.folders(run_dir).values()
    )
    assert not (run_dir / lease.NAME).exists()
    assert verify_resume.compare(tmp_path / "whole", run_dir, STEPS).equal
    assert main(["verify", str(run_dir)]) == 0


def test_an_orphan_in_the_middle_of_its_commit_leaves_it(warm: Warm, tmp_path: Path) -> None:
    """It has looked once already whether it is the newest attempt, and was."""
    path = tiny_recipe.write(tiny_recipe.make_recipe(tmp_path), tmp_path / "run")
    group = warm.start(path, 2, Way(hold_at=("os.chmod", f"/{manifest.CHECKSUM}")))
    group.wait_until(lambda: group.is_held("call"))
    (half_written,) = (group.run_dir / "checkpoints").iterdir()
    assert (half_written / manifest.CHECKSUM).exists(), "all but its name is there"
    assert half_written.name.startswith(".step-00000004")
    assert runs.start_attempt(group.run_dir) == 1
    group.let_go("call")
    assert group.end() == [runs.FAILED] * 2
    failed = runs.first_failure(group.run_dir, 0)
    assert failed
    assert "a newer attempt works on" in failed[1].reason
    assert not os.listdir(group.run_dir / "checkpoints")
