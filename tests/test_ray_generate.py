"""What the launcher makes of how workers of a generation run end on Ray."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

import ray

from dist_sft import parts, ray_generate, runs
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
        self._ray = SimpleNamespace(get=self._get, exceptions=ray.exceptions, wait=self._wait)
        self.script: list[tuple[int, Any]] = []
        """What ends, in this order: a rank, and its end."""
        self.starts: list[int] = []

    def _start(self, rank: int) -> None:
        self.starts.append(rank)
        self._ranks[f"task {len(self.starts)}"] = rank
        self._log(rank).write_text("")

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


def test_it_gives_up_where_no_part_is_new(run_dir: Path) -> None:
    outcome = follow(Workers(run_dir), (1, DIED), (1, (1, "ended with 1\nImportError: x")))
    assert outcome.code == runs.FAILED
    assert outcome.reason.startswith("ended with 1\nImportError: x\nworker 1; its logs: ")
    assert outcome.reason.endswith("gave up: 2 without a new part")


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
    monkeypatch.setattr(workers, "_log", lambda rank: run_dir / "not there")
    monkeypatch.setattr(workers, "_start", lambda rank: None)
    monkeypatch.setattr(ray_generate.ray_cluster, "too_busy", lambda *_: RuntimeError("busy"))
    with pytest.raises(RuntimeError, match="busy"):
        follow(workers)
