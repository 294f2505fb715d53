"""Experiment trackers through accelerate: a continued run goes on in the same curve.

What names a run with each tracker is kept in `RUN_DIR/trackers.json`, so that a new run folder at
an old path is a new run. A step that is computed again after a crash is in the curve once:
tensorboard hides its old values, aim writes over them, wandb leaves out what its server has; the
others are not told again what `metrics.jsonl` has. Those that send in the background (comet_ml,
clearml, swanlab, trackio, wandb offline) may therefore miss the last seconds before a kill. An
evaluation that is made up for after a stop comes too late for wandb, which drops it.

Tried with tensorboard 2.21, wandb 0.31 (online with a stand-in for its server, and `wandb sync`),
mlflow 3.17, trackio 0.43, aim 3.29 and dvclive 3.49. Not tested: whether the servers of comet_ml
3.58, swanlab 0.10 and clearml 2.1 join the parts, which these do write under one name.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import broadcast_object_list

from dist_sft import report
from dist_sft.config import Recipe
from dist_sft.errors import UserError
from dist_sft.runs import write_atomically

Line = dict[str, Any]
Say = Callable[[str], None]

PROJECT = "dist_sft"
# accelerate would override these; those of mlflow and clearml it reads itself.
PROJECT_VARIABLES = {"wandb": "WANDB_PROJECT", "comet_ml": "COMET_PROJECT_NAME"}
PACKAGES = {"aim": "'aim<4'", "comet_ml": "comet-ml"}
# These name a run themselves when it starts; for the others the name is drawn here.
NAMED_BY_ITSELF: dict[str, Callable[[Any], str]] = {
    "mlflow": lambda run: str(run.info.run_id),
    "aim": lambda run: str(run.hash),
    "clearml": lambda task: str(task.id),
}
# These deal themselves with a step that they are told twice.
KEEP_STEPS_ONCE = ("tensorboard", "aim", "wandb")


def check_installed(trackers: Sequence[str]) -> None:
    """Raise UserError where a tracker's package is missing; accelerate would leave it out."""
    available = set(map(str, get_available_trackers()))
    missing = [name for name in trackers if name not in available]
    if missing:
        packages = " ".join(PACKAGES.get(name, name) for name in missing)
        raise UserError(f"trackers: {', '.join(missing)} not installed: pip install {packages}")


def start_trackers(
    accelerator: Accelerator, recipe: Recipe, run_dir: Path, done: int, say: Say = print
) -> Callable[[Line], None]:
    """Open the trackers of a run of which `done` steps are taken; return what tells them a step.

    Raises UserError on every rank where a tracker that is new to the run does not start. One that
    fails later, be it in a continued run, is left out with a line: it must not end a run.
    """
    problems = []
    if accelerator.is_main_process and recipe.trackers:
        memory = run_dir / "trackers.json"
        known = json.loads(memory.read_text(encoding="utf-8")) if memory.exists() else {}
        for name in dict.fromkeys(recipe.trackers):
            old = known.get(name)
            try:
                tracker, known[name] = _open(name, old, accelerator, recipe, run_dir, done)
            except Exception as error:  # whatever a client may raise
                problem = f"trackers: {name} does not start: {type(error).__name__}: {error}"
                if old is None:
                    problems.append(problem)
                else:
                    say(f"{problem}; the run goes on without (remove {memory} for new curves)")
                continue
            # Uploaded later, a step that is told twice counts as two to wandb.
            once = name in KEEP_STEPS_ONCE and not getattr(tracker.tracker, "offline", False)
            told = _numbers_told(run_dir, done, done if once else math.inf) if old else {}
            # In this list accelerate passes numbers on to them, and ends them after training.
            accelerator.trackers.append(Curve(tracker, told, say))
        try:
            write_atomically(memory, json.dumps(known, indent=2) + "\n")
        except OSError as error:
            problems.append(f"trackers: {memory} cannot be written: {error.strerror}")
    [problem] = broadcast_object_list(["\n".join(problems)])
    if problem:
        raise UserError(f"{problem}\nmetrics.jsonl has the same numbers: trackers may be left out")
    return lambda line: accelerator.log(numbers(line), step=line["step"])


class Curve:
    """One run in one tracker, told every number of a step once; what fails ends the curve only.

    The first failure is the last: the client of a dead server may take minutes to give up.
    """

    def __init__(self, tracker: Any, told: dict[int, set[str]], say: Say) -> None:
        self.name: str = tracker.name
        self._tracker, self._told, self._say = tracker, told, say

    def log(self, values: dict[str, float], step: int) -> None:
        """Tell the tracker the numbers that it does not have of this step."""
        told = self._told.get(step, ())
        news = {name: value for name, value in values.items() if name not in told}
        if news:
            self._try("log", news, step=step)

    def finish(self) -> None:
        """Send what is left."""
        self._try("finish")

    def _try(self, method: str, *arguments: Any, **options: Any) -> None:
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, method)(*arguments, **options)
        except Exception as error:
            self._tracker = None
            self._say(f"trackers: {self.name} gets no more: {type(error).__name__}: {error}")


def numbers(line: Line) -> dict[str, float]:
    """Return a step's numbers as a flat table, with the names that they have in metrics.jsonl."""
    # Nothing may be called both x and x/y: dvclive, and mlflow on files, take that for a folder.
    flat = flatten(line, "/")
    left_out = ("attempt", "step")
    return {k: v for k, v in flat.items() if isinstance(v, int | float) and k not in left_out}


def flatten(tree: Any, separator: str, name: str = "") -> dict[str, Any]:
    """Return the leaves of nested tables and lists by their joined names."""
    if not isinstance(tree, dict | list):
        return {name: tree}
    flat: dict[str, Any] = {}
    for key, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
        flat |= flatten(part, separator, f"{name}{separator}{key}" if name else str(key))
    return flat


def _numbers_told(run_dir: Path, first: int, last: float) -> dict[int, set[str]]:
    """Return the names of the numbers that trackers were told, for steps from first to last."""
    metrics = run_dir / "metrics.jsonl"
    lines = report.read_steps(metrics) if metrics.exists() else []
    return {x["step"]: set(numbers(x)) for x in lines if first <= x["step"] <= last}


def _open(
    name: str, old: str | None, accelerator: Accelerator, recipe: Recipe, run_dir: Path, done: int
) -> tuple[Any, str]:
    """Start a tracker, with the recipe where the run is new; return it and the run's name there."""
    kind = LOGGER_TYPE_TO_CLASS[name]
    chosen = old or secrets.token_hex(16)
    options = _options(chosen, old, run_dir, done)[name]
    if kind.requires_logging_directory:  # keeps the run in its own folder
        tracker = kind(run_dir.name, accelerator.logging_dir, **options)
    else:
        tracker = kind(os.environ.get(PROJECT_VARIABLES.get(name, ""), PROJECT), **options)
    # Otherwise a training that is over would hold its machines until wandb's server comes back.
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", "600")
    tracker.start()
    # tensorboard would show the settings as one more run without a curve.
    if old is None and name != "tensorboard":
        tracker.store_init_configuration(flatten(recipe.model_dump(mode="json"), "."))
    return tracker, NAMED_BY_ITSELF.get(name, lambda run: chosen)(tracker.tracker)


def _options(chosen: str, old: str | None, run_dir: Path, done: int) -> dict[str, dict[str, Any]]:
    """Return what makes each tracker go on where the run was."""
    title = run_dir.name
    return {
        "tensorboard": {"purge_step": done + 1},
        "wandb": {"id": chosen, "resume": "allow", "name": title, "dir": str(run_dir)},
        "mlflow": {"run_id": old, "run_name": title},
        "trackio": {"name": f"{title}-{chosen[:8]}", "resume": "allow"},
        "comet_ml": {"experiment_key": chosen},
        "swanlab": {
            "id": chosen,
            "resume": "allow",
            "experiment_name": title,
            "logdir": str(run_dir / "swanlog"),
        },
        "aim": {"run_hash": old, "force_resume": old is not None},  # a kill may leave its lock
        "clearml": {
            "task_name": title,
            "reuse_last_task_id": old or False,
            "continue_last_task": 0 if old else False,  # 0: steps keep their numbers
            "auto_connect_arg_parser": False,
            "auto_connect_frameworks": False,  # would copy what tensorboard is told
        },
        # dvclive would otherwise write dvc.yaml into the current folder and commit the workspace.
        "dvclive": {
            "dir": str(run_dir / "dvclive"),
            "resume": old is not None,
            "dvcyaml": None,
            "save_dvc_exp": False,
        },
    }
