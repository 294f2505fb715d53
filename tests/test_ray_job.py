"""What the Ray launcher makes of its arguments, and what a worker makes of how a rank ended."""

import contextlib
import itertools
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import threading
import tomllib
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from launching import ROOT, read

pytest.importorskip("ray")

from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

from dist_sft import (
    lease,
    node,
    process,
    ray_cluster,
    ray_controller,
    ray_driver,
    ray_job,
    ray_submit,
    ray_worker,
    roll_call,
    runs,
)
from dist_sft.config import Recipe, read_recipe
from dist_sft.errors import UserError
from dist_sft.ray_controller import GaveUp, Run
from dist_sft.ray_node import ray_command
from dist_sft.ray_wish import ask_to_stop, read_stop
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
        "resize_every": 60,
        "restarts": 3,
        "wait": 45,
    }
    told = asked(capsys, "--min-workers=2", "--max-workers=8")
    assert told["num_workers"] == [2, 8]


@pytest.mark.parametrize(
    ("address", "gpus", "resources"),
    [
        (None, 0, {"CPU": 1.0}),
        (None, 2, {"CPU": 1.0, "GPU": 1.0}),
        ("auto", 2, {"CPU": 1.0, "GPU": "1 where the cluster has any"}),
        ("http://h:1", 2, {"CPU": 1.0, "GPU": "1 where the cluster has any"}),
    ],
)
def test_a_dry_run_says_what_it_knows(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    address: str | None,
    gpus: int,
    resources: dict[str, Any],
) -> None:
    """Whether a cluster elsewhere has GPUs, and its Python, it does not."""
    monkeypatch.setattr(node, "count_gpus", lambda: gpus)
    words = [f"--address={address}"] if address else []
    assert ray_job.main(["train", "recipe.yaml", "--dry-run", "--workers=2", *words]) == 0
    text = capsys.readouterr().out
    command = text.partition("# command of each worker's rank\n")[2]
    assert ("dist_sft.train" in command) == (address != "http://h:1")
    if address is None:
        assert ("MALLOC_" in command) == (gpus == 0)
    asked = json.loads(text.partition("# Ray\n")[2].partition("# command")[0])
    assert asked["resources_per_worker"] == resources


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("cancel", "gone"), "gone is not there; a run that is on a cluster elsewhere needs"),
        (("resume", "gone"), "--address http://HOST:PORT, of the cluster's dashboard"),
        (("cancel", ".", "--address=auto"), "--address: got auto; allowed: http://HOST:PORT"),
        (("cancel", ".", "--address=h:1"), "none on a machine that sees it"),
    ],
)
def test_which_run_is_meant(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], told: str
) -> None:
    assert ray_job.main(words) == runs.WRONG_INPUT
    assert told in capsys.readouterr().err


def test_what_is_built_on_is_not_the_shells_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would hide one rank's error behind another's."""
    monkeypatch.setattr(os, "environ", os.environ | {"RAY_DEDUP_LOGS": "1"})
    with ray_cluster._ray():
        assert os.environ["RAY_DEDUP_LOGS"] == "0"


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
        (
            ("--address=http://127.0.0.1:1", "--prepare"),
            "then: launch/ray_job.py resume runs/my run --address http://127.0.0.1:1",
        ),
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
    program.write_text('#!/bin/sh\n[ "$1" = -c ] || { pwd; printf "%s\\n" "$@"; }\n')
    program.chmod(0o755)
    done = run_line(line, program)
    assert done.stdout.splitlines() == [
        str(folder),
        *("-m", "dist_sft.ray_job", "train", f"{here}/recipe.yaml", "model.tokenizer=a b"),
        *("--workers=2", "--restarts=3", "--wait=45", "--resize-every=60", "--address=auto"),
    ]
    program.write_text("#!/bin/sh\nexit 1\n")
    done = run_line(line, program)
    assert done.returncode == runs.WRONG_INPUT
    assert f"the head of the cluster: {program} cannot import dist_sft" in done.stdout
    assert "DIST_SFT_PYTHON, under env_vars" in done.stdout
    assert "cannot import" in run_line(line, tmp_path / "not there").stdout
    folder.rmdir()
    done = run_line(line, program)
    assert done.returncode == runs.WRONG_INPUT
    assert "--folder: the job's folder must be there" in done.stdout


def test_what_a_recipe_says_is_of_the_cluster(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run folder of the same name here means nothing; a sharding file here goes with the job."""
    (here / "runs/my run").mkdir(parents=True)
    (here / "runs/my run/file").touch()
    assert "my run" in refused(capsys, "--dry-run")
    (here / "my zero.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    words = ("--address=http://head:8265", "--folder=/on/cluster")
    line = asked(capsys, *words, "deepspeed=my zero.json")["entrypoint"]
    (told,) = [word for word in shlex.split(line) if word.startswith("deepspeed={")]
    (here / "my zero.json").unlink()
    resolved = read_recipe("recipe.yaml", ["deepspeed=my zero.json", told])
    assert isinstance(resolved, Recipe)
    assert resolved.deepspeed is not None
    assert resolved.deepspeed.zero_optimization.stage == 3
    assert "deepspeed={" not in asked(capsys, *words, "deepspeed=zero2")["entrypoint"]


def run_line(line: str, python: Path) -> subprocess.CompletedProcess[str]:
    environment = {"DIST_SFT_PYTHON": str(python), "PATH": os.environ["PATH"]}
    return subprocess.run(["sh", "-c", line], text=True, capture_output=True, env=environment)


def test_a_run_folder_on_the_cluster(here: Path) -> None:
    """A path means the same to who submits, cancels and resumes."""
    assert ray_submit.on_cluster("runs/../runs/x", "/shared/me") == "/shared/me/runs/x"
    assert ray_submit.on_cluster("x", None) == f"{here}/x"
    assert ray_submit.on_cluster(Path("/shared/x"), "/elsewhere") == "/shared/x"


class Job:
    """A job that ends after so many looks, and a log that breaks off."""

    def __init__(self, looks: int, error: Exception | None = None) -> None:
        self.looks, self.error = looks, error

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        yield "step 1\n"
        if self.error is not None:
            raise self.error

    def get_job_info(self, _: str) -> Any:
        self.looks -= 1
        ended = SimpleNamespace(value="SUCCEEDED" if self.looks < 0 else "RUNNING")
        return SimpleNamespace(status=ended, driver_exit_code=0, message="")

    def get_job_status(self, job: str) -> Any:
        return self.get_job_info(job).status


def test_a_log_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_submit, "POLL_SECONDS", 0)
    assert ray_submit.follow(Job(2), "job") == runs.FINISHED
    assert ray_submit.follow(Job(0, RuntimeError("closed")), "job") == runs.FINISHED
    with pytest.raises(RuntimeError, match="closed"):
        ray_submit.follow(Job(2, RuntimeError("closed")), "job")


def test_a_job_goes_on_without_its_client(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextlib.contextmanager
    def client(_: str) -> Iterator[Any]:
        job = Job(2, ConnectionResetError("reset"))
        job.submit_job = lambda **_: "job"
        yield job

    monkeypatch.setattr(ray_submit, "client", client)
    monkeypatch.setattr(ray_cluster, "is_guarded", lambda _: True)
    assert ray_submit.submit("http://h:1", "line", "/run", {}) == runs.FAILED
    told = capsys.readouterr().err
    assert "http://h:1 does not answer any more (reset): the job goes on" in told
    assert "launch/ray_job.py cancel /run --address http://h:1" in told


def test_a_client_needs_no_more_than_is_documented() -> None:
    """Ray brings what Ray needs; of what dist_sft needs, only what docs/ray.md names is there."""
    documented = re.search(r"beside it `'ray\[default\]' (.*?)`", read(ROOT / "docs/ray.md"))
    assert documented
    needed = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["dependencies"]
    names = {re.split(r"[>=<\[]", one)[0] for one in needed} - set(documented[1].split())
    assert "torch" in names
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({sorted(names)})); "
        "from dist_sft.ray_job import main; sys.exit(main())"
    )
    words = ("train", "recipe.yaml", "--address=http://127.0.0.1:1")
    done = subprocess.run(
        [sys.executable, "-c", program, *words], text=True, capture_output=True, timeout=60
    )
    assert done.returncode == runs.WRONG_INPUT
    assert "--address: http://127.0.0.1:1: Failed to connect to Ray" in done.stderr


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


@pytest.mark.parametrize(
    ("setting", "per_worker", "threads"),
    [
        ("auto", {"CPU": 8.0}, 1),
        ("auto", {"CPU": 8.0, "GPU": 1.0}, 8),
        ("auto", {"CPU": 0.5, "GPU": 1.0}, 1),
        (3, {"CPU": 8.0, "GPU": 1.0}, 3),
    ],
)
def test_threads_are_what_ray_reserves(
    setting: int | str, per_worker: dict[str, float], threads: int
) -> None:
    assert ray_cluster.threads_for(setting, per_worker) == threads


def test_nodes_may_have_different_numbers_of_workers(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ray places them: 2 GPUs of one node, 1 of another one."""
    assert ray_job.main(["train", "recipe.yaml", "--prepare"]) == 0
    (run_dir / "config.json").write_text(Path("runs/my run/config.json").read_text())
    monkeypatch.setattr(node, "count_gpus", lambda: 2)
    work = ray_worker.Work(str(run_dir), str(run_dir), gpus=True, threads=4)
    found = []
    for rank, workers in ((0, 2), (1, 1)):
        context = SimpleNamespace(
            get_node_rank=lambda rank=rank: rank,
            get_local_world_size=lambda workers=workers: workers,
            get_local_rank=lambda: 0,
        )
        monkeypatch.setattr(
            ray_controller.ray.train, "get_context", lambda context=context: context
        )
        found.append(ray_controller.look(work, 0))
    assert roll_call.compare(found)[0] == []
    assert found[0].alike["threads per worker"] == "4"


def test_what_there_is_is_told() -> None:
    nodes = [("a", {"CPU": 2.0, "memory": 5.0, "node:1.2.3.4": 1.0}), ("b", {"GPU": 1.0})]
    told = str(ray_cluster.too_small(3, {"CPU": 1.0}, nodes))
    assert told.startswith(
        "--workers: got 3, each with CPU 1; the cluster has room for 2 (a: CPU 2; b: GPU 1)."
    )


def test_a_cluster_for_one_run_is_closed_to_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray opens its own folder to all users: neither that nor the token is within their reach."""
    told: dict[str, Any] = {}

    def init(**options: Any) -> Any:
        told.update(options, token=Path(os.environ["RAY_AUTH_TOKEN_PATH"]))
        Path(options["_temp_dir"]).mkdir()
        Path(options["_temp_dir"]).chmod(0o777)
        return SimpleNamespace(dashboard_url="127.0.0.1:8265")

    monkeypatch.setattr(
        ray_cluster, "_ray", lambda: contextlib.nullcontext(SimpleNamespace(init=init))
    )
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with ray_cluster.started(2, {"CPU": 1.0}):
        folder = told["token"].parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(told["token"].stat().st_mode) == 0o600
        assert Path(told["_temp_dir"]).parent == folder
        assert len(told["token"].read_text()) == 64
    assert not folder.exists()
    assert told["dashboard_host"] == "127.0.0.1"
    out = capsys.readouterr().out
    assert f"http://127.0.0.1:8265, asks for the token in {told['token']}" in out


@pytest.mark.parametrize("mode", ["token", "disabled"])
@pytest.mark.parametrize("own", ["token", "disabled"])
def test_an_open_cluster_is_warned_of(
    mode: str, own: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cluster is asked: what this shell has set says nothing about it."""
    monkeypatch.setenv("RAY_AUTH_MODE", own)

    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/api/authentication_mode"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"authentication_mode": mode}).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Dashboard) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        ray_cluster.warn(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
        thread.join()
    told = capsys.readouterr().err
    assert ("no token authentication" in told) == (mode == "disabled")
    assert ("RAY_AUTH_MODE=token" in told) == (mode == "disabled")


@pytest.mark.parametrize("mode", ["token", "disabled", None])
@pytest.mark.parametrize("dashboard", ["127.0.0.1:1", ""])
def test_a_cluster_that_lets_anybody_in_is_open(
    mode: str | None,
    dashboard: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its dashboard answers on the head alone, or there is none."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    context = SimpleNamespace(dashboard_url=dashboard)
    ray = SimpleNamespace(init=lambda **_: context)
    monkeypatch.setattr(ray_cluster, "_ray", lambda: contextlib.nullcontext(ray))
    with ray_cluster.joined("auto"):
        told = capsys.readouterr().err
    assert ("no token authentication" in told) == (mode != "token")


def test_a_dashboard_for_all_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_cluster, "is_guarded", lambda _: False)
    ray_cluster.warn("http://10.0.0.1:8265")
    ray_cluster.warn("http://127.0.0.1:8265")
    assert capsys.readouterr().err.count("Its dashboard listens on") == 1


def test_the_head_of_a_slurm_job() -> None:
    head = ray_command(0, 4, "10.0.0.1", "n1", 20007, Path("/tmp/ray-7-0"))
    assert "--head" in head
    assert "--dashboard-host=127.0.0.1" in head
    assert "--ray-client-server-port=10007" in head
    assert "--address=n1:20007" in ray_command(1, 4, "10.0.0.2", "n1", 20007, Path("/tmp/x"))


def test_a_rank_that_is_started_again(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same Ray worker: what the first one said stays, and no file stays open."""
    program = ["sh", "-c", "echo $RANK has words >&2"]
    monkeypatch.setattr(node, "rank_command", lambda *_: program)
    work, recipe = ray_worker.Work(str(run_dir), "/", False), read_recipe("recipe.yaml")
    before = os.listdir("/proc/self/fd")
    for _ in range(2):
        with ray_worker.started(work, recipe, 0, {"RANK": 1}, 1, 0) as (child, _, told):
            child.wait()
        told.tell("too late")
    assert os.listdir("/proc/self/fd") == before
    assert read(ray_worker.log_of(run_dir, 0, 1)) == "1 has words\n" * 2


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


@pytest.mark.parametrize("code", [runs.FINISHED, runs.STOPPED])
def test_a_rank_that_moves_leaves_rank_0_its_last_word(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A run that has finished does not go on."""
    outcome = Outcome(code, "exported, or saved", 3)
    monkeypatch.setattr(ray_worker.time, "sleep", lambda _: runs.write_outcome(run_dir, 0, outcome))
    expected = contextlib.nullcontext()
    if code == runs.STOPPED:
        expected = pytest.raises(ray_worker.Moved)  # type: ignore[assignment]
    with expected:
        judge(run_dir, 0, ray_worker.DRAIN, rank=1)
    assert runs.read_outcome(run_dir, 0) == outcome


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


@pytest.mark.parametrize("is_there", [True, False])
def test_a_rank_ends_whose_worker_died_before_it_looked(is_there: bool) -> None:
    """It imports for seconds, and belongs to init by then."""
    parent = os.getpid() if is_there else os.getppid()
    program = "from dist_sft import process; process.die_with_parent(); print('lives')"
    environment = os.environ | {process.PARENT: str(parent)}
    done = subprocess.run(
        [sys.executable, "-c", program], text=True, capture_output=True, env=environment
    )
    assert (done.returncode, done.stdout) == ((0, "lives\n") if is_there else (1, ""))


@pytest.fixture
def run(run_dir: Path) -> Iterator[Run]:
    """Own a run whose first attempt has begun."""
    (run_dir / "logs/attempt-0").rmdir()
    run = Run(run_dir, restarts=1, seen=None)
    run.begin()
    yield run
    run.release()


def owner_of(run: Run) -> int | None:
    held = lease.read(run.run_dir)
    return None if held is None else held.attempt


def test_restarts_without_progress_are_bounded(run: Run) -> None:
    """The run is owned between attempts, too, until there will be no other."""
    died = {1: RuntimeError("the actor died")}
    run.judge(died)
    run.judge(died)  # Ray tells more than once
    run.end()
    assert owner_of(run) == 0
    (run.run_dir / "checkpoints/step-00000004").mkdir(parents=True)
    assert run.begin() == 1
    run.judge(died)
    run.end()
    assert run.begin() == owner_of(run) == 2
    with pytest.raises(GaveUp, match="the actor died"):
        run.judge(died)
    run.end()
    assert owner_of(run) is None
    outcome = runs.read_outcome(run.run_dir, 2)
    assert outcome is not None
    assert "its Ray worker failed: the actor died\nrank 1 failed first" in outcome.reason


@pytest.mark.parametrize("code", [runs.WRONG_INPUT, runs.STOPPED])
def test_what_is_not_tried_again(run: Run, code: int) -> None:
    runs.write_outcome(run.run_dir, 0, Outcome(code, "because", 2))
    with pytest.raises(GaveUp, match="because"):
        run.judge({1: RuntimeError("the actor died")})
    run.end()
    assert owner_of(run) is None


def test_ranks_that_have_moved_go_on(run: Run) -> None:
    runs.write_outcome(run.run_dir, 0, Outcome(runs.STOPPED, "stopped", 3, asked_by="another rank"))
    run.judge({0: ray_worker.Moved("x"), 1: RuntimeError("node died")})
    run.end()
    assert owner_of(run) == 0


@pytest.mark.parametrize("why", ray_worker.GOES_ON)
def test_a_drained_node_that_died_first_goes_on(run: Run, why: str) -> None:
    runs.write_outcome(run.run_dir, 0, Outcome(runs.STOPPED, "stopped", 3, asked_by=why))
    if why == ray_worker.DRAIN:
        run.judge({1: RuntimeError("node died")})
    run.end()
    assert owner_of(run) == 0


def test_a_run_that_another_launcher_took_over_ends(run: Run) -> None:
    (run.run_dir / "logs/attempt-1").mkdir()
    with pytest.raises(GaveUp, match="another launcher has taken over"):
        run.judge({1: RuntimeError("the actor died")})


@pytest.fixture
def told(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> ray_controller.RunConfig:
    """Be Ray's controller of a run that has not begun."""
    (run_dir / "logs/attempt-0").rmdir()
    monkeypatch.setattr(ray_controller, "HERE", [])
    work = ray_worker.Work(str(run_dir), "/", False)
    return ray_controller.RunConfig(work, 1, None)


def fail_to_start(told: ray_controller.RunConfig, error: Exception) -> None:
    """Do as Ray does where a worker dies before it trains."""
    failure = WorkerGroupStartupFailedError("failed to initialize")
    failure.__cause__ = error
    state = SimpleNamespace(training_failed_error=SimpleNamespace(controller_failure=failure))
    ray_controller.Starts(told).after_controller_state_update(None, state)
    for _ in range(3):  # Ray looks again, and waits for nodes
        ray_controller.Starts(told).after_controller_state_update(state, state)


@pytest.mark.parametrize("is_placed", [True, False])
def test_a_worker_that_is_lost_before_its_rank_begins(
    run_dir: Path, told: ray_controller.RunConfig, is_placed: bool
) -> None:
    """Ray starts others for ever; they get another attempt, but not more.

    Of a worker that died sooner the backend does not even hear.
    """

    class Workers:
        started = True

        def execute(self, *_: object) -> list[object]:
            raise RayActorError

        def _clear_state(self) -> None:
            self.started = False

    def start() -> None:
        if is_placed:
            workers = Workers()
            with pytest.raises(RayActorError):
                ray_controller.RunBackend().on_start(workers, told)
            assert not workers.started, "or Ray would keep their place"
        fail_to_start(told, RayActorError())

    start()
    (run,) = ray_controller.HERE
    assert owner_of(run) == 0
    with pytest.raises(GaveUp, match="a worker was lost before its rank began: The actor"):
        start()
    assert runs.attempts(run_dir) == [0, 1]
    assert owner_of(run) is None


class Group:
    """Ray's workers: at each look those that have failed, until all have ended."""

    def __init__(self, looks: list[dict[int, Exception]]) -> None:
        self.looks = looks

    def _poll_workers_and_collect_errors(self, timeout: float) -> list[Any]:
        errors = self.looks.pop(0) if self.looks else {}
        return [
            SimpleNamespace(running=bool(self.looks), error=errors.get(rank)) for rank in range(2)
        ]


@pytest.fixture
def resized(told: ray_controller.RunConfig, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Own a run of which Ray wants another number of workers."""
    monkeypatch.setattr(ray_controller, "LOOK_SECONDS", 0)
    monkeypatch.setattr(ray_controller, "SEES_SECONDS", 0.5)
    run = ray_controller.here(told)
    run.begin()
    return run


def test_a_worker_that_dies_while_ranks_save_is_seen(
    run_dir: Path, told: ray_controller.RunConfig, resized: Run
) -> None:
    group = Group([{}, {1: RuntimeError("the node died")}, {}])
    ray_controller.RunBackend().on_shutdown(group, told)
    assert read_stop(run_dir, 0) == ray_worker.RESIZE
    outcome = runs.read_outcome(run_dir, 0)
    assert outcome is not None
    assert "its Ray worker failed: the node died" in outcome.reason
    assert owner_of(resized) == 0, "it goes on"
    resized.release()


def test_workers_that_end_without_a_word_have_failed(
    run_dir: Path, told: ray_controller.RunConfig, resized: Run
) -> None:
    ray_controller.RunBackend().on_shutdown(Group([{}, {}]), told)
    outcome = runs.read_outcome(run_dir, 0)
    assert outcome is not None
    assert outcome.code == runs.FAILED
    assert "the workers have ended without a word" in outcome.reason
    resized.release()


def test_a_word_that_a_shared_folder_shows_late_is_awaited(
    run_dir: Path, told: ray_controller.RunConfig, resized: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All others have moved on; rank 0 has finished the run."""
    finished = Outcome(runs.FINISHED, "finished", 9)
    monkeypatch.setattr(ray_controller, "SEES_SECONDS", 20.0)
    timer = threading.Timer(0.5, runs.write_outcome, (run_dir, 0, finished))
    timer.start()
    moved: dict[int, Exception] = {1: ray_worker.Moved("x")}
    ray_controller.RunBackend().on_shutdown(Group([moved, moved, moved]), told)
    timer.join()
    assert runs.read_outcome(run_dir, 0) == finished
    resized.release()


def test_workers_tidy_up_before_ray_kills_them(
    run_dir: Path, told: ray_controller.RunConfig, resized: Run
) -> None:
    saved = Outcome(runs.STOPPED, "saved", 3, asked_by=ray_worker.RESIZE)
    runs.write_outcome(run_dir, 0, saved)
    group = Group([{}, {0: ray_worker.Moved("x")}, {1: ray_worker.Moved("x")}])
    ray_controller.RunBackend().on_shutdown(group, told)
    assert not group.looks
    assert runs.read_outcome(run_dir, 0) == saved
    assert owner_of(resized) == 0, "it goes on"
    resized.release()


def test_a_changed_number_of_workers_is_recorded(run_dir: Path) -> None:
    """Between launches, too, each of which writes launch.json anew."""
    launch = runs.Launch("ray", 1, 2, {}, "x")
    fake = SimpleNamespace(get_job_id=lambda: "1")
    changes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_controller.ray, "get_runtime_context", lambda: fake)
        patch.setattr(runs, "record_change", lambda *change: changes.append(change[1:]))
        for attempt, hosts in ((0, ["a", "b"]), (2, ["a"]), (3, ["b"])):
            runs.attempt_dir(run_dir, attempt).mkdir(exist_ok=True)
            runs.write_launch(run_dir, launch)
            ray_controller.record(run_dir, attempt, hosts)
    assert changes == [(2, {"workers": "2 -> 1"})]
    assert runs.read_launch(run_dir).options["placed"] == 1


class Engine(threading.Thread):
    """Ray at work, until it has been looked at so often."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def join(self, timeout: float | None = None) -> None:
        self.looks -= 1

    def is_alive(self) -> bool:
        return self.looks > 0


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Be a cluster that has room for the workers, or not, at each look; a look takes a second."""
    found: list[bool] = []
    clock = itertools.count()
    monkeypatch.setattr(ray_driver.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(ray_cluster, "free_room", lambda _: int(found.pop(0)))
    monkeypatch.setattr(ray_cluster, "too_busy", lambda *_: UserError("too busy"))
    return found


def follow(run_dir: Path, looks: int, relay: Any = None, began: int = -1) -> Outcome | None:
    options = {"workers": [1, 2], "resources_per_worker": {"CPU": 1.0}, "wait": 3}
    launch = runs.Launch("ray", 1, 2, options, "x")
    asked = relay or SimpleNamespace(received=None, leaves=False)
    return ray_driver.follow(Engine(looks), asked, run_dir, launch, began)  # type: ignore[arg-type]


def test_no_room_to_begin_is_an_error(run_dir: Path, place: list[bool]) -> None:
    place += [False, True, True, False, False, False, False]
    with pytest.raises(UserError, match="too busy"):
        follow(run_dir, 99, began=0)
    assert not place


def test_no_room_to_go_on_is_waited_for(
    run_dir: Path, place: list[bool], capsys: pytest.CaptureFixture[str]
) -> None:
    runs.write_outcome(run_dir, 0, Outcome(runs.FAILED, "died", 3))
    place += [False] * 9
    assert follow(run_dir, 9) is None
    assert capsys.readouterr().err.count("waiting to go on: too busy") == 2


@pytest.mark.parametrize("by", ["STOP", "TERM"])
@pytest.mark.parametrize(("began", "looks"), [(0, 1), (-1, 17)])
def test_a_stop_while_nobody_runs(
    run_dir: Path, place: list[bool], by: str, began: int, looks: int
) -> None:
    """Before the first attempt at once; after one Ray may be about to end, or to go on."""
    runs.write_outcome(run_dir, 0, Outcome(runs.FAILED, "died", 3))
    relay = SimpleNamespace(received=signal.SIGTERM if by == "TERM" else None, leaves=False)
    if by == "STOP":
        (run_dir / "STOP").touch()
    place += [True] * looks  # also where workers are about to start
    assert follow(run_dir, 99, relay, began) == ray_driver.NOBODY_RAN
    assert len(place) <= 2


@pytest.mark.parametrize(("grows", "stops"), [(True, False), (False, True), (False, False)])
def test_a_cluster_is_asked_to_grow(
    grows: bool, stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For as long as a launcher waits."""
    nodes = [("a", {"CPU": 1.0})]
    wishes: list[str] = []

    def wish(bundles: list[dict[str, float]]) -> str:
        assert bundles == [{"CPU": 1.0}] * 2
        wishes.append("wish")
        nodes.extend([("b", {"CPU": 1.0})] * grows)
        return "wish"

    monkeypatch.setattr(ray_cluster, "nodes", lambda _: nodes)
    monkeypatch.setattr("ray.util.placement_group", wish)
    monkeypatch.setattr("ray.util.remove_placement_group", wishes.remove)
    monkeypatch.setattr(ray_cluster, "LOOK_SECONDS", 0)
    per_worker = {"CPU": 1.0, "GPU": 0.0}
    if grows or stops:
        assert ray_cluster.wait_for_room(2, per_worker, 9, lambda: stops) == grows
    else:
        with pytest.raises(UserError, match="got 2, each with CPU 1, GPU 0; the cluster has room"):
            ray_cluster.wait_for_room(2, per_worker, 0.1, lambda: False)
    assert not wishes


def test_room_is_what_others_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what workers of this run have, while their nodes live."""
    left = {"a": {"CPU": 0.5, "GPU": 1.0}, "b": {"CPU": 1.0}}
    monkeypatch.setattr("ray._private.state.available_resources_per_node", lambda: left)
    bundles = {0: {"CPU": 0.5}, 1: {"CPU": 0.5}, 2: {"CPU": 0.5}}
    where = {0: "a", 1: "dead", 2: ""}
    groups = [
        {"state": "RESCHEDULING", "bundles": bundles, "bundles_to_node_id": where},
        {"state": "REMOVED", "bundles": bundles, "bundles_to_node_id": {0: "a", 1: "a", 2: "a"}},
    ]
    monkeypatch.setattr(ray_cluster, "own_groups", lambda: groups)
    assert ray_cluster.free_room({"CPU": 0.5}) == 4


class Jobs(Job):
    """A cluster with a job, whose launcher cannot be asked to stop."""

    def __init__(self) -> None:
        super().__init__(looks=99)
        self.stopped: list[str] = []

    def list_jobs(self) -> list[Any]:
        one = SimpleNamespace(submission_id="mine", status=SimpleNamespace(value="PENDING"))
        one.metadata = {"run_dir": "/run"}
        return [one]

    def submit_job(self, **_: Any) -> str:
        return "asking"

    def get_job_info(self, job: str) -> Any:
        ended = SimpleNamespace(value="FAILED" if job == "asking" else "PENDING")
        return SimpleNamespace(status=ended, driver_exit_code=2, message="", runtime_env={})

    def stop_job(self, job: str) -> None:
        self.stopped.append(job)


def test_a_job_that_could_not_be_asked_is_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs()
    monkeypatch.setattr(ray_submit, "client", lambda _: contextlib.nullcontext(jobs))
    with pytest.raises(UserError, match="job mine has not been asked to stop"):
        ray_submit.cancel("http://h:1", "/run")
    assert not jobs.stopped


def test_the_first_wish_to_stop_counts(run_dir: Path) -> None:
    assert read_stop(run_dir, 0) is None
    ask_to_stop(run_dir, 0, "signal SIGINT")
    ask_to_stop(run_dir, 0, ray_worker.RESIZE)
    assert read_stop(run_dir, 0) == "signal SIGINT"


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
