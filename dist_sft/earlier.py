"""Answers of earlier plans, found by what they depend on: for --reuse-unchanged."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = "reused"
"""In the run's folder: the parts of earlier plans, in numbered folders."""
KEY = np.dtype("S32")


class Earlier:
    """Find the output rows of a row by its key; 40 bytes of memory per row."""

    def __init__(self, run_dir: Path) -> None:
        """Read the keys of all parts of earlier plans."""
        self._parts = sorted((run_dir / FOLDER).glob("*/part-*"))
        keys: list[str] = []
        places: list[tuple[int, int]] = []
        for number, part in enumerate(self._parts):
            found = json.loads((part / "manifest.json").read_text(encoding="utf-8"))["keys"]
            keys += found
            places += [(number, place) for place in range(len(found))]
        self._keys = np.array(keys, KEY)
        self._places = np.array(places, np.int32).reshape(-1, 2)
        order = np.argsort(self._keys, kind="stable")
        self._keys, self._places = self._keys[order], self._places[order]

    def find(self, key: str, row: int) -> list[dict[str, Any]] | None:
        """Return the output rows of an earlier row with this key, a sample each; None for none.

        Where several rows asked the same: those of the same number, or else one by the number.
        """
        wanted = np.array(key, KEY)
        first, last = (int(np.searchsorted(self._keys, wanted, side)) for side in ("left", "right"))
        found = [self._read(*self._places[place].tolist()) for place in range(first, last)]
        sound = [lines for lines in found if lines]
        same = [lines for lines in sound if lines[0]["row"] == row]
        return (same or sound[row % len(sound) :])[0] if sound else None

    def _read(self, part: int, place: int) -> list[dict[str, Any]]:
        lines, samples = _lines(self._parts[part])
        return [json.loads(line) for line in lines[place * samples : (place + 1) * samples]]


@lru_cache(maxsize=64)
def _lines(part: Path) -> tuple[list[bytes], int]:
    """Return the lines of a part, and how many there are per row; none where it is damaged."""
    manifest = json.loads((part / "manifest.json").read_text(encoding="utf-8"))
    text = (part / "rows.jsonl").read_bytes()
    sound = hashlib.sha256(text).hexdigest() == manifest["sha256"]
    tally = manifest["tally"]
    return text.splitlines() if sound else [], tally["lines"] // tally["rows"]
