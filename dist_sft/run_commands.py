"""The commands of `dist-sft` that are about a run folder: export, verify, status, stop."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_sft.errors import UserError


def add(commands: Any) -> None:
    """Add the commands; each names the function that runs it."""
    export = _command(
        commands,
        "export",
        _export,
        help="turn a checkpoint into a Hugging Face folder",
        description="Write a checkpoint as a folder that AutoModelForCausalLM loads.",
    )
    export.add_argument("out", type=Path, metavar="OUT", help="new folder to write")
    export.add_argument("--step", metavar="N|best", help="default: the newest checkpoint")
    export.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="default: model.dtype of the recipe; float32, the master weights, where that is auto",
    )
    verify = _command(
        commands,
        "verify",
        _verify,
        help="check every byte of the checkpoints of a run",
        description="Compare checkpoints with what was written, byte by byte. Exit code 1 where "
        "anything is wrong. Needs no torch.",
    )
    verify.add_argument("--step", metavar="N|best", help="default: all checkpoints")
    _command(
        commands,
        "status",
        _status,
        help="say how a run is getting on",
        description="Say who works on a run, how far it is, and how its attempts ended.",
    )
    _command(
        commands,
        "stop",
        _stop,
        help="ask a run to save and stop",
        description="Ask a run to save and stop after the step it is in, or to leave the parts "
        "of a generation that it is at; nothing is killed.",
    )


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], **words: str
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, **words)
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of the run")

    def checked(options: argparse.Namespace) -> int | None:
        _check(options.run_dir, takes_step="step" in options)
        return run(options)

    command.set_defaults(run=checked)
    return command


def _check(run_dir: Path, *, takes_step: bool) -> None:
    """Raise UserError for what is no folder, or a folder within a run's; say which was meant."""
    path = run_dir.resolve()
    step = path.name.removeprefix("step-")
    if path.name == "checkpoints" and (path.parent / "config.json").exists():
        raise UserError(f"RUN_DIR: {run_dir} is within a run's folder; give {path.parent}")
    if (
        path.parent.name == "checkpoints"
        and step.isdecimal()
        and (path.parents[1] / "config.json").exists()
    ):
        chosen = f" --step {int(step)}" if takes_step else ""
        raise UserError(f"RUN_DIR: {run_dir} is one checkpoint; give {path.parents[1]}{chosen}")
    if not run_dir.is_dir():
        what = "is a file" if run_dir.exists() else "does not exist"
        raise UserError(f"RUN_DIR: {run_dir} {what}; give the folder that is run_dir in the recipe")


def _checkpoints(options: argparse.Namespace) -> dict[int, Path]:
    """Return the folder of the step that was asked for, or of every checkpoint, oldest first."""
    from dist_sft.manifest import best, folders

    found = folders(options.run_dir)
    if not found:
        what = "has no checkpoint yet"
        if not (options.run_dir / "config.json").exists():
            what = "is not a run folder: it has no checkpoints and no config.json"
        raise UserError(f"RUN_DIR: {options.run_dir} {what}")
    if options.step is None:
        return found
    step = best(options.run_dir) if options.step == "best" else None
    if options.step == "best" and step is None:
        raise UserError("--step best: no checkpoint was evaluated; give a number instead")
    if options.step.isdecimal():
        step = int(options.step)
    if step not in found:
        raise UserError(
            f"--step: got {options.step}; allowed: best, or one of the checkpoints {list(found)}"
        )
    return {step: found[step]}


def _export(options: argparse.Namespace) -> None:
    from dist_sft.config import read_training_config

    recipe = read_training_config(options.run_dir)
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise UserError(f"OUT: {options.out} exists already; give a new folder")
    step, folder = list(_checkpoints(options).items())[-1]
    from dist_sft.manifest import check

    _, wrong = check(folder)
    if wrong:
        raise UserError(
            f"the checkpoint of step {step} is damaged: {wrong[0]}\nExport another one with "
            f"--step; `dist-sft verify {options.run_dir}` checks them all"
        )
    from dist_sft.export import export
    from dist_sft.model import DTYPES

    name = options.dtype or (recipe.model.dtype if recipe.model.dtype != "auto" else "float32")
    export(folder, options.out, DTYPES[name])
    print(f"step {step} as {name}: {options.out}")


def _verify(options: argparse.Namespace) -> int:
    from rich import box
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    from dist_sft.manifest import best, check, strangers

    table = Table("step", "saved on", "files", "size", "eval loss", "verdict", box=box.SIMPLE)
    lowest, wrong, unknown = best(options.run_dir), [], []
    for step, folder in _checkpoints(options).items():
        content, found = check(folder)
        if not folder.exists():  # a run that works meanwhile has deleted it
            continue
        wrong += found
        unknown += strangers(folder, content) if content else []
        files = content.get("files", {})
        size = decimal(sum(entry["size"] for entry in files.values()))
        ranks = content.get("world_size", 1)
        where = f"{ranks} rank{'s' * (ranks > 1)}, ZeRO {content.get('zero_stage') or 'none'}"
        first = next(iter((content.get("eval_loss") or {}).values()), None)  # as `best` does
        loss = "" if first is None else f"{first:.4f}" + " (best)" * (step == lowest)
        known = [where, str(len(files)), size, loss]
        verdict = f"{len(found)} wrong" if found else "whole"
        table.add_row(str(step), *(known if content else ["?"] * len(known)), verdict)
    Console(highlight=False, soft_wrap=True).print(table)
    for path in unknown:
        print(f"{path}: not in the manifest, and nothing reads it")
    for problem in wrong:
        print(problem)
    return 1 if wrong else 0


def _status(options: argparse.Namespace) -> None:
    from dist_sft.status import status

    print(*status(options.run_dir), sep="\n")


def _stop(options: argparse.Namespace) -> None:
    from dist_sft.lease import is_gone, read
    from dist_sft.runs import read_launch
    from dist_sft.slurm_queue import jobs_of, states_of

    run_dir: Path = options.run_dir
    read_launch(run_dir)  # or it is no run folder
    held = read(run_dir)
    if held is None or is_gone(held.owner):
        waiting = ", ".join(states_of(jobs_of(run_dir)))
        if not waiting:
            raise UserError(f"nobody works on {run_dir}: there is nothing to stop")
        (run_dir / "STOP").touch()
        print(f"{run_dir} will not start: `launch/slurm.py cancel {run_dir}` ends job {waiting}")
        return
    (run_dir / "STOP").touch()
    print(f"{run_dir} stops as soon as it can; `dist-sft status {run_dir}` tells")
