"""The real launcher: no secret of its environment is written down, and a crash loop ends."""

import contextlib
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny_recipe
from launching import SECONDS, ranks_of, run, start, wait_for_step

from dist_sft import manifest, runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
# Recognised wherever it turns up; in parts of several names that people keep secrets under.
CANARY = "canary-5e1f-never-write-me-down"
NAMES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN", "GITHUB_TOKEN", "OPENAI_API_KEY", "COMET_API_KEY", "CLEARML_API_SECRET",
    "MLFLOW_TRACKING_PASSWORD", "SLURM_JWT", "DIST_SFT_CANARY", "PGPASSWORD", "SSH_AUTH_SOCK",
)  # fmt: skip
IMPATIENT = ("watchdog.seconds=2", "train.steps=400")
DIVERGING = ("optimizer.lr=1e38", "optimizer.clip=null", "optimizer.warmup_ratio=0.0")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_recipe.make_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.mark.parametrize(
    ("code", "overrides", "restarts"),
    [
        (0, (), 0),
        (1, DIVERGING, 1),
        (1, IMPATIENT, 0),
        (2, ("model.config.hidden_size=31",), 0),
    ],
    ids=["finished", "crashed", "hung", "wrong input"],
)
def test_secrets_of_the_environment_are_nowhere(
    code: int,
    overrides: tuple[str, ...],
    restarts: int,
    recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    secrets = {name: f"{CANARY}-{number}" for number, name in enumerate(NAMES)}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    path = tiny_recipe.write(
        recipe, tmp_path / "run", train={"steps": 6}, trackers=["tensorboard"],
        data={**recipe["data"], "cache_dir": str(tmp_path / "cache")},
    )  # fmt: skip
    process = start(path, *overrides, f"--restarts={restarts}")
    if overrides == IMPATIENT:
        wait_for_step(tmp_path / "run", 2, process)
        next(p for p in ranks_of(process) if p.environ()["RANK"] == "1").suspend()
    told = watch_ranks(process)
    out, err = process.communicate()
    assert process.returncode == code, out + err
    (tmp_path / "output").write_text(out + err)
    assert told, "no rank was seen"
    for environment in told:  # it is where it could be written down from
        assert secrets.items() <= environment.items()

    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    contents = {file: file.read_bytes() for file in files}
    assert CANARY.encode() not in b"".join(str(file).encode() for file in files)
    found = [file for file, content in contents.items() if CANARY.encode() in content]
    assert not found
    logs = b"".join(content for file, content in contents.items() if file.suffix == ".log")
    size = sum(map(len, contents.values()))
    print(f"{len(files)} files of {size:,} bytes, {len(logs):,} of them logs")
    stacks = b"most recent call first" if overrides == IMPATIENT else b"Traceback"
    assert (stacks in logs) == (code != 0), "a failure must leave what could give secrets away"
    if overrides == IMPATIENT:
        assert "has made no progress for" in err
    if code == 0:
        assert any("tfevents" in file.name for file in files)
        assert (tmp_path / "run" / "model" / "model.safetensors") in contents


def watch_ranks(process: subprocess.Popen[str]) -> list[dict[str, str]]:
    """Wait until the launcher ends; return the environments of the ranks that were seen."""
    told: dict[int, dict[str, str]] = {}
    deadline = time.monotonic() + SECONDS
    while process.poll() is None:
        assert time.monotonic() < deadline
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    environment = child.environ()
                    if "RANK" in environment:
                        told[child.pid] = environment
        time.sleep(0.2)
    return list(told.values())


def test_a_crash_at_the_same_step_is_given_up(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Checkpoints before it do not make the loop go on for ever, only new ones would."""
    run_dir = tmp_path / "run"
    path = tiny_recipe.write(recipe, run_dir, checkpoint={"every": 1})
    code, out, err = run(path, *DIVERGING, "--restarts=2")
    assert code == 1, out + err
    steps = [int(step) for step in re.findall(r"the loss is (?:inf|nan) in step (\d+)", err)]
    assert len(set(steps)) == 1, err
    assert runs.attempts(run_dir) == list(range(len(steps)))
    assert list(manifest.folders(run_dir))[-1] == steps[0] - 1, "it was resumed right before"
    # The first attempt brought checkpoints; two restarts brought none.
    assert len(steps) == 3
    assert out.count(f"continuing after step {steps[0] - 1}") == 2
    assert "gave up after 2 restarts without progress" in err
    assert not os.path.exists(run_dir / "lease.json")
    for attempt in runs.attempts(run_dir):
        outcome = runs.read_outcome(run_dir, attempt)
        assert outcome is not None
        assert outcome.code == runs.FAILED
