"""What the launcher makes of how workers of a generation run end on Ray."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

import ray

from dist_sft import node, parts, ray_controller, ray_generate, ray_worker, roll_call, runs
from dist_sft.config import read_recipe
from dist_sft.parts import Plan
from dist_sft.runs import Launch, Outcome

OPTIONS = {
    "workers": [1, 2],
    "resources_per_worker": {"CPU": 1.0, "special": 2.0},
    "restarts": 1,
    "folder": "/",
    "wait": 0,
}


class Workers(ray_generate.Workers):
    """Without Ray: a reference is what it stands for, or the error."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir, Launch("ray", 1, 2, OPTIONS, "x"), 0)
        job = SimpleNamespace(get_job_id=lambda: "01000000")
        self._ray = SimpleNamespace(
            get=self._get,
            exceptions=ray.exceptions,
            wait=self._wait,
            get_runtime_context=lambda: job,
        )
        self.script: list[tuple[int, Any]] = []
        """What ends, in this order: a rank, and its end."""
        self.starts: list[int] = []
        self.room = 100
        """How many of these begin."""
        self.versions = {1: "2.13"}
        """Of torch, where a rank has another one."""
        self._task = SimpleNamespace(remote=self._remote)
        (self._folder / "data-0.json").touch()

    def _remote(self, _run_dir: str, _attempt: int, rank: int, *_: Any) -> str:
        self.starts.append(rank)
        if len(self.starts) <= self.room:
            told = roll_call.Node(rank, f"n{rank}", {"torch": self.versions.get(rank, "2.13")})
            roll_call.write(self._folder, told)
        return f"task {len(self.starts)}"

    def _get(self, ref: str) -> Any:
        _, end = self.script.pop(0)
        if isinstance(end, Exception):
            raise end
        return end

    def _wait(self, refs: list[str], **_: Any) -> tuple[list[str], list[str]]:
        if not self.script:
            return [], refs
        (ended,) = [ref for ref in refs if self._ranks[ref] == self.script[0][0]]
        return [ended], [ref for ref in refs if ref != ended]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    runs.attempt_dir(tmp_path, 0).mkdir(parents=True)
    (tmp_path / "parts").mkdir()
    parts.write_plan(tmp_path, Plan(8, 1, 1, {}))
    return tmp_path


class Nobody:
    """Asks for nothing."""

    received: Any = None
    leaves = False


def follow(workers: Workers, *script: tuple[int, Any], relay: Any = None) -> Outcome:
    workers.script = list(script)
    return workers.follow(relay or Nobody(), threading.Event())


DIED = ray.exceptions.WorkerCrashedError()


def test_a_worker_is_started_again_while_there_are_new_parts(run_dir: Path) -> None:
    workers = Workers(run_dir)
    done = iter(range(8))

    def finish_a_part(*_: object, **__: object) -> Any:
        (run_dir / f"parts/part-{next(done):05d}").mkdir()
        return wait(*_, **__)

    wait, workers._ray.wait = workers._ray.wait, finish_a_part
    ends = [(1, DIED), (0, (-9, "ended by SIGKILL")), (1, DIED), (1, DIED)]
    runs_out = Outcome(runs.FINISHED, "finished", 8)

    def rank_0_ends(ref: str) -> Any:
        if workers.script[0][1] == "the end":
            runs.write_outcome(run_dir, 0, runs_out)
            workers.script[0] = (0, (0, ""))
        return get(ref)

    get, workers._ray.get = workers._ray.get, rank_0_ends
    assert follow(workers, *ends, (0, "the end")) == runs_out
    assert workers.starts == [0, 1, 1, 0, 1, 1]


@pytest.mark.parametrize("code", [runs.FINISHED, runs.STOPPED])
def test_converted_weights_go_when_the_run_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    ended = Outcome(code, "as it may be", -1)
    (tmp_path / parts.WEIGHTS / "of a checkpoint").mkdir(parents=True)
    workers = SimpleNamespace(follow=lambda *_: ended)
    monkeypatch.setattr(ray_generate, "Workers", lambda *_: workers)
    assert ray_generate.run(tmp_path, None, None, None, Nobody()) == ended  # type: ignore[arg-type]
    assert (tmp_path / parts.WEIGHTS).exists() == (code == runs.STOPPED)


def test_it_gives_up_where_no_part_is_new(run_dir: Path) -> None:
    """A node takes many workers with it: each counts for itself."""
    failed = (1, "ended with 1\nImportError: x")
    outcome = follow(Workers(run_dir), (1, DIED), (0, DIED), (1, failed))
    assert outcome.code == runs.FAILED
    assert outcome.reason.startswith("ended with 1\nImportError: x\nworker 1; its logs: ")
    assert outcome.reason.endswith("gave up: 2 times without a new part")


def test_wrong_input_is_not_tried_again(run_dir: Path) -> None:
    runs.write_failure(run_dir, 0, 0, Outcome(runs.WRONG_INPUT, "no such column", -1))
    workers = Workers(run_dir)
    assert follow(workers, (0, (2, "words"))) == Outcome(runs.WRONG_INPUT, "no such column", -1)
    assert workers.starts == [0, 1]


def test_a_stop_that_rank_0_cannot_answer(run_dir: Path) -> None:
    """It dies of it; others leave in order."""
    (run_dir / "STOP").touch()
    outcome = follow(Workers(run_dir), (1, (0, "")), (0, (-9, "")))
    assert (outcome.code, outcome.asked_by) == (runs.STOPPED, "STOP file")


def test_a_signal_is_passed_on(run_dir: Path) -> None:
    relay = Nobody()
    relay.received = SimpleNamespace(name="SIGTERM")
    outcome = follow(Workers(run_dir), (1, (0, "")), (0, (0, "")), relay=relay)
    assert outcome.asked_by == "signal SIGTERM"
    assert (run_dir / "logs/attempt-0/stop").read_text() == "signal SIGTERM"


def test_rank_0_must_say_how_it_went(run_dir: Path) -> None:
    outcome = follow(Workers(run_dir), (0, (0, "")))
    assert outcome == Outcome(runs.FAILED, "rank 0 has ended without a word", -1)


def test_no_room_is_an_error(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers(run_dir)
    workers.room = 0
    monkeypatch.setattr(ray_generate.ray_cluster, "too_busy", lambda *_: RuntimeError("busy"))
    with pytest.raises(RuntimeError, match="busy"):
        follow(workers)


@pytest.mark.parametrize("asked", ["STOP file", "signal SIGTERM"])
def test_lost_room_is_waited_for_until_a_stop(
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asked: str,
) -> None:
    """Both workers were lost, and there is room for none of them any more."""
    workers, relay, looks = Workers(run_dir), Nobody(), iter(range(9))
    workers.room = 2
    monkeypatch.setattr(ray_generate.ray_cluster, "too_busy", lambda *_: RuntimeError("busy"))

    def ask(*words: object, **options: object) -> Any:
        (run_dir / "logs/attempt-0/worker-0.log").touch()  # of its first start
        if next(looks) == 5:
            assert json.loads((run_dir / "logs/attempt-0/ray.json").read_text())["hosts"] == []
            if asked == "STOP file":
                (run_dir / "STOP").touch()
            else:
                relay.received = SimpleNamespace(name="SIGTERM")
        return wait(*words, **options)

    wait, workers._ray.wait = workers._ray.wait, ask
    outcome = follow(workers, (1, DIED), (0, DIED), relay=relay)
    assert (outcome.code, outcome.asked_by) == (runs.STOPPED, asked)
    assert next(looks) == 6
    assert workers.starts == [0, 1, 1, 0]
    assert "waiting to go on: busy" in capsys.readouterr().err


def test_others_begin_when_rank_0_has_prepared(run_dir: Path) -> None:
    """They would only wait for it, and one could have its place if it died."""
    workers = Workers(run_dir)
    (run_dir / "logs/attempt-0/data-0.json").unlink()
    follow(workers, (0, DIED), (0, (2, "no such column")))
    assert workers.starts == [0, 0]


def test_workers_with_other_libraries_are_refused(run_dir: Path) -> None:
    workers = Workers(run_dir)
    workers.versions[1] = "2.12"
    outcome = follow(workers)
    assert outcome.code == runs.FAILED
    assert "the workers cannot work together:\n  torch: n1 has 2.12" in outcome.reason


def a_run(folder: Path) -> Path:
    """Make a run folder with an attempt."""
    content = {
        "job": "generate",
        "run_dir": str(folder / "it"),
        "model": {"path": str(folder)},
        "input": [{"path": str(folder / "rows.json")}],
        "output": {"path": str(folder / "out.jsonl")},
    }
    (folder / "recipe.yaml").write_text(json.dumps(content))
    runs.attempt_dir(folder / "it", 0).mkdir(parents=True)
    resolved = read_recipe(folder / "recipe.yaml", []).to_json()
    (folder / "it/config.json").write_text(resolved)
    return folder / "it"


def test_a_worker_says_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads are the cores that Ray reserves. After a stop, none begins."""
    run, asked = a_run(tmp_path), []
    child = SimpleNamespace(returncode=0)

    @contextlib.contextmanager
    def started(*words: Any) -> Iterator[Any]:
        asked.append(words)
        yield child, None, SimpleNamespace(received=None)

    monkeypatch.setattr(ray_worker, "started", started)
    monkeypatch.setattr(node, "watch", lambda *_: None)
    monkeypatch.setattr(node, "count_gpus", lambda: 1)
    told = (str(run), 0, 1, 2, "/")
    assert ray_generate.work(*told, {"CPU": 3.0, "GPU": 1.0}) == (0, "")
    assert asked[0][4:] == (3, 1)
    said = roll_call.read(run / "logs/attempt-0/node-1.json")
    assert (said.rank, said.host) == (1, socket.gethostname())
    assert said.alike["threads per worker"] == "3"
    (run / "STOP").touch()
    assert ray_generate.work(*told, {"CPU": 3.0}) == (0, "")
    assert len(asked) == 1


def test_a_node_that_cannot_do_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named, and is no crash that is tried again."""
    run, host = a_run(tmp_path), socket.gethostname()
    monkeypatch.setattr(ray_controller, "SEES_SECONDS", 0)
    code, words = ray_generate.work(str(tmp_path / "gone"), 0, 1, 2, "/", {})
    assert code == runs.WRONG_INPUT
    assert f"{host}: {tmp_path}/gone/logs/attempt-0 is not there: run_dir must be a folder" in words
    code, words = ray_generate.work(str(run), 0, 1, 2, str(tmp_path / "gone"), {})
    assert (code, words) == (
        2,
        f"{host}: {tmp_path}/gone, where the run was launched, is not there",
    )
    (run / "config.json").unlink()
    code, words = ray_generate.work(str(run), 0, 1, 2, "/", {})
    assert (code, words) == (2, f"{host}: {run} is not a run folder: it has no config.json")
    assert not (run / "logs/attempt-0/node-1.json").exists()
