"""What the Ray launcher makes of its arguments, and what a worker makes of how a rank ended."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("ray")

from dist_sft import node, ray_cluster, ray_job, ray_submit, ray_worker, runs
from dist_sft.errors import UserError
from dist_sft.ray_controller import Attempts, GaveUp, ask_to_stop
from dist_sft.ray_node import ray_command
from dist_sft.runs import Outcome


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with a recipe and its rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text("[]")
    content = {
        "run_dir": "runs/my run",
        "model": {"config": {"model_type": "llama"}, "tokenizer": "hub/name"},
        "data": {"train": [{"path": "rows.json"}]},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "logs" / "attempt-0").mkdir(parents=True)
    return folder


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Return what a dry run says that Ray is asked for."""
    assert ray_job.main(["train", "recipe.yaml", "--dry-run", *arguments]) == 0
    text = capsys.readouterr().out.partition("# Ray\n")[2].partition("# command")[0]
    found: dict[str, Any] = json.loads(text)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert ray_job.main(["train", "recipe.yaml", *arguments]) == runs.WRONG_INPUT
    return capsys.readouterr().err


def test_the_size_and_the_resources(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--workers=4", "--resources-per-worker", "CPU=2,GPU=1", "seed=3")
    assert asked(capsys, *words) == {
        "address": None,
        "num_workers": 4,
        "resources_per_worker": {"CPU": 2.0, "GPU": 1.0},
        "restarts": 3,
    }
    told = asked(capsys, "--min-workers=2", "--max-workers=8")
    assert told["num_workers"] == [2, 8]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--workers=0",), "--workers: got 0; allowed: 1 or more"),
        (("--min-workers=2",), "--min-workers, --max-workers: give both"),
        (("--min-workers=3", "--max-workers=2"), "--min-workers: got 3 of 2"),
        (("--workers=2", "--min-workers=2", "--max-workers=2"), "not both"),
        (("--resources-per-worker=GPU",), "got GPU; allowed: NAME=COUNT"),
        (("--resources-per-worker=CPU=-1",), "got CPU=-1; allowed: NAME=COUNT"),
        (("--resources-per-worker=GPU=2",), "got GPU=2; allowed: GPU=1"),
        (("--restarts=-1",), "--restarts: got -1"),
        (("data.train.0.path=other.json",), "other.json: no such file"),
        (
            ("--address=http://127.0.0.1:1", "--runtime-env=no.yaml"),
            "--runtime-env: no.yaml is no file",
        ),
        (("--address=http://127.0.0.1:1",), "--address: http://127.0.0.1:1: "),
        (("--address=127.0.0.1:1",), "got 127.0.0.1:1, and it cannot be joined: [Errno 111]"),
        (("--address=ray://a",), "got ray://a, and it cannot be joined: invalid literal"),
    ],
)
def test_wrong_options(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], told: str
) -> None:
    assert told in refused(capsys, *words)


def test_a_job_runs_the_same_launch_on_the_cluster(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line is run by a shell: quoting is tried with one."""
    folder = tmp_path / "on the cluster"
    folder.mkdir()
    words = (
        "--address=http://head:8265",
        f"--folder={folder}",
        "--workers=2",
        "model.tokenizer=a b",
    )
    line = asked(capsys, *words)["entrypoint"]
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\npwd; printf "%s\\n" "$@"\n')
    program.chmod(0o755)
    done = subprocess.run(
        ["sh", "-c", line], text=True, capture_output=True, env={"DIST_SFT_PYTHON": str(program)}
    )
    assert done.stdout.splitlines() == [
        str(folder),
        *("-m", "dist_sft.ray_job", "train", f"{here}/recipe.yaml", "model.tokenizer=a b"),
        *("--workers=2", "--restarts=3", "--wait=45", "--resize-every=60", "--address=auto"),
    ]
    folder.rmdir()
    assert subprocess.run(["sh", "-c", line], capture_output=True).returncode == runs.WRONG_INPUT


def test_a_runtime_environment(tmp_path: Path) -> None:
    path = tmp_path / "env.yaml"
    path.write_text("env_vars: {A: b}")
    assert ray_submit.read_runtime_env(path) == {"env_vars": {"A": "b"}}
    path.write_text("working_dir: .")
    with pytest.raises(UserError, match="working_dir, which carries the recipe"):
        ray_submit.read_runtime_env(path)


@pytest.mark.parametrize(
    ("per_worker", "room"),
    [
        ({"CPU": 1}, 7),
        ({"CPU": 2}, 3),
        ({"CPU": 1, "GPU": 1}, 2),
        ({"CPU": 0.5}, 14),
        ({"TPU": 1}, 0),
    ],
)
def test_room_is_counted_by_nodes(per_worker: dict[str, float], room: int) -> None:
    nodes = [{"CPU": 3.0, "GPU": 4.0}, {"CPU": 4.0}]
    if "GPU" in per_worker:
        nodes[0]["GPU"] = 2.0
    assert ray_cluster.room(per_worker, nodes) == room


def test_what_there_is_is_told() -> None:
    nodes = [("a", {"CPU": 2.0, "memory": 5.0, "node:1.2.3.4": 1.0}), ("b", {"GPU": 1.0})]
    told = str(ray_cluster.too_small(3, {"CPU": 1.0}, nodes))
    assert told.startswith(
        "--workers: got 3, each with CPU 1; the cluster has room for 2 (a: CPU 2; b: GPU 1)."
    )


@pytest.mark.parametrize(
    ("mode", "dashboard", "words"),
    [
        ("token", "10.0.0.1:8265", ()),
        ("disabled", "127.0.0.1:8265", ("no token authentication", "RAY_AUTH_MODE=token")),
        ("disabled", "10.0.0.1:8265", ("Its dashboard listens on 10.0.0.1",)),
    ],
)
def test_an_open_cluster_is_warned_of(
    mode: str,
    dashboard: str,
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    ray_cluster.warn(dashboard)
    told = capsys.readouterr().out
    assert all(word in told for word in words)
    assert bool(told) == bool(words)


def test_the_head_of_a_slurm_job() -> None:
    head = ray_command(0, 4, "10.0.0.1", "n1", 20007, Path("/tmp/ray-7-0"))
    assert "--head" in head
    assert "--dashboard-host=127.0.0.1" in head
    assert "--address=n1:20007" in ray_command(1, 4, "10.0.0.2", "n1", 20007, Path("/tmp/x"))


def judge(run_dir: Path, code: int, asked: str | None, rank: int = 0) -> None:
    (run_dir / f"logs/attempt-0/worker-{rank}.log").write_text("ImportError: nothing")
    ray_worker.judge(run_dir, 0, rank, code, asked)


def test_a_rank_that_ends_in_order(run_dir: Path) -> None:
    judge(run_dir, 0, None)
    judge(run_dir, 0, "signal SIGTERM")
    runs.write_outcome(run_dir, 0, Outcome(runs.FINISHED, "finished", 3))
    judge(run_dir, 0, ray_worker.RESIZE)  # it was faster


def test_a_rank_that_goes_on_elsewhere(run_dir: Path) -> None:
    runs.write_outcome(run_dir, 0, Outcome(runs.STOPPED, "saved", 3))
    with pytest.raises(ray_worker.Moved):
        judge(run_dir, 0, ray_worker.DRAIN)


def test_a_rank_that_was_ended_before_it_could_save(run_dir: Path) -> None:
    judge(run_dir, -9, "signal SIGINT")
    outcome = runs.read_outcome(run_dir, 0)
    assert outcome is not None
    assert outcome.code == runs.STOPPED
    assert outcome.reason.startswith("stopped by signal SIGINT before the workers could write")


@pytest.mark.parametrize(
    ("code", "told"), [(-9, "ended by SIGKILL"), (1, "ended with 1\nImportError: nothing")]
)
def test_a_rank_that_fails_without_a_word(run_dir: Path, code: int, told: str) -> None:
    with pytest.raises(ray_worker.RankFailed):
        judge(run_dir, code, None, rank=1)
    blamed = node.blame(run_dir, 0)
    assert blamed is not None
    assert blamed.reason.startswith(told)
    assert "rank 1 failed first" in blamed.reason


@pytest.fixture
def attempts(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Attempts:
    monkeypatch.setenv(ray_worker.ATTEMPT, "0")
    return Attempts(str(run_dir), restarts=1)


def fail(attempts: Attempts, run_dir: Path, attempt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ray_worker.ATTEMPT, str(attempt))
    runs.attempt_dir(run_dir, attempt).mkdir(exist_ok=True)
    attempts.after_exception(None, {1: RuntimeError("the actor died")})


def test_restarts_without_progress_are_bounded(
    attempts: Attempts, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(attempts, run_dir, 0, monkeypatch)
    fail(attempts, run_dir, 0, monkeypatch)  # Ray tells more than once
    (run_dir / "checkpoints/step-00000004").mkdir(parents=True)
    fail(attempts, run_dir, 1, monkeypatch)
    with pytest.raises(GaveUp, match="the actor died"):
        fail(attempts, run_dir, 2, monkeypatch)
    outcome = runs.read_outcome(run_dir, 2)
    assert outcome is not None
    assert "its Ray worker failed: the actor died\nrank 1 failed first" in outcome.reason


@pytest.mark.parametrize("code", [runs.WRONG_INPUT, runs.STOPPED])
def test_what_is_not_tried_again(
    attempts: Attempts, run_dir: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    runs.write_outcome(run_dir, 0, Outcome(code, "because", 2))
    with pytest.raises(GaveUp, match="because"):
        fail(attempts, run_dir, 0, monkeypatch)


def test_ranks_that_have_moved_go_on(attempts: Attempts, run_dir: Path) -> None:
    runs.write_outcome(run_dir, 0, Outcome(runs.STOPPED, "stopped", 3, asked_by="another rank"))
    attempts.after_exception(None, {0: ray_worker.Moved("x"), 1: RuntimeError("node died")})


def test_a_drained_node_that_died_first_goes_on(attempts: Attempts, run_dir: Path) -> None:
    saved = Outcome(runs.STOPPED, "stopped", 3, asked_by=ray_worker.DRAIN)
    runs.write_outcome(run_dir, 0, saved)
    attempts.after_exception(None, {1: RuntimeError("node died")})


def test_the_first_wish_to_stop_counts(run_dir: Path) -> None:
    assert ray_worker.read_stop(run_dir, 0) is None
    ask_to_stop(run_dir, 0, "signal SIGINT")
    ask_to_stop(run_dir, 0, ray_worker.RESIZE)
    assert ray_worker.read_stop(run_dir, 0) == "signal SIGINT"


def test_reports_are_of_this_attempts_newest_step(run_dir: Path) -> None:
    path = run_dir / "metrics.jsonl"
    lines = [
        {"attempt": 0, "step": 1, "loss": 3.0},
        {"attempt": 0, "step": 2, "loss": 2.0, "eval_loss": {"zh": 4.0}},
        {"attempt": 0, "step": 2, "event": "checkpoint"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"attempt": 0, "st')
    reporter = ray_worker.Reporter(run_dir, 0)
    assert reporter.has_news()
    assert reporter.metrics == {"attempt": 0, "step": 2, "loss": 2.0, "eval_loss/zh": 4.0}
    assert not reporter.has_news()
    assert not ray_worker.Reporter(run_dir, 1).has_news()
    assert reporter.checkpoint() is None
