"""The file that a generation run makes at output.path: which one is its own, and how it gets there.

`RUN_DIR/output.json` says which files the run has made: the one that is there and, from before it
gets its name, the next one; [{size, sha256}].
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from dist_sft import runs
from dist_sft.digests import sha256
from dist_sft.errors import UserError
from dist_sft.once import sync

FILE = "output.json"


def tell(run_dir: Path, files: list[dict[str, Any]]) -> None:
    """Write down which files are this run's."""
    runs.write_atomically(run_dir / FILE, json.dumps(files) + "\n")


def give_name(run_dir: Path, temporary: Path, output: Path) -> None:
    """Rename, unless a file has appeared there meanwhile that this run did not make."""
    if made(run_dir, output):
        temporary.rename(output)
    else:
        try:
            os.link(temporary, output)  # which replaces nothing
        except FileExistsError:
            made(run_dir, output)
        except OSError:  # a file system without hard links
            temporary.rename(output)
    sync(output.absolute().parent)


def is_whole(run_dir: Path, output: Path) -> bool:
    """Tell whether the output is the file that this run has made last."""
    with contextlib.suppress(UserError, OSError):
        return made(run_dir, output) == _told(run_dir)[-1:] != []
    return False


def made(run_dir: Path, output: Path) -> list[dict[str, Any]]:
    """Return what is known of the file that is there, in a list; none where there is no file.

    Raises UserError where the output cannot be there, or is a file that this run did not make.
    """
    if output.is_dir():
        raise UserError(f"output.path={output}: this is a folder; give the name of a file in it")
    if not output.exists():
        return []
    size = output.stat().st_size
    same = [one for one in _told(run_dir) if one["size"] == size]
    found = sha256(output) if same else None
    known = [one for one in same if one["sha256"] == found]
    if not known:
        raise UserError(
            f"output.path={output}: there is a file that this run did not make; remove it, or give "
            "another path"
        )
    return known[:1]


def _told(run_dir: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads((run_dir / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return []
