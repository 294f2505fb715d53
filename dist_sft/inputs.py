"""The rows to answer, by their number: read once per node into a memory-mapped index.

An index is a folder, whole as soon as it has its final name, that is named by what it holds:

    rows.jsonl         a JSON object per row; a row that is broken is [reason, message] instead
    offsets.i64        row i is the bytes offsets[i] : offsets[i + 1]
    occurrences.u32    how many rows before this one are the same
    meta.json          rows of each source, and the sizes of the files
"""

from __future__ import annotations

import datetime
import decimal
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dist_sft.digests import remembered_sha256
from dist_sft.errors import UserError
from dist_sft.once import DamagedError, make_once, sync
from dist_sft.row_fields import BadRow
from dist_sft.sections import RowSource
from dist_sft.sources import Source, content_hash, open_source

FORMAT = 1
BATCH_ROWS = 1024


class Inputs:
    """Read rows of an index by their numbers, which run through all sources from 0."""

    def __init__(self, folder: Path) -> None:
        """Open a finished index; raises DamagedError where it is not whole."""
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            sizes = {name: (folder / name).stat().st_size for name in meta["sizes"]}
        except (OSError, ValueError, KeyError) as error:
            raise DamagedError(f"{folder} is missing or damaged: {error}") from None
        if sizes != meta["sizes"]:
            raise DamagedError(f"{folder}: the files have other sizes than were written")
        self._starts = [0, *accumulate(meta["rows"])]
        self._offsets = np.asarray(np.memmap(folder / "offsets.i64", "<i8", "r"))
        self.occurrences = np.asarray(np.memmap(folder / "occurrences.u32", "<u4", "r"))
        """How many rows before each are the same: uint32 [rows]."""
        self._text = np.asarray(np.memmap(folder / "rows.jsonl", "u1", "r"))

    def __len__(self) -> int:
        return int(self._offsets.shape[0]) - 1

    def read(self, rows: range) -> list[dict[str, Any] | BadRow]:
        """Return consecutive rows; one that could not be read comes as the BadRow that it is."""
        offsets = self._offsets[rows.start : rows.stop + 1].tolist()
        text = self._text[offsets[0] : offsets[-1]].tobytes()
        values = [json.loads(text[a - offsets[0] : b - offsets[0]]) for a, b in pairwise(offsets)]
        return [BadRow(*value) if isinstance(value, list) else value for value in values]

    def first_of(self, source: int, rows: int) -> range:
        """Return the numbers of the first so many rows of a source."""
        start, end = self._starts[source : source + 2]
        return range(start, min(end, start + rows))

    def source_of(self, row: int) -> int:
        """Return the number of the source that a row comes from."""
        return int(np.searchsorted(self._starts, row, side="right")) - 1


class Indexed(NamedTuple):
    """An index, and what it was made from."""

    folder: Path
    fingerprints: dict[str, str]
    """See `fingerprints`."""


def fingerprints(sources: Sequence[RowSource], cache_dir: Path) -> dict[str, str]:
    """Return what names the content of each source, under its dotted path in the recipe.

    Needs no torch. A file that did not change is not read again. Raises UserError where there is
    no such source.
    """
    return _fingerprints(sources, _open(sources), cache_dir)


def _fingerprints(
    given: Sequence[RowSource], sources: Sequence[Source], cache_dir: Path
) -> dict[str, str]:
    digest = partial(remembered_sha256, folder=cache_dir / "digests")
    return {
        source.key: f"{one.path} {one.split} {content_hash(source, digest)[:32]}"
        for one, source in zip(given, sources, strict=True)
    }


def index(
    given: Sequence[RowSource],
    cache_dir: Path,
    reserved: Iterable[str] = (),
    say: Callable[[str], None] = print,
) -> Indexed:
    """Return the index of these sources; read them where there is none yet.

    Call it once per node. Raises UserError for a source that cannot be read or holds no rows, and
    for a row that has one of the `reserved` columns.
    """
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cache_dir={cache_dir}: not a folder to write to: {error}") from error
    sources = _open(given)
    stamps = [source.stamps() for source in sources]  # before anything is read, hashing included
    found = _fingerprints(given, sources, cache_dir)
    contents = [name.split()[-2:] for name in found.values()]
    named = hashlib.sha256(json.dumps([FORMAT, sorted(reserved), contents]).encode())
    folder = cache_dir / f"input-{named.hexdigest()[:32]}"

    def make(making: Path) -> None:
        _write(making, sources, frozenset(reserved))
        for source, before in zip(sources, stamps, strict=True):
            if source.stamps() != before:
                raise UserError(
                    f"{source.key}.path={source.path}: changed while it was being read; start "
                    "again when nothing writes to it"
                )

    make_once(folder, make=make, load=lambda: Inputs(folder), what="the indexed input", say=say)
    return Indexed(folder, found)


def _open(sources: Sequence[RowSource]) -> list[Source]:
    return [
        open_source(source.path, split=source.split, key=f"input.{number}")
        for number, source in enumerate(sources)
    ]


def _write(folder: Path, sources: Sequence[Source], reserved: frozenset[str]) -> None:
    counts: list[int] = []
    names: list[npt.NDArray[np.uint64]] = []
    end = 0
    with open(folder / "rows.jsonl", "wb") as text, open(folder / "offsets.i64", "wb") as ends:
        ends.write(np.zeros(1, "<i8").tobytes())
        for source in sources:
            counts.append(0)
            for batch in source.batches(BATCH_ROWS):
                lines = [_line(row, reserved, source.key) for row in batch.rows]
                text.writelines(lines)
                lengths = np.fromiter(map(len, lines), "<i8", len(lines))
                ends.write((end + np.cumsum(lengths)).astype("<i8").tobytes())
                end += int(lengths.sum())
                counts[-1] += len(lines)
                digests = b"".join(hashlib.blake2b(line, digest_size=8).digest() for line in lines)
                names.append(np.frombuffer(digests, "<u8"))
    _occurrences(np.concatenate(names)).tofile(folder / "occurrences.u32")
    files = ("rows.jsonl", "offsets.i64", "occurrences.u32")
    for name in files:
        sync(folder / name)
    meta = {"rows": counts, "sizes": {name: (folder / name).stat().st_size for name in files}}
    (folder / "meta.json").write_text(json.dumps(meta) + "\n", encoding="utf-8")


def _occurrences(names: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    """Return for each name how many equal ones stand before it: uint32 [rows]."""
    order = np.argsort(names, kind="stable")
    ordered = names[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    run_starts = np.repeat(starts, np.diff(np.r_[starts, len(names)]))
    counts = np.empty(len(names), "<u4")
    counts[order] = np.arange(len(names)) - run_starts
    return counts


def _line(row: dict[str, Any] | BadRow, reserved: frozenset[str], key: str) -> bytes:
    if isinstance(row, BadRow):
        return to_json([row.reason, str(row)])
    taken = reserved.intersection(row)
    if taken:
        raise UserError(
            f"{key}: rows have the column {sorted(taken)[0]!r}, which the output needs for itself "
            f"(it adds {', '.join(sorted(reserved))}); rename it in the input"
        )
    return to_json(row)


def to_json(value: Any) -> bytes:
    """Return a value as a line of JSON in UTF-8.

    What JSON does not have becomes what it has: dates and decimals text, bytes text by their
    hexadecimal digits, numbers that are not finite null.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False, default=_plain)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can hold
        return json.dumps(json.loads(text)).encode() + b"\n"


def _plain(value: object) -> object:
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, datetime.timedelta | decimal.Decimal):
        return str(value)
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
