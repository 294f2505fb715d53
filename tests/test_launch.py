"""From a recipe to ranks: the run folder, torchrun's command, signals, and how an attempt ended."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import yaml

from dist_sft import lease, local, node, roll_call, runs, stopping
from dist_sft.config import read_config_json
from dist_sft.console import Console
from dist_sft.errors import UserError
from dist_sft.lease import Lease, Owner
from dist_sft.node import Group, count_gpus, group_from, threads_for, torchrun_command
from dist_sft.runs import Launch, Outcome
from dist_sft.stopping import Relay, StopFlag


class Setup(NamedTuple):
    """A recipe on disk, and the folder that its run would have."""

    recipe: Path
    run_dir: Path

    def launch(self, *arguments: str) -> int:
        return local.main(["train", str(self.recipe), *arguments])


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").touch()
    run_dir = tmp_path / "run"
    recipe = {
        "run_dir": str(run_dir),
        "model": {"path": "m"},
        "data": {"train": [{"path": "a.json"}]},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return Setup(tmp_path / "recipe.yaml", run_dir)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a small program in torchrun's place; `attempt` is its folder, `write` writes into it.

    What it prints goes where torchrun's words go.
    """

    def replace(program: str) -> None:
        def command(run_dir: Path, job: str, attempt: int, group: Group) -> list[str]:
            folder = str(runs.attempt_dir(run_dir, attempt))
            head = (
                "import json, os, signal, sys, time\nfrom pathlib import Path\n"
                f"attempt = Path({folder!r})\n"
                "def write(name, **what):\n"
                "    (attempt / name).write_text(json.dumps(what))\n"
            )
            return [sys.executable, "-c", head + program]

        monkeypatch.setattr(node, "torchrun_command", command)

    return replace


# ---- commands as data ------------------------------------------------------------------------


def test_command_for_one_node() -> None:
    assert torchrun_command(Path("runs/x"), "train", 3, Group(1, 2)) == [
        sys.executable,
        "-m",
        "dist_sft.deaf_torchrun",
        "--standalone",
        "--nproc-per-node=2",
        "--signals-to-handle=SIGPWR",
        "-m",
        "dist_sft.train",
        "runs/x",
        "--attempt=3",
    ]


def test_command_for_several_nodes() -> None:
    command = torchrun_command(Path("x"), "train", 0, Group(4, 8, 3, ("head", 29500)))
    assert command[3:8] == [
        "--nnodes=4",
        "--node-rank=3",
        "--master-addr=head",
        "--master-port=29500",
        "--nproc-per-node=8",
    ]
    assert "--standalone" not in command


def launched(nodes: int = 1, workers: int = 2) -> Launch:
    return Launch("local", nodes, workers, {}, "0")


def test_group_of_one_node_needs_no_variables() -> None:
    assert group_from({"NODE_RANK": "7"}, launched()) == Group(1, 2)


def test_group_of_several_nodes_comes_from_variables() -> None:
    environment = {"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert group_from(environment, launched(2)) == Group(2, 2, 1, ("10.0.0.1", 29500))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "a run on 2 nodes needs NODE_RANK, MASTER_ADDR, MASTER_PORT on every node"),
        (
            {"NODE_RANK": "0", "MASTER_ADDR": "", "MASTER_PORT": "1"},
            "a run on 2 nodes needs MASTER_ADDR on every node",
        ),
        (
            {"NODE_RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "NODE_RANK: got '2'; allowed: 0 to 1",
        ),
        (
            {"NODE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "port"},
            "MASTER_PORT: got 'port'; allowed: 1 to 65535",
        ),
    ],
)
def test_group_is_never_guessed(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as refusal:
        group_from(environment, launched(2))
    assert str(refusal.value) == message


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert threads_for("auto", workers_per_node=8, gpus=0) == 1
    assert threads_for("auto", workers_per_node=8, gpus=8) == 8
    assert threads_for("auto", workers_per_node=100, gpus=8) == 1
    assert threads_for(3, workers_per_node=8, gpus=8) == 3


@pytest.mark.parametrize(
    ("visible", "count"), [("", 0), ("-1", 0), ("0", 1), ("0,2", 2), ("GPU-a, GPU-b,", 2)]
)
def test_counts_visible_gpus(visible: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_gpus() == count


def test_counts_gpus_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert count_gpus() == 0
    listing = "GPU 0: Some GPU (UUID: GPU-1)\n  MIG 1g.10gb Device 0: (UUID: MIG-1)\nGPU 1: Some\n"
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!{sys.executable}\nimport sys\nassert sys.argv[1:] == ['-L']\n"
                       f"print({listing!r})\n")  # fmt: skip
    program.chmod(0o755)
    assert count_gpus() == 2


# ---- the launcher ----------------------------------------------------------------------------


def test_dry_run_prints_exactly_what_would_run(
    setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    assert setup.launch("--dry-run", "--workers", "2", "seed=5", "threads_per_worker=3") == 0
    printed, errors = capsys.readouterr()
    head, _, rest = printed.partition("\n")
    config, _, command = rest.rpartition("# command\n")
    assert head == f"# {setup.run_dir}/config.json"
    assert command == (
        "TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 OMP_NUM_THREADS=3 "
        "MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=68719476736 "
        f"{sys.executable} -m dist_sft.deaf_torchrun --standalone --nproc-per-node=2 "
        "--signals-to-handle=SIGPWR "
        f"-m dist_sft.train {setup.run_dir} --attempt=0\n"
    )
    assert errors == ""
    assert not setup.run_dir.exists()
    # What it showed is what it would write, to the last byte.
    assert setup.launch("--prepare", "--workers", "2", "seed=5", "threads_per_worker=3") == 0
    assert (setup.run_dir / "config.json").read_text() == config


def test_dry_run_names_the_next_attempt(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    setup.launch("--prepare")
    runs.start_attempt(setup.run_dir)
    capsys.readouterr()
    setup.launch("--dry-run")
    assert capsys.readouterr().out.endswith(f"{setup.run_dir} --attempt=1\n")


def test_prepare_writes_a_complete_run_folder(
    setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    assert setup.launch("seed=7", "--prepare", "train.steps=3", "--workers", "2") == 0
    assert capsys.readouterr().out == f"prepared {setup.run_dir}\n"
    assert read_config_json(setup.run_dir).seed == 7
    launch = runs.read_launch(setup.run_dir)
    assert (launch.launcher, launch.nodes, launch.workers_per_node) == ("local", 1, 2)
    assert launch.options == {
        "overrides": ["seed=7", "train.steps=3"],
        "allow_change": [],
        "trust_checkpoint": False,
        "restarts": 0,
    }
    assert launch.revision.startswith("0.")
    assert sorted(path.name for path in setup.run_dir.iterdir()) == [
        "config.json", "launch.json", "logs",
    ]  # fmt: skip
    assert runs.attempts(setup.run_dir) == []


def test_as_many_workers_as_gpus(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    setup.launch("--prepare")
    assert runs.read_launch(setup.run_dir).workers_per_node == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    setup.launch("--prepare")
    assert runs.read_launch(setup.run_dir).workers_per_node == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "--workers: got 0; allowed: 1 or more"),
        (["--restarts", "-1"], "--restarts: got -1; allowed: 0 or more"),
        (["seed=-1"], "seed: got -1; allowed: 0 or more"),
        (["lr"], "override 'lr' is not of the form dotted.key=value"),
        (["run_dir=" + "x" * 300], "cannot be used: File name too long"),
        (["--dry-run", "data.train.0.path=b.json"], "data.train.0.path=b.json: no such file"),
    ],
)
def test_what_is_refused_leaves_nothing_behind(
    setup: Setup, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = sorted(setup.recipe.parent.rglob("*"))
    assert setup.launch(*arguments) == runs.WRONG_INPUT
    printed, errors = capsys.readouterr()
    assert message in errors
    assert printed == ""
    assert sorted(setup.recipe.parent.rglob("*")) == before


def test_refuses_a_folder_that_is_something_else(
    setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    setup.run_dir.mkdir()
    setup.launch("--prepare")  # an empty folder is fine
    assert (setup.run_dir / "config.json").exists()
    holiday = setup.recipe.with_name("holiday")
    holiday.mkdir()
    (holiday / "photo.png").touch()
    capsys.readouterr()
    for place in (holiday, holiday / "photo.png"):
        assert setup.launch("--prepare", f"run_dir={place}") == runs.WRONG_INPUT
        assert capsys.readouterr().err == (
            f"run_dir: {place} exists and is not a run folder (no config.json in it); "
            "give the path of a new or empty folder\n"
        )
    below_a_file = holiday / "photo.png" / "run"
    assert setup.launch("--prepare", f"run_dir={below_a_file}") == runs.WRONG_INPUT
    assert capsys.readouterr().err == (f"run_dir: {below_a_file} cannot be used: Not a directory\n")
    assert [path.name for path in holiday.iterdir()] == ["photo.png"]


def test_a_full_disk_leaves_no_half_of_a_file(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert setup.launch() == runs.WRONG_INPUT
    assert capsys.readouterr().err == (
        f"run_dir: {setup.run_dir} cannot be used: No space left on device\n"
    )
    assert [path for path in setup.run_dir.rglob("*") if path.is_file()] == []


def finished(setup: Setup, code: int = runs.FINISHED, steps: int = 1) -> None:
    """Make a run folder with one attempt that took some steps and then ended with `code`."""
    setup.launch("--prepare")
    runs.write_outcome(setup.run_dir, runs.start_attempt(setup.run_dir), Outcome(code, "so", steps))
    (setup.run_dir / "metrics.jsonl").write_text("{}\n" * steps)


def test_a_finished_run_says_so(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    finished(setup)
    setup.recipe.with_name("a.json").unlink()  # and needs its data no more
    capsys.readouterr()
    assert setup.launch() == runs.FINISHED
    assert capsys.readouterr().out == (
        f"{setup.run_dir} is finished already; for another run give another run_dir, "
        "for more of this one more steps (under a constant schedule)\n"
    )
    assert setup.launch("--dry-run") == runs.FINISHED
    assert "is finished already" in capsys.readouterr().out
    assert runs.attempts(setup.run_dir) == [0]
    before = {path: path.read_bytes() for path in setup.run_dir.glob("*.json*")}
    assert setup.launch("seed=3", "--allow-change", "seed") == runs.FINISHED
    assert {path: path.read_bytes() for path in setup.run_dir.glob("*.json*")} == before


CONSTANT = ("optimizer.schedule=constant", "train.steps=4")


def test_a_finished_run_that_is_to_be_longer_goes_on(
    setup: Setup, ranks: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    ranks("write('outcome.json', code=0, reason='finished', step=4)")
    assert setup.launch(*CONSTANT) == runs.FINISHED
    (setup.run_dir / "metrics.jsonl").write_text("{}\n")
    assert setup.launch(*CONSTANT[:1], "train.steps=7", "--prepare") == runs.FINISHED
    assert setup.launch("train.steps=9", "--prepare") == runs.WRONG_INPUT
    printed, errors = capsys.readouterr()
    assert f"{setup.run_dir} continues with other settings:\n  train.steps: 4 -> 7\n" in printed
    assert errors.endswith(
        "\nAnother end goes through by itself where no step depends on it (under "
        "optimizer.schedule: constant and optimizer.warmup_ratio: 0), and it is not before the "
        "newest checkpoint\n"
    )
    with open(setup.run_dir / "changes.jsonl", "a") as file:
        file.write('{"time": 1')  # as a full disk leaves it
    assert setup.launch(*CONSTANT[:1], "train.steps=7") == runs.FINISHED, "was only prepared so far"
    assert setup.launch(*CONSTANT[:1], "train.steps=9") == runs.FINISHED
    assert setup.launch(*CONSTANT[:1], "train.steps=9") == runs.FINISHED
    assert runs.attempts(setup.run_dir) == [0, 1, 2]
    assert "finished already" in capsys.readouterr().out
    assert setup.launch(*CONSTANT) == runs.WRONG_INPUT
    assert "train.steps: 9 -> 4" in capsys.readouterr().err


def test_a_dry_run_refuses_it_too(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    assert setup.launch("--prepare") == runs.FINISHED
    runs.start_attempt(setup.run_dir)
    assert setup.launch("--dry-run", "seed=5") == runs.WRONG_INPUT
    assert "belongs to a run with other settings" in capsys.readouterr().err
    assert setup.launch("--dry-run", f"run_dir={'x' * 300}") == runs.WRONG_INPUT
    assert "File name too long" in capsys.readouterr().err


def test_refuses_a_run_folder_of_another_recipe(
    setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(setup, runs.STOPPED)
    before = (setup.run_dir / "config.json").read_bytes()
    capsys.readouterr()
    overrides = ["seed=1", "optimizer.lr=1e-3", "eval.every=5", "data.eval_fraction=0.5"]
    assert setup.launch(*overrides) == runs.WRONG_INPUT
    assert capsys.readouterr().err == (
        f"run_dir: {setup.run_dir} belongs to a run with other settings "
        "(that run's -> the new ones):\n"
        "  seed: 0 -> 1\n"
        "  data.eval_fraction: 0.0 -> 0.5\n"
        "  optimizer.lr: 2e-05 -> 0.001\n"
        "Give another run_dir, or the settings of that run to continue it. To go on with other "
        "mathematics on purpose, add --allow-change seed --allow-change data.eval_fraction "
        "--allow-change optimizer.lr\n"
    )
    assert (setup.run_dir / "config.json").read_bytes() == before
    assert runs.attempts(setup.run_dir) == [0]


def learned(run_dir: Path) -> None:
    """Leave a run folder as one that has taken a step."""
    attempt = runs.start_attempt(run_dir)
    runs.write_outcome(run_dir, attempt, Outcome(runs.STOPPED, "stopped", 1))
    (run_dir / "metrics.jsonl").write_text('{"attempt": 0, "step": 1}\n')


def test_other_mathematics_is_let_through_by_name_and_recorded(
    setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    assert setup.launch("--prepare") == runs.FINISHED
    learned(setup.run_dir)
    changed = ("--prepare", "optimizer.lr=3e-5", "optimizer.clip=2", "seed=4")
    assert setup.launch(*changed, "--allow-change", "optimizer.lr") == runs.WRONG_INPUT
    said = capsys.readouterr().err
    assert "seed: 0 -> 4" in said
    assert "optimizer.lr" not in said
    assert said.endswith(", add --allow-change seed --allow-change optimizer.clip\n")
    assert "No setting" not in said
    assert setup.launch(*changed, "--allow-change", "optimizer.l") == runs.WRONG_INPUT
    assert capsys.readouterr().err.endswith("\nNo setting of this name differs: optimizer.l\n")
    allowing = ("--allow-change", "optimizer", "--allow-change", "seed")
    assert setup.launch(*changed, *allowing) == runs.FINISHED
    assert read_config_json(setup.run_dir).seed == 4
    record = json.loads((setup.run_dir / "changes.jsonl").read_text())
    assert record["seed"] == "0 -> 4"
    assert record["before_attempt"] == 1
    assert "optimizer.lr" in record


def test_a_run_continues_with_less_memory(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    """The advice after running out of memory must not lead to a refusal."""
    finished(setup, runs.WRONG_INPUT)
    capsys.readouterr()
    assert setup.launch("--prepare", "train.tokens_per_micro_batch=2048") == 0
    assert capsys.readouterr().out == (
        f"{setup.run_dir} continues with other settings:\n"
        "  train.tokens_per_micro_batch: 4096 -> 2048\n"
        f"prepared {setup.run_dir}\n"
    )
    assert read_config_json(setup.run_dir).train.tokens_per_micro_batch == 2048


def test_a_run_continues_under_another_sharding(
    setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(setup, runs.STOPPED)
    assert setup.launch("--prepare", "deepspeed=zero2") == 0
    capsys.readouterr()
    assert setup.launch("--prepare", "deepspeed=zero3", "data.cache_dir=cache") == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{setup.run_dir} continues with other settings:\n")
    assert '  data.cache_dir: null -> "cache"\n' in printed
    assert "  deepspeed.zero_optimization.stage: 2 -> 3\n" in printed


def test_a_refused_attempt_does_not_cost_the_run_folder(
    setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(setup, runs.WRONG_INPUT, steps=0)
    (setup.run_dir / "initial").mkdir()
    capsys.readouterr()
    assert setup.launch("--prepare", "data.train.0.path=b.json") == 0
    assert capsys.readouterr().out == (
        f"{setup.run_dir} has made nothing yet; its settings change:\n"
        '  data.train.0.path: "a.json" -> "b.json"\n'
        f"prepared {setup.run_dir}\n"
    )
    assert read_config_json(setup.run_dir).data.train[0].path == "b.json"
    assert not (setup.run_dir / "initial").exists(), "random weights of other settings"


def test_an_attempt_that_may_still_run_keeps_its_settings(setup: Setup) -> None:
    setup.launch("--prepare")
    runs.start_attempt(setup.run_dir)
    assert setup.launch("--prepare", "seed=1") == runs.WRONG_INPUT


def test_two_launchers_do_not_share_an_attempt(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup.launch("--prepare")
    assert runs.start_attempt(setup.run_dir) == 0
    monkeypatch.setattr(runs, "attempts", lambda run_dir: [])
    with pytest.raises(UserError, match="another launcher has just started attempt 0"):
        runs.start_attempt(setup.run_dir)
    monkeypatch.undo()
    (setup.run_dir / "logs").rename(setup.run_dir / "elsewhere")
    (setup.run_dir / "logs").touch()
    with pytest.raises(UserError, match="logs cannot be written: Not a directory"):
        runs.start_attempt(setup.run_dir)


def test_attempts_are_numbers(setup: Setup) -> None:
    for name in ("attempt-9", "attempt-10", "attempt-x", "attempt-3.bak"):
        (setup.run_dir / "logs" / name).mkdir(parents=True)
    assert runs.attempts(setup.run_dir) == [9, 10]
    assert runs.start_attempt(setup.run_dir) == 11


def test_revision_says_whether_the_checkout_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))
    assert "+" not in runs.code_revision(), "an installed package has no commit"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    (tmp_path / "file").touch()
    for command in (["init", "-q"], ["add", "file"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    clean = runs.code_revision()
    assert len(clean.partition("+")[2]) == 12
    (tmp_path / "file").write_text("changed")
    assert runs.code_revision() == f"{clean}-dirty"


# ---- how an attempt ended --------------------------------------------------------------------


def failure(rank: int, code: int, reason: str, when: float) -> str:
    what = {"code": code, "reason": reason, "step": -1, "rank": rank, "time": when}
    return f"write('failure-{rank}.json', **{what!r})\n"


def test_a_finished_attempt_says_nothing(
    setup: Setup, ranks: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    (setup.run_dir).mkdir()
    ranks("print('training'); write('outcome.json', code=0, reason='finished', step=5)")
    assert setup.launch() == runs.FINISHED
    out, err = capfd.readouterr()
    logs = setup.run_dir / "logs/attempt-0"
    assert out == f"attempt 0: starting workers: 1, logs: {logs}\ntraining\n"
    assert err == ""
    assert runs.is_finished(read_config_json(setup.run_dir))


def test_a_stopped_attempt_can_be_continued(
    setup: Setup, ranks: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    ranks("write('outcome.json', code=75, reason='stopped by STOP file after step 2', step=2)")
    assert setup.launch() == runs.STOPPED
    assert capfd.readouterr().err == (
        "stopped by STOP file after step 2\nthe same command continues the run\n"
    )
    (setup.run_dir / "STOP").touch()
    ranks("write('outcome.json', code=0, reason='finished', step=5)")
    assert setup.launch() == runs.FINISHED
    assert runs.attempts(setup.run_dir) == [0, 1]
    assert not (setup.run_dir / "STOP").exists(), "a person's next launch removes it"


def test_wrong_input_on_one_rank_is_all_that_is_said(
    setup: Setup, ranks: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    """Other ranks die of network errors, some before the one to blame has written its words."""
    ranks(
        failure(0, 1, "RuntimeError: Connection closed by peer", 10.0)
        + failure(1, 2, "data.train.0.path=x: broken", 11.0)
        + failure(2, 1, "RuntimeError: Connection reset", 12.0)
        + "print('Traceback (most recent call last):', file=sys.stderr); sys.exit(1)"
    )
    assert setup.launch() == runs.WRONG_INPUT
    assert capfd.readouterr().err == "data.train.0.path=x: broken\n"
    assert runs.read_outcome(setup.run_dir, 0) == Outcome(2, "data.train.0.path=x: broken", -1)


def test_a_crash_names_the_rank_and_its_log(
    setup: Setup, ranks: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    ranks(
        failure(0, 1, "RuntimeError: Connection closed by peer", 11.0)
        + failure(1, 1, "KeyError: 'x'", 10.0)
        + "sys.exit(1)"
    )
    assert setup.launch() == runs.FAILED
    log = setup.run_dir / "logs" / "attempt-0" / "rank-1.log"
    reason = f"KeyError: 'x'\nrank 1 failed first; its log: {log}"
    assert capfd.readouterr().err == f"{reason}\n"
    assert runs.read_outcome(setup.run_dir, 0) == Outcome(1, reason, -1)


# The form of torchrun's own words, shortened.
VERDICT = (
    "E1124 04:09:57.775000 16573 torch/distributed/elastic/multiprocessing/api.py:1002] "
    "failed (exitcode: {code}) local_rank: 1 (pid: 16776) of binary: /usr/bin/python\n"
    "Traceback (most recent call last):\n"
    '  File "<frozen runpy>", line 198, in _run_module_as_main\n'
    "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
)


@pytest.mark.parametrize(
    ("words", "code", "headline"),
    [
        ("the port is taken\n", 1, "torchrun ended with 1"),
        ("No module named x\n" + VERDICT.format(code=1), 1, "worker 1: ended with 1"),
        (VERDICT.format(code=-6), 1, "worker 1: ended by SIGABRT"),
    ],
)
def test_workers_that_say_nothing(
    setup: Setup,
    ranks: Callable[[str], None],
    capfd: pytest.CaptureFixture[str],
    words: str,
    code: int,
    headline: str,
) -> None:
    ranks(f"print({words!r}, end='', file=sys.stderr); sys.exit({code})")
    assert setup.launch() == runs.FAILED
    logs = setup.run_dir / "logs" / "attempt-0"
    own_words = words.partition("E1124")[0]
    assert capfd.readouterr().err == f"{headline}; nobody said why. Logs: {logs}\n{own_words}"
    assert (logs / "torchrun-0.log").read_text() == words
    outcome = runs.read_outcome(setup.run_dir, 0)
    assert outcome is not None
    assert outcome.code == runs.FAILED


LOST = "RuntimeError: Connection closed by peer"
KILLED = (
    "ended by SIGKILL, killed from outside: by a person, or by the kernel because the machine ran "
    "out of memory (see `dmesg`): then try fewer workers; a smaller train.tokens_per_micro_batch, "
    "or deepspeed: zero3; for generation a smaller generate.batch_tokens"
)


@pytest.mark.parametrize(
    ("wrote", "code", "reason"),
    [
        (failure(0, 1, LOST, 10.0), -9, f"{KILLED}\nrank 1 failed first"),
        (failure(0, 1, LOST, 10.0), -11, "ended by SIGSEGV\nrank 1 failed first"),
        (failure(0, 2, "data.train: empty", 10.0), -9, "data.train: empty"),
        # Libraries abort ranks that lost another one, and ranks that are going down anyway.
        (failure(0, 1, "KeyError: 'x'", 10.0), -6, "KeyError: 'x'\nrank 0 failed first"),
        (failure(1, 1, "KeyError: 'x'", 10.0), -9, "KeyError: 'x'\nrank 1 failed first"),
    ],
)
def test_a_killed_rank_outranks_those_that_only_lost_it(
    setup: Setup,
    ranks: Callable[[str], None],
    capfd: pytest.CaptureFixture[str],
    wrote: str,
    code: int,
    reason: str,
) -> None:
    told = VERDICT.format(code=code)
    ranks(wrote + f"print({told!r}, end='', file=sys.stderr); sys.exit(1)")
    assert setup.launch() in (runs.FAILED, runs.WRONG_INPUT)
    assert capfd.readouterr().err.startswith(reason)


def on_two_nodes(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "head")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(roll_call, "take", lambda *_, **__: None)  # one of them is not there
    setup.launch("--prepare")
    runs.write_atomically(setup.run_dir / "launch.json", json.dumps(vars(launched(nodes=2))))
    runs.start_attempt(setup.run_dir)


def rank_0_says(setup: Setup, outcome: Outcome, after: float) -> threading.Timer:
    timer = threading.Timer(after, runs.write_outcome, (setup.run_dir, 0, outcome))
    timer.start()
    return timer


def test_a_node_that_is_done_waits_for_rank_0(
    setup: Setup, ranks: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_two_nodes(setup, monkeypatch)
    monkeypatch.setenv("NODE_RANK", "1")
    ranks("pass")
    timer = rank_0_says(setup, Outcome(runs.FINISHED, "finished", 7), after=1.5)
    assert node.run(setup.run_dir, 0) == runs.FINISHED
    timer.join()


def test_a_node_that_was_stopped_waits_for_rank_0(
    setup: Setup, ranks: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torchrun ends with 1 after a signal even where its ranks have ended with 0."""
    on_two_nodes(setup, monkeypatch)
    monkeypatch.setenv("NODE_RANK", "1")
    ranks(LISTENER.replace('write("outcome', 'sys.exit(1) or write("outcome'))
    thread = send_when_listening(setup.run_dir, signal.SIGUSR1)
    timer = rank_0_says(setup, Outcome(runs.STOPPED, "stopped after step 3", 3), after=3.0)
    assert node.run(setup.run_dir, 0) == runs.STOPPED
    thread.join()
    timer.join()
    assert runs.first_failure(setup.run_dir, 0) is None


@pytest.mark.parametrize("how", ["it takes too long", "a signal"])
def test_a_node_does_not_wait_for_ever(
    setup: Setup,
    ranks: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    how: str,
) -> None:
    on_two_nodes(setup, monkeypatch)
    monkeypatch.setenv("NODE_RANK", "1")
    monkeypatch.setattr(node, "OUTCOME_SECONDS", 0.5 if how == "it takes too long" else 100)
    ranks("pass")
    if how == "a signal":
        threading.Timer(2.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert node.run(setup.run_dir, 0) == runs.STOPPED
    else:
        assert node.run(setup.run_dir, 0) == runs.FAILED
        assert "rank 0 on node 0 has not said how it went" in capfd.readouterr().err


def test_what_killed_a_rank_on_another_node_is_known_to_the_first(
    setup: Setup, ranks: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_two_nodes(setup, monkeypatch)
    monkeypatch.setattr(node, "WORDS_SECONDS", 1.0)
    ranks(failure(0, 1, LOST, 10.0) + "sys.exit(1)")
    other_node = threading.Timer(
        0.3, runs.write_failure, (setup.run_dir, 0, 3, Outcome(1, KILLED, -1)), {"killed": True}
    )
    monkeypatch.setenv("NODE_RANK", "0")
    other_node.start()
    assert node.run(setup.run_dir, 0) == runs.FAILED
    outcome = runs.read_outcome(setup.run_dir, 0)
    assert outcome is not None
    assert outcome.reason.startswith(f"{KILLED}\nrank 3 failed first")


@pytest.mark.parametrize(
    ("words", "rank", "reason"),
    [(VERDICT.format(code=-9), 3, KILLED), ("the port is taken\n", 2, "torchrun ended with 1")],
)
def test_a_node_whose_ranks_say_nothing_tells_the_others(
    setup: Setup,
    ranks: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    rank: int,
    reason: str,
) -> None:
    on_two_nodes(setup, monkeypatch)
    monkeypatch.setattr(node, "WORDS_SECONDS", 0.1)
    monkeypatch.setenv("NODE_RANK", "1")
    ranks(f"print({words!r}, end='', file=sys.stderr); sys.exit(1)")
    assert node.run(setup.run_dir, 0) == runs.FAILED
    told = runs.first_failure(setup.run_dir, 0)
    assert told is not None
    assert told[0] == rank
    assert told[1].reason.startswith(reason)


def test_only_the_first_node_records_the_outcome(
    setup: Setup, ranks: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_two_nodes(setup, monkeypatch)
    monkeypatch.setattr(node, "WORDS_SECONDS", 0.1)
    ranks(failure(5, 2, "no such file", 1.0) + "sys.exit(1)")
    for node_rank, outcome in (("1", None), ("0", Outcome(2, "no such file", -1))):
        monkeypatch.setenv("NODE_RANK", node_rank)
        assert node.run(setup.run_dir, 0) == runs.WRONG_INPUT
        assert runs.read_outcome(setup.run_dir, 0) == outcome
        assert (setup.run_dir / "logs" / "attempt-0" / f"torchrun-{node_rank}.log").exists()


@pytest.mark.parametrize(("checkpoints", "attempts"), [(False, 3), (True, 5)])
def test_a_crash_is_followed_by_restarts_until_they_are_in_vain(
    setup: Setup,
    ranks: Callable[[str], None],
    capfd: pytest.CaptureFixture[str],
    checkpoints: bool,
    attempts: int,
) -> None:
    """Two attempts before the last three bring a checkpoint each, or none does."""
    ranks(
        "number = int(attempt.name.rpartition('-')[2])\n"
        f"folder = attempt.parents[1] / 'checkpoints' / f'step-{{number:08d}}'\n"
        f"if {checkpoints} and number in (0, 2): folder.mkdir(parents=True)\n"
        "sys.exit(1)"
    )
    assert setup.launch("--restarts=2") == runs.FAILED
    assert len(runs.attempts(setup.run_dir)) == attempts
    assert "gave up after 2 restarts without progress" in capfd.readouterr().err


@pytest.mark.parametrize("works_on", [True, False], ids=["it works", "it was stopped"])
def test_what_another_launcher_took_over_is_not_started_again(
    setup: Setup,
    ranks: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    works_on: bool,
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 1.0)
    ranks(
        "first = attempt.name == 'attempt-0'\n"
        "(attempt / 'listening').touch()\n"
        "while first and not (attempt / 'taken').exists(): time.sleep(0.01)\n"
        "sys.exit(1)"
    )
    over, attempt_0 = threading.Event(), setup.run_dir / "logs" / "attempt-0"

    def take_over() -> None:
        while not (attempt_0 / "listening").exists():
            time.sleep(0.01)
        with lease.hold(setup.run_dir, runs.start_attempt(setup.run_dir)):
            if works_on:
                (attempt_0 / "taken").touch()
                over.wait(60)
        runs.write_outcome(setup.run_dir, 1, Outcome(runs.STOPPED, "stopped", 3))
        (attempt_0 / "taken").touch()

    other = threading.Thread(target=take_over, daemon=True)
    other.start()
    code = setup.launch("--restarts=1")
    held = lease.read(setup.run_dir)
    over.set()
    other.join()
    err = capfd.readouterr().err
    assert runs.read_outcome(setup.run_dir, 0), "the first one knows that it has failed"
    assert "starting again" not in err
    assert runs.attempts(setup.run_dir) == [0, 1]
    assert code == runs.FAILED
    assert "another launcher has taken over: no restart" in err
    if works_on:
        assert held
        assert held.attempt == 1, "its lease is left alone"


def test_ranks_get_their_threads(
    setup: Setup, ranks: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    ranks("print(os.environ['OMP_NUM_THREADS'], os.environ['TOKENIZERS_PARALLELISM'])")
    setup.launch("threads_per_worker=3")
    assert capfd.readouterr().out.endswith("\n3 false\n")


def test_a_ctrl_c_in_the_terminal_does_not_reach_the_ranks_by_itself(
    setup: Setup, ranks: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    ranks("print(os.getpgid(0) == os.getsid(0) == os.getpid())")
    setup.launch()
    assert capfd.readouterr().out.endswith("\nTrue\n")


# ---- the program of one node -----------------------------------------------------------------


def run_node(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["node", *map(str, arguments)])
    return node.main()


def test_node_claims_an_attempt_or_takes_the_one_it_is_given(
    setup: Setup, ranks: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup.launch("--prepare")
    ranks("write('outcome.json', code=0, reason='finished', step=5)")
    assert run_node(monkeypatch, setup.run_dir) == runs.FINISHED
    assert runs.attempts(setup.run_dir) == [0]
    (setup.run_dir / "logs" / "attempt-7").mkdir()
    assert run_node(monkeypatch, setup.run_dir, "--attempt=7") == runs.FINISHED
    assert runs.attempts(setup.run_dir) == [0, 7]
    assert run_node(monkeypatch, setup.run_dir, "--claim") == runs.FINISHED
    assert runs.attempts(setup.run_dir) == [0, 7, 8]


@pytest.mark.parametrize(
    ("attempt", "message"), [(0, "--attempt: 0 is over"), (5, "--attempt: 5 was not claimed")]
)
def test_node_runs_no_attempt_twice_and_none_that_nobody_claimed(
    setup: Setup,
    ranks: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    attempt: int,
    message: str,
) -> None:
    setup.launch("--prepare")
    ranks("write('outcome.json', code=0, reason='finished', step=5)")
    assert run_node(monkeypatch, setup.run_dir) == runs.FINISHED
    assert run_node(monkeypatch, setup.run_dir, f"--attempt={attempt}") == runs.WRONG_INPUT
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (None, "is no run folder, or not prepared by a launcher yet"),
        ("{", "is damaged: "),
        ('{"launcher": "local"}', "launch or prepare the run again"),
        (json.dumps(vars(launched(nodes=2))), "a run on 2 nodes needs --attempt, the same number"),
    ],
)
def test_node_refuses_what_it_cannot_run(
    setup: Setup,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    launch: str | None,
    message: str,
) -> None:
    setup.launch("--prepare")
    (setup.run_dir / "launch.json").unlink()
    if launch is not None:
        (setup.run_dir / "launch.json").write_text(launch)
    assert run_node(monkeypatch, setup.run_dir) == runs.WRONG_INPUT
    assert message in capsys.readouterr().err
    assert runs.attempts(setup.run_dir) == []


# ---- signals ---------------------------------------------------------------------------------

# Stands for torchrun and a rank beyond its start: ends when its node says why it should.
RANK = """
from dist_sft.process import start_of
hearts = Path(os.environ["DIST_SFT_HEARTBEATS"])
(hearts / "0").write_text(f"{os.getpid()} {start_of(os.getpid())} 1 3 forward")
(attempt / "listening").touch()
"""
LISTENER = f"""{RANK}
while not (told := (hearts / "stop").read_text().strip()):
    time.sleep(0.01)
time.sleep(0.3)
write("outcome.json", code=75, reason=told, step=3)
"""


def send_when_listening(run_dir: Path, *numbers: int) -> threading.Thread:
    """Send signals to this process as soon as the program in torchrun's place listens."""

    def wait_and_send() -> None:
        while not (run_dir / "logs" / "attempt-0" / "listening").exists():
            time.sleep(0.01)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.05)

    thread = threading.Thread(target=wait_and_send, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("numbers", "passed_on"),
    [
        ([signal.SIGINT], "SIGINT"),
        ([signal.SIGTERM], "SIGTERM"),
        ([signal.SIGUSR1], "SIGUSR1"),
        ([signal.SIGHUP], "SIGHUP"),
        ([signal.SIGINT, signal.SIGINT, signal.SIGTERM], "SIGINT"),
    ],
)
def test_the_first_signal_reaches_the_ranks_once(
    setup: Setup,
    ranks: Callable[[str], None],
    capfd: pytest.CaptureFixture[str],
    numbers: list[int],
    passed_on: str,
) -> None:
    ranks(LISTENER)
    before = [signal.getsignal(number) for number in Relay.HEARD]
    thread = send_when_listening(setup.run_dir, *numbers)
    assert setup.launch() == runs.STOPPED
    thread.join()
    again = "; once more to leave at once, without saving"
    hint = again if numbers[0] in (signal.SIGINT, signal.SIGTERM) else ""
    assert capfd.readouterr().err == (
        f"\n{signal.Signals(numbers[0]).name}: stopping as soon as what is done is saved{hint}\n"
        f"signal {passed_on}\nthe same command continues the run\n"
    )
    assert [signal.getsignal(number) for number in Relay.HEARD] == before


@pytest.mark.parametrize(
    ("numbers", "leaves"),
    [
        ([signal.SIGINT, signal.SIGINT], True),
        ([signal.SIGTERM, signal.SIGINT], True),
        ([signal.SIGUSR1, signal.SIGTERM], False),  # a batch system's warning, then its time limit
        ([signal.SIGUSR1, signal.SIGINT, signal.SIGINT], True),
        ([signal.SIGINT, signal.SIGUSR1, signal.SIGHUP], False),
    ],
)
def test_a_second_signal_does_not_wait_for_a_checkpoint(
    setup: Setup,
    ranks: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    numbers: list[int],
    leaves: bool,
) -> None:
    """What stands for torchrun heeds no signal; its rank has a session of its own, as a real one.

    The rank says something in its last moment that must not count.
    """
    monkeypatch.setattr(stopping, "ONE_SIGNAL_SECONDS", 0.01)
    ranks(
        RANK.replace("(attempt", "(hearts") + "import subprocess\n"
        "rank = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],\n"
        "                        start_new_session=True)\n"
        "(attempt / 'rank').write_text(str(rank.pid))\n"
        + failure(0, 1, LOST, 10.0)
        + f"(attempt / 'listening').touch(); time.sleep({60 if leaves else 3})\n"
        "rank.kill(); sys.exit(1)"
    )
    began = time.monotonic()
    send_when_listening(setup.run_dir, *numbers)
    assert (setup.launch() == runs.STOPPED) == leaves
    assert time.monotonic() - began < 30
    assert ("leaving at once\n" in capfd.readouterr().err) == leaves
    outcome = runs.read_outcome(setup.run_dir, 0)
    assert outcome is not None
    assert outcome.reason.startswith("left at once, at a second signal: nothing was") == leaves
    rank = int((setup.run_dir / "logs/attempt-0/rank").read_text())
    with contextlib.suppress(psutil.NoSuchProcess):  # or nobody has collected it yet
        assert psutil.Process(rank).status() == psutil.STATUS_ZOMBIE
    assert not (setup.run_dir / "lease.json").exists()


def test_a_signal_before_there_is_anything_to_save(
    setup: Setup, ranks: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    ranks("(attempt / 'listening').touch(); time.sleep(60)")
    send_when_listening(setup.run_dir, signal.SIGTERM)
    assert setup.launch() == runs.STOPPED
    reason = "stopped by signal SIGTERM before the workers had anything to save"
    assert capfd.readouterr().err.splitlines()[-2:] == [
        reason, "the same command continues the run",
    ]  # fmt: skip
    outcome = Outcome(runs.STOPPED, reason, -1, asked_by="signal SIGTERM")
    assert runs.read_outcome(setup.run_dir, 0) == outcome


def test_ctrl_c_while_a_launcher_watches_another_one(
    setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    setup.launch("--prepare")
    owner = replace(Owner.me(), host="another-host", here="another boot")
    (setup.run_dir / "lease.json").write_text(json.dumps(asdict(Lease(owner, 0, 0))))
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert setup.launch() == runs.STOPPED
    assert capsys.readouterr().err == "\nstopped while no worker was running\n"
    assert runs.attempts(setup.run_dir) == []


def test_a_signal_before_torchrun_starts_is_not_lost(tmp_path: Path) -> None:
    with Relay() as relay:
        signal.raise_signal(signal.SIGUSR1)
        relay.attach(tmp_path)
        signal.raise_signal(signal.SIGTERM)
    assert (tmp_path / stopping.REASON).read_text().strip() == "signal SIGUSR1", (
        "the first one counts"
    )


def test_a_scheduler_may_say_term_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "ONE_SIGNAL_SECONDS", 0.0)
    for environment, leaves in (({"SLURM_JOB_ID": "7"}, False), ({}, True)):
        with Relay(environment) as relay:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.01)
            signal.raise_signal(signal.SIGTERM)
            assert relay.leaves == leaves


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Relay() as relay:
            signal.raise_signal(signal.SIGHUP)
            assert relay.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_rank_remembers_why_it_should_stop(tmp_path: Path) -> None:
    flag = StopFlag(tmp_path / "STOP", {"DIST_SFT_HEARTBEATS": str(tmp_path)})
    before = {n: signal.getsignal(n) for n in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)}
    (tmp_path / stopping.REASON).write_bytes(stopping.BLANK)
    try:
        flag.listen()
        assert flag.reason is None
        (tmp_path / "STOP").touch()
        assert flag.reason == "STOP file"
        (tmp_path / stopping.REASON).write_text("signal SIGHUP".ljust(16))
        assert flag.reason == "signal SIGHUP", "what its node got"
        for number in before:
            signal.raise_signal(number)
            assert flag.reason == f"signal {number.name}"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- what a person sees ----------------------------------------------------------------------

SPEAKER = """
import sys
from pathlib import Path
from dist_sft.console import Console, redirect_output
console = Console(redirect_output(Path(sys.argv[1])))
console.say("hello")
console.start(2, 0)
sys.stdin.readline()
console.step(1, "loss [1.0]", important=True)
console.step(2, "loss [1.0]", important=True)
console.say("done [/]")
console.close()
print("whole")
print("a library's warning", file=sys.stderr)
"""
LINES = "step 1/2  loss [1.0]\nstep 2/2  loss [1.0]\ndone [/]\n"
LOG = f"hello\n{LINES}whole\na library's warning\n"


def speak(log: Path, **pipes: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SPEAKER, str(log)], stdin=subprocess.PIPE, text=True, **pipes
    )


def test_terminal_and_log_get_the_same_lines(tmp_path: Path) -> None:
    log = tmp_path / "rank-0.log"
    with speak(log, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as speaker:
        assert speaker.communicate("go\n") == (f"hello\n{LINES}", "")
    assert log.read_text() == LOG


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_a_run_outlives_whoever_watches_it(kind: str, tmp_path: Path) -> None:
    """`launch | head` ends, a window is closed: training goes on, with or without a bar."""
    log = tmp_path / "rank-0.log"
    ours, theirs = os.pipe() if kind == "pipe" else os.openpty()
    with speak(log, stdout=theirs) as speaker:
        os.close(theirs)
        seen = b""
        while (b"training" if kind == "terminal" else b"hello") not in seen:
            seen += os.read(ours, 1024)
        os.close(ours)
        speaker.communicate("go\n")
    assert speaker.returncode == 0
    assert log.read_text().startswith(LOG)


def test_a_line_says_how_long_the_rest_will_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(None)
    console.start(100, done=40)
    for step, now in ((41, 1000.0), (42, 1001.0), (43, 1010.0), (100, 1100.0)):
        monkeypatch.setattr(time, "monotonic", lambda now=now: now)
        console.step(step, "x", important=step == 100)
    assert capsys.readouterr().out.splitlines() == [
        "step 41/100  x",  # the first step warms up and foretells nothing
        "step 43/100  x  ETA 0:04:45",
        "step 100/100  x",
    ]
