"""Where checkpoints are, what each says about itself, and whether it still is what was written.

`manifest.json` has the size and SHA-256 of every other file in the folder; `manifest.sha256` has
its own, as `sha256sum -c` reads it. Imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from dist_sft.digests import sha256
from dist_sft.runs import write_atomically

FORMAT = 2
NAME = "manifest.json"
CHECKSUM = "manifest.sha256"

Level = Literal["size", "sha256"]


_FOLDER = re.compile(r"step-(\d{8})")


class DamagedCheckpoint(RuntimeError):
    """Report a checkpoint whose manifest is missing or is not what was written."""


def folder_of(run_dir: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def folders(run_dir: Path) -> dict[int, Path]:
    """Return the folders of all finished checkpoints by step, oldest first."""
    found = {
        int(match[1]): path
        for path in (run_dir / "checkpoints").glob("step-*")
        if (match := _FOLDER.fullmatch(path.name))
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


def untrusted(folder: Path) -> str | None:
    """Say why somebody else may have changed a checkpoint, or return None."""
    for path in (folder, *folder.rglob("*")):
        status = path.stat()
        if status.st_uid != os.getuid():
            return f"{path} belongs to another user ({status.st_uid})"
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return f"{path} may be written by others ({stat.filemode(status.st_mode)})"
    return None


def write(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest and its checksum; every file that it names is on disk already."""
    text = json.dumps(manifest)
    write_atomically(folder / NAME, text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_atomically(folder / CHECKSUM, f"{digest}  {NAME}\n")


def read(folder: Path) -> dict[str, Any]:
    """Read a manifest that is what was written; raises DamagedCheckpoint."""
    try:
        text = (folder / NAME).read_bytes()
        expected = (folder / CHECKSUM).read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(f"{error.filename}: {error.strerror}") from None
    if f"{hashlib.sha256(text).hexdigest()}  {NAME}\n".encode() != expected:
        raise DamagedCheckpoint(f"{folder / NAME}: not what was written (see {CHECKSUM})")
    manifest: dict[str, Any] = json.loads(text)
    for name in map(Path, manifest["files"]):
        if name.is_absolute() or ".." in name.parts:
            raise DamagedCheckpoint(f"{folder / NAME}: {name} is not within the folder")
    if manifest["format"] != FORMAT:
        raise DamagedCheckpoint(
            f"{folder}: format {manifest['format']}; this dist_sft reads {FORMAT}"
        )
    return manifest


def problems(
    folder: Path, manifest: dict[str, Any], names: Iterable[str], level: Level
) -> list[str]:
    """List what is wrong with these files of a checkpoint; sizes are looked at always."""
    found = []
    for name in names:
        path, entry = folder / name, manifest["files"][name]
        try:
            size = path.stat().st_size
            if size != entry["size"]:
                found.append(f"{path}: {size} bytes, {entry['size']} were written")
            elif level == "sha256" and sha256(path) != entry["sha256"]:
                found.append(f"{path}: its content is not what was written (SHA-256)")
        except OSError as error:
            found.append(f"{path}: {error.strerror}")
    return found


def check(folder: Path, level: Level) -> tuple[dict[str, Any], list[str]]:
    """Look at all files of a checkpoint; return its manifest, empty if unreadable, and problems."""
    try:
        content = read(folder)
    except DamagedCheckpoint as error:
        return {}, [str(error)]
    return content, problems(folder, content, content["files"], level)


def check_all(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Read every byte of a checkpoint, as `check` does."""
    return check(folder, "sha256")
