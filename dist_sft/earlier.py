"""Answers of earlier plans, found by what they depend on: for --reuse-unchanged.

RUN_DIR/reused/000/part-00000/    parts of a plan that was replaced, see `parts`
RUN_DIR/reused/keys.npy           the keys of all their rows, in order: S32 [rows]
RUN_DIR/reused/places.npy         where these are: (part, place in it), int32 [rows, 2]
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = "reused"


def index(run_dir: Path, say: Callable[[str], None]) -> None:
    """Write down where the answers of all earlier plans are, once per run; none: do nothing."""
    keys, places = [], []
    for number, part in enumerate(_parts(run_dir)):
        try:
            found = json.loads((part / "manifest.json").read_text(encoding="utf-8"))["keys"]
        except (OSError, ValueError, KeyError) as error:
            say(f"{part} cannot be read ({error}): its rows are answered again")
            continue
        keys.append(np.array(found, "S32"))
        places.append(np.stack([np.full(len(found), number), np.arange(len(found))], axis=1))
    if keys:
        order = np.argsort(np.concatenate(keys), kind="stable")
        _save(run_dir, "keys", np.concatenate(keys)[order])
        _save(run_dir, "places", np.concatenate(places).astype(np.int32)[order])


def _save(run_dir: Path, name: str, values: Any) -> None:
    temporary = run_dir / FOLDER / f".{name}.{os.getpid()}.npy"
    np.save(temporary, values)
    temporary.rename(run_dir / FOLDER / f"{name}.npy")


def _parts(run_dir: Path) -> list[Path]:
    return sorted((run_dir / FOLDER).glob("*/part-*"))


class Earlier:
    """Find the output rows of a row by its key, in an index that is mapped, not loaded."""

    def __init__(self, run_dir: Path) -> None:
        """Open the index, which must be there."""
        self._parts = _parts(run_dir)
        folder = run_dir / FOLDER
        self._keys = np.load(folder / "keys.npy", mmap_mode="r")
        self._places = np.load(folder / "places.npy", mmap_mode="r")

    def find(self, key: str) -> list[dict[str, Any]] | None:
        """Return the output rows of an earlier row with this key, a sample each; None for none."""
        wanted = np.array(key, "S32")
        first, last = (int(np.searchsorted(self._keys, wanted, side)) for side in ("left", "right"))
        for part, place in self._places[first:last].tolist():
            lines, samples = _lines(self._parts[part])
            rows = [json.loads(line) for line in lines[place * samples : (place + 1) * samples]]
            if rows and not any("error" in row for row in rows):
                return rows
        return None


@lru_cache(maxsize=64)
def _lines(part: Path) -> tuple[list[bytes], int]:
    """Return the lines of a part, and how many there are per row; none where it is damaged."""
    manifest = json.loads((part / "manifest.json").read_text(encoding="utf-8"))
    text = (part / "rows.jsonl").read_bytes()
    sound = hashlib.sha256(text).hexdigest() == manifest["sha256"]
    tally = manifest["tally"]
    return text.splitlines() if sound else [], tally["lines"] // tally["rows"]
