"""The parts of a generation run: what is in which, who answers it, and what is finished.

A part is a fixed range of rows, a function of the input and the recipe alone, and answered as a
whole by one worker: that is why its bytes do not depend on how many workers there are.

    RUN_DIR/plan.json                 rows, rows per part, and what answers depend on
    RUN_DIR/parts/part-00000/         a finished part; others have a dot first
        rows.jsonl                    its output rows
        manifest.json                 their keys, counts and SHA-256
    RUN_DIR/weights/                  a checkpoint's weights, converted, until the run is finished
    RUN_DIR/logs/attempt-N/claims/    a file per part that a worker of this attempt has begun
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dist_sft import earlier, runs
from dist_sft.digests import HashingFile
from dist_sft.errors import UserError
from dist_sft.generate_recipe import GenerateRecipe
from dist_sft.once import sync

LARGEST = 256  # rows; more make a batch no fuller, and more is lost with a worker
SMALLEST = 64  # fewer leave places in a batch empty
SPREAD = 8  # parts that a small input is cut into, so that workers can share it
Step = Literal["newest", "best"] | int
NAME = re.compile(r"part-(\d+)")
FAILURES_LISTED = 20
WEIGHTS = "weights"
"""Folder in the run's: a checkpoint's weights, converted once for all workers."""


@dataclass(frozen=True)
class Plan:
    """What is to be done; `plan.json`."""

    rows: int
    part_rows: int
    samples: int
    """Answers per row."""
    facts: dict[str, str]
    """What answers depend on beside the recipe: input, model, template, what computes."""
    model: str = field(default="", compare=False)
    """The folder of the model, which of a training run is one checkpoint's."""

    @property
    def parts(self) -> int:
        """Return the number of parts."""
        return -(-self.rows // self.part_rows)

    def rows_of(self, part: int) -> range:
        """Return the numbers of a part's rows."""
        return range(part * self.part_rows, min(self.rows, (part + 1) * self.part_rows))

    @property
    def fingerprint(self) -> str:
        """Return what parts carry with them, so that none of another plan is taken for its own."""
        told = asdict(self) | {"model": None}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]

    def difference(self, other: Plan) -> list[str]:
        """Return a line for everything in which another plan differs from this one."""
        old, new = (
            asdict(plan)
            | plan.facts
            | {"facts": None, "model": f"{plan.model} ({plan.facts.get('model', '')[:12]})"}
            for plan in (self, other)
        )
        return [
            "settings of the recipe"
            if key == "settings"
            else f"{key}: {old.get(key, '(none)')} -> {new.get(key, '(none)')}"
            for key in dict.fromkeys((*old, *new))
            if old.get(key) != new.get(key)
        ]


def choose_part_rows(setting: int | str, rows: int) -> int:
    """Resolve `generate.part_rows`, from the number of rows alone."""
    if isinstance(setting, int):
        return setting
    return min(LARGEST, max(SMALLEST, -(-rows // SPREAD)))


def read_plan(run_dir: Path) -> Plan | None:
    """Return the plan of a run, or None before there is one."""
    path = run_dir / "plan.json"
    try:
        return Plan(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged; give another run_dir") from None


def write_plan(run_dir: Path, plan: Plan) -> None:
    """Write plan.json."""
    runs.write_atomically(run_dir / "plan.json", json.dumps(asdict(plan), indent=1) + "\n")


def pinned(run_dir: Path, recipe: GenerateRecipe, *, reuse: bool) -> tuple[str, Step]:
    """Return where the model is, and which step of it.

    A run goes on with the checkpoint that it began with, although training has made newer ones, for
    as long as that is there; with `reuse`, it takes what the recipe says now.
    """
    plan, model = read_plan(run_dir), recipe.model
    if plan is None or not plan.model or reuse:
        return model.path, model.step
    began_with = Path(plan.model)
    of_that_run = Path(model.path).resolve() in began_with.resolve().parents
    if not (of_that_run and began_with.exists()):
        return model.path, model.step
    return str(began_with), "newest"


def adopt(run_dir: Path, plan: Plan, *, reuse: bool, say: Callable[[str], None]) -> None:
    """Make this the run's plan.

    Parts of another one are kept aside for `reuse`. Raises UserError without it, as answers of two
    plans must not be mixed.
    """
    old = read_plan(run_dir)
    if old is not None and old != plan:
        changes = "\n  ".join(old.difference(plan))
        if finished(run_dir) and not reuse:
            raise UserError(
                f"run_dir: {run_dir} has answers that were made from something else (that -> this):"
                f"\n  {changes}\nGive another run_dir and output.path, or go on with "
                "--reuse-unchanged: then rows keep the answers that do not depend on what is "
                "different"
            )
        if finished(run_dir):
            say(f"rows keep their answers where these do not depend on:\n  {changes}")
            aside = run_dir / earlier.FOLDER
            aside.mkdir(exist_ok=True)
            number = sum(path.name.isdecimal() for path in aside.iterdir())
            (run_dir / "parts").rename(aside / f"{number:03d}")
    if reuse:
        earlier.index(run_dir, say)
    if old != plan:
        (run_dir / "summary.json").unlink(missing_ok=True)
        write_plan(run_dir, plan)
    (run_dir / "parts").mkdir(exist_ok=True)


def remove_leftovers(run_dir: Path, attempt: int) -> None:
    """Remove what killed workers of older attempts left half-written."""
    for path in (run_dir / "parts").glob(".part-*.tmp"):
        if int(path.name.split(".")[2]) < attempt:
            shutil.rmtree(path, ignore_errors=True)


# ---- who answers what --------------------------------------------------------------------------


def finished(run_dir: Path) -> set[int]:
    """Return the numbers of the parts that are finished."""
    try:
        names = os.listdir(run_dir / "parts")
    except FileNotFoundError:
        return set()
    return {int(found[1]) for name in names if (found := NAME.fullmatch(name))}


def folder_of(run_dir: Path, part: int) -> Path:
    """Return the final name of a part."""
    return run_dir / "parts" / f"part-{part:05d}"


class Claims:
    """Who has begun a part in this attempt: a file per part, that one worker can make."""

    def __init__(self, run_dir: Path, attempt: int) -> None:
        self._folder = runs.attempt_dir(run_dir, attempt) / "claims"
        self._folder.mkdir(exist_ok=True)

    def there(self) -> set[int]:
        """Return the parts that workers have begun."""
        return {int(name) for name in os.listdir(self._folder)}

    def make(self, part: int) -> bool:
        """Begin a part; tell whether no other worker has."""
        path = self._folder / f"{part:05d}"
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            return False
        return True


def in_order(worker: int, workers: int, parts: int) -> Iterator[int]:
    """Yield all parts as a worker would take them: its own share, then the ends of the others'."""
    shares = [range(parts * w // workers, parts * (w + 1) // workers) for w in range(workers)]
    yield from shares[worker]
    for other in range(1, workers):
        yield from reversed(shares[(worker + other) % workers])


# ---- a finished part ---------------------------------------------------------------------------


@dataclass
class Tally:
    """What became of rows, and how much was generated."""

    rows: int = 0
    lines: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prompts_truncated: int = 0
    out_of_memory: int = 0
    """Batches that were split as they did not fit: where bytes may differ between runs."""
    reused: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Output rows by finish_reason."""
    errors: Counter[str] = field(default_factory=Counter)
    """Rows that could not be answered, by what was wrong with them."""
    failures: list[tuple[int, str]] = field(default_factory=list)
    """The first few of them, with the words of their error."""

    def add(self, other: Tally) -> None:
        """Count the rows of another part, too."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        del self.failures[FAILURES_LISTED:]

    def to_json(self) -> str:
        """Return the content of `summary.json`."""
        return json.dumps(vars(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, content: dict[str, Any]) -> Tally:
        """Read what `asdict` gave and JSON has carried."""
        told = {key: Counter(content[key]) for key in ("reasons", "errors")}
        failures = [(row, why) for row, why in content["failures"]]
        return cls(**{**content, **told, "failures": failures})


class DamagedPart(RuntimeError):
    """Report a part that is not what was written, or of another plan."""

    def __init__(self, part: int, problem: str) -> None:
        super().__init__(f"part {part}: {problem}")
        self.part = part


def commit(
    run_dir: Path, attempt: int, plan: Plan, part: int, lines: bytes, keys: list[str], tally: Tally
) -> bool:
    """Write a part and give it its name; False where another worker was faster.

    Raises SupersededError where a newer attempt works on the run.
    """
    final = folder_of(run_dir, part)
    making = final.with_name(f".{final.name}.{attempt}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    making.mkdir(parents=True)
    try:
        with open(making / "rows.jsonl", "wb") as stream:
            file = HashingFile(stream)
            file.write(lines)
            size, digest = file.finish()
        manifest = {
            "plan": plan.fingerprint,
            "part": part,
            "size": size,
            "sha256": digest,
            "tally": vars(tally),
            "keys": keys,
        }
        runs.write_atomically(making / "manifest.json", json.dumps(manifest) + "\n")
        sync(making)
        runs.check_newest(run_dir, attempt)
        try:
            making.rename(final)
        except OSError:
            if not final.exists():
                raise
            return False
        sync(final.parent)
        return True
    finally:
        shutil.rmtree(making, ignore_errors=True)


def read_part(run_dir: Path, plan: Plan, part: int) -> tuple[bytes, Tally]:
    """Return a part's rows, which are what was written; raises DamagedPart where they are not."""
    folder = folder_of(run_dir, part)
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        lines = (folder / "rows.jsonl").read_bytes()
        tally = Tally.read(manifest["tally"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedPart(part, f"cannot be read ({error})") from None
    if manifest["plan"] != plan.fingerprint or manifest["part"] != part:
        raise DamagedPart(part, "belongs to another plan")
    if hashlib.sha256(lines).hexdigest() != manifest["sha256"]:
        raise DamagedPart(part, "its rows are not those that were written")
    expected = len(plan.rows_of(part))
    if (tally.rows, tally.lines) != (expected, expected * plan.samples):
        raise DamagedPart(part, f"has {tally.lines} lines of {expected} rows")
    if lines.count(b"\n") != tally.lines:
        raise DamagedPart(part, "has other lines than its manifest says")
    return lines, tally


def set_aside(run_dir: Path, part: int) -> None:
    """Take its name from a damaged part, so that it is answered again."""
    folder = folder_of(run_dir, part)
    folder.rename(folder.with_name(f".{folder.name}.damaged-{os.urandom(4).hex()}"))


def clean_up(run_dir: Path) -> None:
    """Remove what a finished run needs no more; call it when all workers have ended."""
    shutil.rmtree(run_dir / WEIGHTS, ignore_errors=True)
