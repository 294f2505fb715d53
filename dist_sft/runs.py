"""The run folder: create it, count attempts, say how an attempt ended. See docs/run_folder.md."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_sft.config import (
    LENGTH,
    AnyRecipe,
    difference,
    is_longer,
    may_change,
    read_config_json,
)
from dist_sft.errors import UserError
from dist_sft.generate_recipe import GenerateRecipe

FINISHED = 0
FAILED = 1
WRONG_INPUT = 2
STOPPED = 75  # EX_TEMPFAIL: stopped and resumable
FRUITFUL = "fruitful"
"""An empty file in the folder of an attempt that has finished a part."""
PLACED = "ray.json"
"""A file in the folder of an attempt on Ray: the hosts of its workers."""
ALL = "*"
"""Among the settings that may change, all of them."""


class SupersededError(RuntimeError):
    """Report that a newer attempt works on the run: this one must not write any more."""


@dataclass(frozen=True)
class Launch:
    """How a run was launched; `launch.json`."""

    launcher: str
    nodes: int
    workers_per_node: int
    options: dict[str, Any]
    revision: str

    def to_json(self) -> str:
        """Return the content of `launch.json`."""
        return json.dumps(asdict(self), indent=2) + "\n"


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended; `outcome.json`."""

    code: int
    reason: str
    step: int
    """Last step that was taken, or -1 where nobody could say."""
    asked_by: str | None = None
    """What asked it to stop: "signal NAME" or "STOP file"."""


def write_atomically(path: Path, text: str) -> None:
    """Write a file under a temporary name, flush it to disk and rename: it exists only whole."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def progress(run_dir: Path) -> int:
    """Return a number that grows as the run does: its newest checkpoint's step, or its parts."""
    from dist_sft import manifest, parts

    return max(max(manifest.folders(run_dir), default=0), len(parts.finished(run_dir)))


def check(recipe: AnyRecipe, allowed: Sequence[str] = ()) -> dict[str, str]:
    """Check that the run folder is new, or that of this recipe; return the settings that change.

    Raises UserError for a folder that holds something else, and for another run, with the settings
    that differ. Settings that never change what is learned may differ, those that a person has
    `allowed` may, and all of them may while nothing was learned: a mistake in a recipe must not
    cost a run folder.
    """
    run_dir = Path(recipe.run_dir)
    try:
        if (run_dir / "config.json").exists():
            return _changes(run_dir, recipe, allowed)
        if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
            raise UserError(
                f"run_dir: {run_dir} exists and is not a run folder (no config.json in it); "
                "give the path of a new or empty folder"
            )
    except OSError as error:
        raise UserError(f"run_dir: {run_dir} cannot be used: {error.strerror}") from None
    return {}


def create(recipe: AnyRecipe, launch: Launch, say: Callable[[str], None] = print) -> Path:
    """Make the run folder, or take the one that is there, as `check` allows.

    Raises UserError as `check` does, and for a folder that cannot be written.
    """
    run_dir = Path(recipe.run_dir)
    changes = check(recipe, launch.options.get("allow_change", ()))
    with contextlib.suppress(UserError):  # it is new, or its launch.json was lost
        before = read_launch(run_dir)
        for key in ("nodes", "workers_per_node"):
            old, new = getattr(before, key), getattr(launch, key)
            if old != new:
                changes[key] = f"{old} -> {new}"
    if changes:
        listed = [f"{key}: {change}" for key, change in changes.items()]
        what = "continues with other settings"
        if _nothing_was_made(run_dir):
            what = "has made nothing yet; its settings change"
        say("\n  ".join([f"{run_dir} {what}:", *listed]))
    try:
        if changes:
            record_change(run_dir, len(attempts(run_dir)), changes)
        described_otherwise = any(key.startswith("model.config") for key in changes)
        if changes and (described_otherwise or _nothing_was_made(run_dir)):
            # Random weights that the old settings described would be taken for the new ones'.
            shutil.rmtree(run_dir / "initial", ignore_errors=True)
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir / "config.json", recipe.to_json())
        write_launch(run_dir, launch)
    except OSError as error:
        raise UserError(f"run_dir: {run_dir} cannot be used: {error.strerror}") from None
    return run_dir


def write_launch(run_dir: Path, launch: Launch) -> None:
    """Write down how the run was launched."""
    write_atomically(run_dir / "launch.json", launch.to_json())


def record_change(run_dir: Path, attempt: int, changes: dict[str, str]) -> None:
    """Write down what is different from `attempt` on, as key: "old -> new"."""
    record = {"time": time.time(), "before_attempt": attempt, **changes}
    with open(run_dir / "changes.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _changes(run_dir: Path, recipe: AnyRecipe, allowed: Sequence[str]) -> dict[str, str]:
    from dist_sft.manifest import every_folder

    old = read_config_json(run_dir)
    if old.job != recipe.job:
        raise UserError(
            f"run_dir: {run_dir} belongs to a run of job: {old.job}; give another run_dir"
        )
    changes = difference(old, recipe)
    taken = max(every_folder(run_dir), default=None)
    refused = {
        key: change
        for key, change in changes.items()
        if not may_change(key, old, recipe, taken)
        and not any(_is_in(key, name) for name in allowed)
    }
    if not refused or _nothing_was_made(run_dir) or ALL in allowed:
        return changes
    listed = [f"{key}: {change}" for key, change in refused.items()]
    head = f"run_dir: {run_dir} belongs to a run with other settings (that run's -> the new ones):"
    if old.job == "generate":
        advice = (
            "\nGive another run_dir, or the settings of that run to continue it. With "
            "--reuse-unchanged, rows keep the answers that do not depend on what is different"
        )
        raise UserError("\n  ".join([head, *listed]) + advice)
    flags = " ".join(f"--allow-change {key}" for key in refused)
    advice = (
        "\nGive another run_dir, or the settings of that run to continue it. To go on with other "
        f"mathematics on purpose, add {flags}"
    )
    idle = [name for name in allowed if not any(_is_in(key, name) for key in changes)]
    if idle:
        advice += f"\nNo setting of this name differs: {', '.join(idle)}"
    if LENGTH & refused.keys():
        advice += (
            "\nAnother end goes through by itself where no step depends on it (under "
            "optimizer.schedule: constant and optimizer.warmup_ratio: 0), and it is not before the "
            "newest checkpoint"
        )
    raise UserError("\n  ".join([head, *listed]) + advice)


def _is_in(key: str, section: str) -> bool:
    return f"{key}.".startswith(f"{section}.")


def _nothing_was_made(run_dir: Path) -> bool:
    """Tell whether every attempt ended without a step or a part; one may still be running."""
    from dist_sft import parts

    ended = all(read_outcome(run_dir, attempt) for attempt in attempts(run_dir))
    metrics = run_dir / "metrics.jsonl"
    took_steps = metrics.exists() and metrics.stat().st_size > 0
    made = took_steps or (run_dir / "checkpoints").exists() or parts.finished(run_dir)
    return ended and not made


def read_launch(run_dir: Path) -> Launch:
    """Read how the run was launched. Raises UserError where no launcher has written that."""
    path = run_dir / "launch.json"
    try:
        return Launch(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path} is missing: {run_dir} is no run folder, or not prepared by a launcher yet"
        ) from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}; launch or prepare the run again") from None


def attempts(run_dir: Path) -> list[int]:
    """List the attempts so far, in order."""
    names = (path.name for path in (run_dir / "logs").glob("attempt-*"))
    return sorted(int(n.removeprefix("attempt-")) for n in names if re.fullmatch(r"attempt-\d+", n))


def start_attempt(run_dir: Path) -> int:
    """Claim the next attempt by making its log folder.

    Raises UserError where another launcher claims the same one in this moment, or where the folder
    cannot be written.
    """
    number = max(attempts(run_dir), default=-1) + 1
    try:
        attempt_dir(run_dir, number).mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"{run_dir}: another launcher has just started attempt {number}") from None
    except OSError as error:
        raise UserError(f"{run_dir}/logs cannot be written: {error.strerror}") from None
    return number


def check_newest(run_dir: Path, attempt: int) -> None:
    """Raise SupersededError where a newer attempt than this one works on the run."""
    if max(attempts(run_dir), default=0) > attempt:
        raise SupersededError(f"a newer attempt works on {run_dir}; attempt {attempt} ends unsaved")


def attempt_dir(run_dir: Path, attempt: int) -> Path:
    """Return the folder of an attempt's logs and outcome."""
    return run_dir / "logs" / f"attempt-{attempt}"


def write_outcome(run_dir: Path, attempt: int, outcome: Outcome) -> None:
    """Record how the whole attempt ended; rank 0 does this last, or else the first node."""
    path = outcome_file(run_dir, attempt)
    content = {key: value for key, value in asdict(outcome).items() if value is not None}
    write_atomically(path, json.dumps(content) + "\n")


def outcome_file(run_dir: Path, attempt: int) -> Path:
    """Return where it is written how an attempt ended."""
    return attempt_dir(run_dir, attempt) / "outcome.json"


def write_failure(
    run_dir: Path, attempt: int, rank: int, outcome: Outcome, *, killed: bool = False
) -> None:
    """Record why one rank gave up, with the time, so that the first one can be named.

    Its node does so in its place for one that was `killed`.
    """
    content = asdict(outcome) | {"rank": rank, "time": time.time(), "killed": killed}
    write_atomically(_failure_file(run_dir, attempt, rank), json.dumps(content) + "\n")


def has_failed(run_dir: Path, attempt: int, rank: int) -> bool:
    """Tell whether a rank has recorded why it gave up."""
    return _failure_file(run_dir, attempt, rank).exists()


def _failure_file(run_dir: Path, attempt: int, rank: int) -> Path:
    return attempt_dir(run_dir, attempt) / f"failure-{rank}.json"


def read_outcome(run_dir: Path, attempt: int) -> Outcome | None:
    """Return how an attempt ended, or None while it runs or when nobody could say."""
    try:
        text = outcome_file(run_dir, attempt).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    return Outcome(**json.loads(text))


def first_failure(run_dir: Path, attempt: int) -> tuple[int, Outcome] | None:
    """Return the rank that gave up first and its reason."""
    reports = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in attempt_dir(run_dir, attempt).glob("failure-*.json")
    ]
    if not reports:
        return None
    # A mistake in the input, and a rank that was killed, outrank the network errors that other
    # ranks die of a moment later, by the clocks of their hosts perhaps earlier.
    first = min(
        reports,
        key=lambda report: (
            report["code"] != WRONG_INPUT,
            not report.get("killed"),
            report["time"],
        ),
    )
    return first["rank"], Outcome(first["code"], first["reason"], first["step"])


def is_finished(recipe: AnyRecipe) -> bool:
    """Tell whether the newest attempt reached the end, and no more than that is asked for now."""
    run_dir = Path(recipe.run_dir)
    newest = max(attempts(run_dir), default=-1)
    outcome = read_outcome(run_dir, newest)
    if outcome is None or outcome.code != FINISHED:
        return False
    if isinstance(recipe, GenerateRecipe):
        from dist_sft import output_file

        is_this_one = difference(read_config_json(run_dir), recipe).get("output.path") is None
        return is_this_one and output_file.is_whole(run_dir, Path(recipe.output.path))
    return not (is_longer(read_config_json(run_dir), recipe) or _end_moved_after(run_dir, newest))


def _end_moved_after(run_dir: Path, attempt: int) -> bool:
    """Tell whether a launcher moved the end, but has not started the attempt that goes there."""
    changes = run_dir / "changes.jsonl"
    for line in changes.read_text(encoding="utf-8").splitlines() if changes.exists() else ():
        with contextlib.suppress(ValueError):  # half a line, which a full disk may leave
            change = json.loads(line)
            if change["before_attempt"] > attempt and LENGTH & change.keys():
                return True
    return False


def code_revision() -> str:
    """Return the package's version and, in a checkout, the git commit with a mark if changed."""
    from dist_sft import __version__

    here = Path(__file__).parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__}+{done.stdout.strip()}"
