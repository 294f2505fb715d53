"""Trackers: TensorBoard for real, and what every tracker is told, through one of our own."""

from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_sft import trackers
from dist_sft.config import Recipe, check
from dist_sft.errors import UserError
from dist_sft.trackers import check_installed, start_trackers


def recipe(run_dir: Path, *names: str) -> Recipe:
    tree = {
        "run_dir": str(run_dir),
        "model": {"path": "m"},
        "data": {"train": [{"path": "rows.json"}]},
        "trackers": list(names),
    }
    return check(tree, origin="the test")


def line(step: int, attempt: int) -> dict[str, Any]:
    loss = 1 / step + attempt
    return {"step": step, "loss": loss, "phases": {"data": 0.5}, "eval_loss": {"zh": loss}}


def run(run_dir: Path, steps: range, attempt: int, said: list[str], *names: str) -> None:
    accelerator = Accelerator(cpu=True, log_with=list(names), project_dir=run_dir)
    track = start_trackers(
        accelerator, recipe(run_dir, *names), run_dir, steps.start - 1, said.append
    )
    for step in steps:
        track(line(step, attempt))
    accelerator.end_training()


def test_a_continued_run_has_every_step_once(tmp_path: Path) -> None:
    said: list[str] = []
    run(tmp_path, range(1, 5), 0, said, "tensorboard")
    run(tmp_path, range(3, 7), 1, said, "tensorboard")  # the steps 3 and 4 were lost in a crash
    events = EventAccumulator(str(tmp_path / tmp_path.name)).Reload()
    for name in ("loss", "eval_loss/zh"):
        points = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(step, 1 / step + (step > 2)) for step in range(1, 7)]
        assert points == [(step, pytest.approx(value)) for step, value in expected]
    assert [event.value for event in events.Scalars("seconds/data")] == [0.5] * 6
    assert said == []


class Recording(GeneralTracker):
    """A service that breaks down at step 3."""

    name = "wandb"
    requires_logging_directory = False
    main_process_only = False
    tracker = None

    def __init__(self, run_name: str, **options: Any) -> None:
        super().__init__()
        OPENED.append((run_name, options))

    def start(self) -> None: ...

    def log(self, values: dict[str, float], step: int, **_: Any) -> None:
        if step == 3:
            raise ConnectionError("no route to host")
        LOGGED.append((step, values["loss"]))


OPENED: list[tuple[str, dict[str, Any]]] = []
LOGGED: list[tuple[int, float]] = []


def test_a_run_keeps_its_name_and_survives_its_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.tracking.LOGGER_TYPE_TO_CLASS", {"wandb": Recording})
    monkeypatch.setattr("accelerate.accelerator.LOGGER_TYPE_TO_CLASS", {"wandb": Recording})
    available = [LoggerType.WANDB]
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: available)
    OPENED.clear()
    LOGGED.clear()
    said: list[str] = []
    for place, steps in (("a", range(1, 5)), ("a", range(4, 6)), ("b", range(1, 2))):
        (tmp_path / place).mkdir(exist_ok=True)
        run(tmp_path / place, steps, 0, said, "wandb")
    (first, continued, other) = (options["id"] for _, options in OPENED)
    assert first == continued != other
    assert all(options["resume"] == "allow" for _, options in OPENED)
    assert [name for name, _ in OPENED] == ["a", "a", "b"]
    assert [step for step, _ in LOGGED] == [1, 2, 4, 5, 1]  # 4 only after the new start
    assert said == ["trackers: wandb gets no more: ConnectionError: no route to host"]


def test_a_missing_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["tensorboard"])
    check_installed(["tensorboard"])
    with pytest.raises(UserError, match="trackers: comet_ml not installed: pip install comet-ml"):
        check_installed(["tensorboard", "comet_ml"])
