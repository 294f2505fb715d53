"""Where checkpoints are, what each says about itself, and whether it still is what was written.

`manifest.json` has the size and SHA-256 of every other file in the folder; `manifest.sha256` has
its own, as `sha256sum -c` reads it. Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from dist_sft.digests import sha256
from dist_sft.errors import UserError
from dist_sft.rollback import read_rollbacks
from dist_sft.runs import write_atomically

FORMAT = 2
NAME = "manifest.json"
CHECKSUM = "manifest.sha256"

Level = Literal["size", "sha256"]
T = TypeVar("T")

MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
ROTTEN = (errno.EIO, errno.EBADMSG, errno.EUCLEAN)
"""What file systems say of a block that is lost, and some of a server that does not answer."""
PAUSES = (0.5, 2.0)  # seconds before reading again what may come back
_FOLDER = re.compile(r"step-(\d{8})")


class DamagedCheckpoint(RuntimeError):
    """Report a checkpoint whose manifest is missing or is not what was written."""


class UnreadableCheckpoint(DamagedCheckpoint):
    """Report a checkpoint that cannot be read here and now."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"{error.filename}: {error.strerror}")
        self.kind: Kind = "lost" if error.errno in ROTTEN else "out of reach"


Kind = Literal["damaged", "lost", "out of reach"]
"""Another content than was written; a read error that may last; one that will pass."""


class Problem(NamedTuple):
    """What is wrong with a checkpoint."""

    text: str
    kind: Kind = "damaged"

    def __str__(self) -> str:
        return self.text


def folder_of(run_dir: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """Return the step of a finished checkpoint's folder, None for another name."""
    match = _FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else None


def folders(run_dir: Path) -> dict[int, Path]:
    """Return the folders of all finished checkpoints by step, oldest first.

    But for those that the run went back from: nothing goes on from them.
    """
    rollbacks = read_rollbacks(run_dir)
    return {
        step: path
        for step, path in every_folder(run_dir).items()
        if not any(rollback.spoils(step) for rollback in rollbacks)
    }


def every_folder(run_dir: Path) -> dict[int, Path]:
    """Return the folders of all finished checkpoints, those that nothing goes on from included."""
    found = {
        step: path
        for path in (run_dir / "checkpoints").glob("step-*")
        if (step := step_of(path)) is not None
    }
    return dict(sorted(found.items()))


def best(run_dir: Path) -> int | None:
    """Return the step with the lowest evaluation loss among the checkpoints that have one.

    Of several evaluation sets, the recipe's first counts. Damaged manifests are passed over.
    """
    losses: dict[int, float] = {}
    for step, folder in folders(run_dir).items():
        with contextlib.suppress(DamagedCheckpoint):
            evaluated = read(folder).get("eval_loss")
            first = next(iter(evaluated.values())) if evaluated else None
            if first is not None:  # it is where the loss was not finite
                losses[step] = first
    return min(losses, key=losses.__getitem__, default=None)


def refuse_untrusted(folder: Path) -> None:
    """Raise UserError for a checkpoint that somebody else may have changed."""
    doubt = untrusted(folder)
    if doubt:
        raise UserError(
            f"{doubt}: its owner could make this run load anything. If you trust them, launch "
            "with --trust-checkpoint"
        )


def untrusted(folder: Path) -> str | None:
    """Say why somebody else may have changed a checkpoint, or return None."""
    for path in (folder.parent, folder, *folder.rglob("*")):
        status = path.stat()
        if status.st_uid != os.getuid():
            return f"{path} belongs to another user ({status.st_uid})"
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return f"{path} may be written by others ({stat.filemode(status.st_mode)})"
    return None


def write(folder: Path, manifest: dict[str, Any], mode: int = 0o600) -> None:
    """Write the manifest and its checksum; every file that it names is on disk already."""
    text = json.dumps(manifest)
    digest = hashlib.sha256(text.encode()).hexdigest()
    for name, content in ((NAME, text), (CHECKSUM, f"{digest}  {NAME}\n")):
        write_atomically(folder / name, content)
        (folder / name).chmod(mode)


def read(folder: Path) -> dict[str, Any]:
    """Read a manifest that is what was written; raises DamagedCheckpoint."""
    try:
        text, expected = (_patiently((folder / x).read_bytes) for x in (NAME, CHECKSUM))
    except MISSING as error:
        raise DamagedCheckpoint(f"{error.filename}: {error.strerror}") from None
    except OSError as error:
        raise UnreadableCheckpoint(error) from None
    if f"{hashlib.sha256(text).hexdigest()}  {NAME}\n".encode() != expected:
        raise DamagedCheckpoint(f"{folder / NAME}: not what was written (see {CHECKSUM})")
    manifest: dict[str, Any] = json.loads(text)
    if manifest["format"] != FORMAT:
        raise UserError(
            f"{folder} has format {manifest['format']}, and this dist_sft reads {FORMAT}: install "
            "the version that wrote it"
        )
    if step_of(folder) not in (None, manifest["step"]):
        raise DamagedCheckpoint(f"{folder} is the checkpoint of step {manifest['step']}")
    for name in map(Path, manifest["files"]):
        if name.is_absolute() or ".." in name.parts:
            raise DamagedCheckpoint(f"{folder / NAME}: {name} is not within the folder")
    return manifest


def _patiently(read: Callable[[], T]) -> T:
    """Read again after a pause where a file system fails, as in passing a server's restart."""
    for seconds in PAUSES:
        try:
            return read()
        except MISSING:
            raise
        except OSError:
            time.sleep(seconds)
    return read()


def problems(
    folder: Path, manifest: dict[str, Any], names: Iterable[str], level: Level
) -> list[Problem]:
    """List what is wrong with these files of a checkpoint; sizes are looked at always."""
    found = []
    for name in names:
        path, entry = folder / name, manifest["files"][name]
        try:
            size = _patiently(path.stat).st_size
            if size != entry["size"]:
                found.append(Problem(f"{path}: {size} bytes, {entry['size']} were written"))
            elif level == "sha256" and _patiently(partial(sha256, path)) != entry["sha256"]:
                found.append(Problem(f"{path}: its content is not what was written (SHA-256)"))
        except MISSING as error:
            found.append(Problem(f"{path}: {error.strerror}"))
        except OSError as error:
            error.filename = path
            unreadable = UnreadableCheckpoint(error)
            found.append(Problem(str(unreadable), unreadable.kind))
    return found


def check(
    folder: Path, level: Level = "sha256", part: slice = slice(None)
) -> tuple[dict[str, Any], list[Problem]]:
    """Look at the files of a checkpoint; return its manifest, empty if unreadable, and problems.

    `part` of the files, in the order of their names, by default all.
    """
    try:
        content = read(folder)
    except UnreadableCheckpoint as error:
        return {}, [Problem(str(error), error.kind)]
    except DamagedCheckpoint as error:
        return {}, [Problem(str(error))]
    return content, problems(folder, content, sorted(content["files"])[part], level)


def newest_good(
    folders: Sequence[Path],
    look: Callable[[Path], Sequence[Problem]],
    say: Callable[[str], None],
    advice: str,
) -> tuple[Path | None, list[Path]]:
    """Return the newest checkpoint that is what was written, and damaged ones that are newer.

    `folders` are in the order of steps, `look` returns what is wrong with one. What is passed over
    is told. None where there are no checkpoints at all. Raises UserError, with `advice`, where
    there are some and none is good: another model would look like this one. Raises RuntimeError
    where one cannot be read, which may pass: going on from an older one would throw steps away.
    """
    damaged: list[Path] = []
    for folder in reversed(folders):
        step = step_of(folder)
        wrong = list(dict.fromkeys(look(folder)))
        if not wrong:
            return folder, damaged
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        out_of_reach = [problem for problem in wrong if problem.kind == "out of reach"]
        if out_of_reach:
            raise RuntimeError(
                f"the checkpoint of step {step} cannot be read: {out_of_reach[0]}{more}. Once it "
                f"can, the same command continues from it; without {folder}, from an older one"
            )
        if any(problem.kind == "damaged" for problem in wrong):
            damaged.append(folder)
        say(f"the checkpoint of step {step} is damaged and passed over: {wrong[0]}{more}")
    if folders:
        raise UserError(
            f"none of the {len(folders)} checkpoints in {folders[0].parent} is what was written, "
            f"see above. {advice}"
        )
    return None, []


def strangers(folder: Path, manifest: dict[str, Any]) -> list[Path]:
    """List files in a checkpoint's folder that its manifest does not name; nothing reads them."""
    known = {NAME, CHECKSUM, *manifest["files"]}
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).as_posix() not in known
    )
