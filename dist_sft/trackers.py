"""Experiment trackers through accelerate; a continued run goes on in the same curve."""

from __future__ import annotations

import json
import secrets
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from dist_sft import report, world
from dist_sft.config import Recipe
from dist_sft.errors import UserError
from dist_sft.runs import write_atomically

PROJECT = "dist_sft"
PACKAGES = {"aim": "'aim<4'", "comet_ml": "comet-ml"}
Line = dict[str, Any]
Said = dict[int, set[str]]


def check_installed(trackers: Sequence[str]) -> None:
    available = set(map(str, get_available_trackers()))
    missing = [name for name in trackers if name not in available]
    if missing:
        packages = " ".join(PACKAGES.get(name, name) for name in missing)
        raise UserError(
            f"trackers: {', '.join(missing)} asked for, but not installed: pip install {packages}"
        )


def start_options(name: str, known: str | None, run_dir: Path, done: int) -> dict[str, Any]:
    title = run_dir.name
    chosen = known or secrets.token_hex(16)
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": done + 1},
        "wandb": {"id": chosen, "resume": "allow", "name": title, "dir": str(run_dir)},
        "mlflow": {"run_id": known, "run_name": title},
        "trackio": {"name": f"{title}-{chosen[:8]}", "resume": "allow"},
        "comet_ml": {"experiment_key": chosen},
        "swanlab": {"id": chosen, "resume": "allow", "name": title, "log_dir": str(run_dir / "swanlog")},
        "aim": {"run_hash": known, "force_resume": True},
        "clearml": {
            "task_name": title,
            "reuse_last_task_id": known or False,
            "continue_last_task": 0 if known else False,
            "auto_connect_frameworks": False,
            "auto_connect_arg_parser": False,
        },
        "dvclive": {"dir": str(run_dir / "dvclive"), "resume": bool(known), "dvcyaml": None, "save_dvc_exp": False},
    }
    return options[name]


class Curve:
    def __init__(self, tracker: Any, said: Said, say: Callable[[str], None]) -> None:
        self.name = tracker.name
        self._tracker, self._said, self._say = tracker, said, say

    def log(self, values, step, **_):
        news = {k: v for k, v in values.items() if k not in self._said.get(step, ())}
        if news:
            self._try("log", news, step=step)

    def finish(self):
        self._try("finish")

    def _try(self, method, *args, **kwargs):
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, method)(*args, **kwargs)
        except Exception as error:
            self._tracker = None
            self._say(f"{self.name} takes no more: {type(error).__name__}: {error}")


def flat(tree: Any, join: str, key: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        parts = tree.items()
    elif isinstance(tree, list):
        parts = enumerate(tree)
    else:
        return {key: tree}
    return {
        k: v for name, part in parts for k, v in flat(part, join, f"{key}{join}{name}" if key else f"{name}").items()
    }


def numbers(line: Line) -> dict[str, float]:
    return {
        k: v for k, v in flat(line, "/").items() if isinstance(v, int | float) and k not in ("step", "attempt")
    }


def start_trackers(accelerator: Accelerator, recipe: Recipe, run_dir: Path, done: int, say=print):
    import os
    notebook = run_dir / "trackers.json"
    ids = json.loads(notebook.read_text()) if notebook.exists() else {}
    before = {s: signal.getsignal(s) for s in signal.Signals if s not in (9, 19)}
    metrics = run_dir / "metrics.jsonl"
    lines = report.read_steps(metrics) if metrics.exists() else []
    for name in recipe.trackers:
        kind = LOGGER_TYPE_TO_CLASS[name]
        place = [accelerator.logging_dir] if kind.requires_logging_directory else []
        options = start_options(name, ids.get(name), run_dir, done)
        tracker = kind(PROJECT, *place, **options)
        tracker.start()
        after = {s: signal.getsignal(s) for s in before}
        for s in before:
            if after[s] != before[s]:
                print("SIGNAL CHANGED", name, s, before[s], after[s])
        if name not in ids and name != "tensorboard":
            tracker.store_init_configuration(flat(recipe.model_dump(mode="json"), "."))
        run = tracker.tracker
        if name not in ids:
            given = {"mlflow": lambda: run.info.run_id, "aim": lambda: run.hash, "clearml": lambda: run.id}
            ids[name] = (given[name]() if name in given else options.get("id") or options.get("experiment_key") or options.get("name", "x").rsplit("-")[-1])
        said = {}
        if os.environ.get("FILTER"):
            said = {x["step"]: set(numbers(x)) for x in lines if x["step"] >= done}
        accelerator.trackers.append(Curve(tracker, said, say))
    write_atomically(notebook, json.dumps(ids))

    def log(line: Line) -> None:
        accelerator.log(numbers(line), step=line["step"])

    return log
