"""Experiment trackers through accelerate: a continued run goes on in the same curve.

What names a run with its tracker is kept in `RUN_DIR/trackers.json`, so that a new run folder at an
old path is a new run. TensorBoard hides what was replayed after a crash; the others get a replayed
step again, with the same numbers on the same ranks.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from dist_sft.config import Recipe
from dist_sft.errors import UserError
from dist_sft.runs import write_atomically

Line = dict[str, Any]
Say = Callable[[str], None]

PACKAGES = {"aim": "'aim<4'", "comet_ml": "comet-ml"}


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

    A tracker that fails later is left out from then on, with a line: it must not end a run.
    """
    if not recipe.trackers:
        return lambda line: None
    memory = run_dir / "trackers.json"
    known = json.loads(memory.read_text(encoding="utf-8")) if memory.exists() else {}
    identity = known.get("id") or secrets.token_hex(16)
    options = _options(identity, known.get("mlflow"), run_dir, done)
    accelerator.init_trackers(run_dir.name, init_kwargs=options)
    if accelerator.is_main_process:
        facts = {"id": identity}
        if "mlflow" in recipe.trackers:  # chooses its own
            facts["mlflow"] = accelerator.get_tracker("mlflow", unwrap=True).info.run_id
        write_atomically(memory, json.dumps(facts) + "\n")
    working = list(accelerator.trackers)

    def log(line: Line) -> None:
        for tracker in list(working):
            try:
                tracker.log(numbers(line), step=line["step"])
            except Exception as error:  # whatever a service or its client comes up with
                working.remove(tracker)
                say(f"trackers: {tracker.name} gets no more: {type(error).__name__}: {error}")

    return log


def numbers(line: Line) -> dict[str, float]:
    """Return a step's numbers as a flat table."""
    values = {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
    values |= {f"eval_loss/{name}": loss for name, loss in line.get("eval_loss", {}).items()}
    return values | {f"seconds/{name}": part for name, part in line["phases"].items()}


def _options(
    identity: str, mlflow_run: str | None, run_dir: Path, done: int
) -> dict[str, dict[str, Any]]:
    """Return what makes each tracker go on where the run was."""
    name = run_dir.name
    return {
        "tensorboard": {"purge_step": done + 1},
        "wandb": {"id": identity, "resume": "allow", "name": name, "dir": str(run_dir)},
        "mlflow": {"run_id": mlflow_run, "run_name": name},
        "trackio": {"name": f"{name}-{identity[:8]}", "resume": "allow"},
        "comet_ml": {"experiment_key": identity},
        "swanlab": {"id": identity, "resume": "allow", "logdir": str(run_dir / "swanlog")},
        "dvclive": {"dir": str(run_dir / "dvclive"), "resume": done > 0},
    }
