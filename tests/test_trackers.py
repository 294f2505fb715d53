"""Trackers: TensorBoard for real, and what the others are told, through stand-ins for them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from processes import run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_sft import trackers
from dist_sft.config import Recipe, check
from dist_sft.errors import UserError
from dist_sft.trackers import check_installed, start_trackers

NAMES = get_args(get_args(Recipe.model_fields["trackers"].annotation)[0])


def recipe(run_dir: Path, *names: str) -> Recipe:
    tree = {
        "run_dir": str(run_dir),
        "model": {"path": "m"},
        "data": {"train": [{"path": "rows.json"}]},
        "trackers": list(names),
    }
    return check(tree, origin="the test")


def line(step: int, attempt: int, **more: Any) -> dict[str, Any]:
    loss = 1 / step + attempt
    return {"step": step, "loss": loss, "grad_norm": None, "phases": {"data": 0.5}} | more


def run(
    run_dir: Path, done: int, lines: Iterable[dict[str, Any]], *names: str, attempt: int = 0
) -> list[str]:
    """Do with trackers and metrics.jsonl what training does; return what was said to the user."""
    said: list[str] = []
    run_dir.mkdir(exist_ok=True)
    accelerator = Accelerator(cpu=True, project_dir=run_dir)
    track = start_trackers(accelerator, recipe(run_dir, *names), run_dir, done, said.append)
    with (run_dir / "metrics.jsonl").open("a") as metrics:
        for one in lines:
            metrics.write(json.dumps({"attempt": attempt} | one) + "\n")
            track(one)
    accelerator.end_training()
    return said


def points(run_dir: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / run_dir.name)).Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]


def test_tensorboard_has_every_step_of_a_continued_run_once(tmp_path: Path) -> None:
    lost = [line(step, 0, eval_loss={"zh": 0.0}) for step in (3, 4)]
    assert run(tmp_path, 0, [line(1, 0), line(2, 0), *lost], "tensorboard") == []
    again = [line(step, 1, eval_loss={"zh": 1.0}) for step in (3, 4, 5)]
    assert run(tmp_path, 2, again, "tensorboard", attempt=1) == []
    assert points(tmp_path, "loss") == [(1, 1), (2, 1 / 2), (3, 4 / 3), (4, 5 / 4), (5, 6 / 5)]
    assert points(tmp_path, "eval_loss/zh") == [(3, 1), (4, 1), (5, 1)]
    assert points(tmp_path, "phases/data") == [(step, 0.5) for step in range(1, 6)]


def test_an_evaluation_that_was_owed_does_not_double_its_step(tmp_path: Path) -> None:
    run(tmp_path, 0, [line(1, 0), line(2, 0)], "tensorboard")
    owed = line(2, 0, eval_loss={"zh": 1.0})
    run(tmp_path, 2, [owed, line(3, 1)], "tensorboard", attempt=1)
    assert [step for step, _ in points(tmp_path, "loss")] == [1, 2, 3]
    assert points(tmp_path, "eval_loss/zh") == [(2, 1)]


def test_tensorboard_shows_one_run_only(tmp_path: Path) -> None:
    run(tmp_path, 0, [line(1, 0)], "tensorboard")
    (folder,) = {path.parent for path in tmp_path.rglob("events*")}
    assert folder == tmp_path / tmp_path.name


class StandIn(GeneralTracker):
    """Keep what it is told, and fail where the test wants that."""

    requires_logging_directory = False
    offline = False
    broken: ClassVar[set[str]] = set()
    opened: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    settings: ClassVar[list[dict[str, Any]]] = []
    logged: ClassVar[list[tuple[int, dict[str, float]]]] = []

    def __init__(self, place: str, *_: Path, **options: Any) -> None:
        super().__init__()
        self.opened.append((place, options))

    def _fail(self, where: str) -> None:
        if where in self.broken:
            raise ConnectionError("no route to host")

    @property
    def tracker(self) -> "StandIn":
        """Stand in for the run of the client's library, too."""
        return self

    info: Any = property(lambda self: self)
    run_id: Any = property(lambda self: "named-by-itself")
    hash: Any = run_id
    id: Any = run_id

    def start(self) -> None:
        self._fail("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings.append(values)

    def log(self, values: dict[str, float], step: int, **_: Any) -> None:
        self.logged.append((step, values))
        self._fail(f"log {step}")

    def finish(self) -> None:
        self._fail("finish")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    for name in NAMES:
        kind = type(name, (StandIn,), {"name": name})
        kind.requires_logging_directory = LOGGER_TYPE_TO_CLASS[name].requires_logging_directory
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, kind)
    for memory in (StandIn.opened, StandIn.settings, StandIn.logged, StandIn.broken):
        memory.clear()
    return StandIn


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("wandb", "id"),
        ("swanlab", "id"),
        ("comet_ml", "experiment_key"),
        ("trackio", "name"),
        ("mlflow", "run_id"),
        ("aim", "run_hash"),
        ("clearml", "reuse_last_task_id"),
        ("dvclive", "dir"),
    ],
)
def test_a_folder_is_one_run(tmp_path: Path, stand_in: type[StandIn], name: str, key: str) -> None:
    for place in ("a", "a", "a", "b"):
        run(tmp_path / place, 0, [], name)
    first, second, third, other = (options[key] for _, options in stand_in.opened)
    assert second == third
    if name in trackers.NAMED_BY_ITSELF:
        assert not first
        assert second == "named-by-itself"
        assert not other
    else:
        assert first == second != other


def test_an_old_path_is_a_new_run(tmp_path: Path, stand_in: type[StandIn]) -> None:
    run(tmp_path / "a", 0, [line(1, 0)], "wandb", "mlflow")
    (tmp_path / "a").rename(tmp_path / "kept")
    run(tmp_path / "a", 0, [line(1, 0)], "wandb", "mlflow")
    (_, wandb), (_, mlflow), (_, new_wandb), (_, new_mlflow) = stand_in.opened
    assert wandb["id"] != new_wandb["id"]
    assert mlflow["run_id"] is new_mlflow["run_id"] is None
    assert len(stand_in.logged) == 4


def test_a_project_holds_the_runs(
    tmp_path: Path, stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "a", 0, [], "wandb", "swanlab", "aim")
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    run(tmp_path / "a", 0, [], "wandb")
    assert [name for name, _ in stand_in.opened] == ["dist_sft", "dist_sft", "a", "ours"]


def test_a_replayed_step_is_told_once(tmp_path: Path, stand_in: type[StandIn]) -> None:
    run(tmp_path, 0, [line(1, 0), line(2, 0), line(3, 0)], "mlflow")
    replayed = [line(2, 1, eval_loss={"zh": 1.0}), line(3, 1), line(4, 1)]
    run(tmp_path, 1, replayed, "mlflow", attempt=1)
    assert stand_in.logged == [
        (1, {"loss": 1.0, "phases/data": 0.5}),
        (2, {"loss": 1 / 2, "phases/data": 0.5}),
        (3, {"loss": 1 / 3, "phases/data": 0.5}),
        (2, {"eval_loss/zh": 1.0}),  # only what is new of it
        (4, {"loss": 5 / 4, "phases/data": 0.5}),
    ]


def test_only_a_wandb_with_a_server_is_told_again(
    tmp_path: Path, stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, 0, [line(1, 0), line(2, 0)], "wandb")
    run(tmp_path, 1, [line(2, 1)], "wandb", attempt=1)
    assert [step for step, _ in stand_in.logged] == [1, 2, 2]
    monkeypatch.setattr(stand_in, "offline", True)
    run(tmp_path, 1, [line(2, 2), line(3, 2)], "wandb", attempt=2)
    assert [step for step, _ in stand_in.logged] == [1, 2, 2, 3]


def test_a_tracker_that_joins_later_is_told_what_is_left(
    tmp_path: Path, stand_in: type[StandIn]
) -> None:
    run(tmp_path, 0, [line(1, 0), line(2, 0)])
    run(tmp_path, 1, [line(2, 1)], "mlflow", attempt=1)
    assert [step for step, _ in stand_in.logged] == [2]


def test_the_recipe_is_stored_once_and_flat(tmp_path: Path, stand_in: type[StandIn]) -> None:
    run(tmp_path, 0, [], "wandb")
    run(tmp_path, 0, [], "wandb", "tensorboard")
    (settings,) = stand_in.settings
    assert settings["data.train.0.path"] == "rows.json"
    assert settings["optimizer.lr"] == 2e-5
    assert settings["train.steps"] is None
    assert all(isinstance(v, str | int | float | None) for v in settings.values())


def test_a_tracker_that_breaks_down_does_not_end_the_run(
    tmp_path: Path, stand_in: type[StandIn]
) -> None:
    stand_in.broken.update({"log 2", "finish"})
    said = run(tmp_path, 0, [line(1, 0), line(2, 0), line(3, 0)], "wandb")
    assert said == ["trackers: wandb gets no more: ConnectionError: no route to host"]
    assert [step for step, _ in stand_in.logged] == [1, 2]
    assert run(tmp_path, 3, [line(4, 1)], "wandb") == said  # this time of finish
    assert [step for step, _ in stand_in.logged] == [1, 2, 4]


def test_a_continued_run_starts_without_a_tracker_that_does_not(
    tmp_path: Path, stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, 0, [line(1, 0)], "wandb", "mlflow")
    monkeypatch.setattr(LOGGER_TYPE_TO_CLASS["wandb"], "broken", {"start"})
    (said,) = run(tmp_path, 1, [line(2, 1)], "wandb", "mlflow", attempt=1)
    assert said == (
        "trackers: wandb does not start: ConnectionError: no route to host; the run goes on "
        f"without (remove {tmp_path}/trackers.json for new curves)"
    )
    assert [step for step, _ in stand_in.logged] == [1, 1, 2]


def test_a_new_tracker_that_does_not_start_is_refused(
    tmp_path: Path, stand_in: type[StandIn]
) -> None:
    stand_in.broken.add("start")
    expected = "trackers: wandb does not start: ConnectionError: no route to host\nmetrics.jsonl "
    with pytest.raises(UserError, match=expected):
        run(tmp_path, 0, [line(1, 0)], "wandb")


def test_a_missing_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["tensorboard"])
    check_installed(["tensorboard"])
    with pytest.raises(
        UserError, match=r"^trackers: comet_ml, aim not installed: pip install comet-ml 'aim<4'$"
    ):
        check_installed(["tensorboard", "comet_ml", "aim"])


RANK = """
import sys
from pathlib import Path
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import InitProcessGroupKwargs
sys.path.insert(0, sys.argv[1])
from test_trackers import StandIn, line, recipe
from dist_sft.errors import UserError
from dist_sft.trackers import start_trackers

run_dir = Path(sys.argv[2])
LOGGER_TYPE_TO_CLASS["wandb"] = type("wandb", (StandIn,), {"name": "wandb"})
accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs("gloo")])
StandIn.broken.add("start")
try:
    start_trackers(accelerator, recipe(run_dir, "wandb"), run_dir, 0)
except UserError as error:
    print("refused:", str(error).splitlines()[0])
StandIn.broken.clear()
track = start_trackers(accelerator, recipe(run_dir, "wandb"), run_dir, 0)
track(line(1, 0))
print("opened", len(StandIn.opened), "logged", len(StandIn.logged))
accelerator.end_training()
"""


@pytest.mark.slow
def test_one_rank_speaks_and_all_hear_that_it_cannot(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    here = Path(__file__).parent
    told = run_ranks(
        tmp_path / "rank.py", here, tmp_path, world=2, log_dir=tmp_path / "logs", seconds=60
    )
    refused = "refused: trackers: wandb does not start: ConnectionError: no route to host\n"
    assert all(refused in text for text in told)
    assert "opened 2 logged 1" in told[0]
    assert "opened 0 logged 0" in told[1]
