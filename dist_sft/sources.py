"""Rows from JSON, JSONL, CSV, Parquet, a saved Dataset folder or a hub name, in bounded memory.

`open_source` finds out what a path is; `Source.batches` reads it. A single broken row comes out as
a `BadRow`, so that the caller can apply its own rule to it; a source that cannot be read at all
is a `UserError`.
"""

import codecs
import csv
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dist_sft.digests import sha256
from dist_sft.errors import UserError
from dist_sft.json_array import json_problem, not_utf8, read_json_array
from dist_sft.paths import FILE_TYPES, is_local, near_matches
from dist_sft.row_fields import BadRow

if TYPE_CHECKING:
    import datasets

# A CSV without one of these in its first line has no header, whatever that line says.
CSV_COLUMNS = ("instruction", "prompt", "messages", "conversations")
MAX_CSV_CELL_CHARS = 1 << 26
BOM = codecs.BOM_UTF8


Row = dict[str, Any] | BadRow


class Batch(NamedTuple):
    """Hold consecutive rows; `first_row` is the number of the first one in its source, from 0."""

    first_row: int
    rows: list[Row]


@dataclass(frozen=True)
class Source:
    """Name one readable source; made by `open_source`."""

    path: str
    key: str
    """The recipe's dotted path of this source, for error messages: `data.train.0`."""
    files: tuple[Path, ...]
    """The local files that hold the rows; empty for a hub name."""
    fingerprint: str
    """What names the content where there are no files to hash."""
    read: Callable[[], Iterator[Row]]

    def batches(self, num_rows: int) -> Iterator[Batch]:
        """Yield the rows in order, `num_rows` at a time; only one batch is in memory.

        Raises UserError where the source is unreadable or holds no rows.
        """
        rows = self.read()
        for first_row in itertools.count(0, num_rows):
            batch = list(itertools.islice(rows, num_rows))
            if not batch:
                break
            yield Batch(first_row, batch)
        if first_row == 0:
            raise UserError(f"{self.key}.path={self.path}: the file is empty, it holds no rows")

    def stamps(self) -> tuple[tuple[int, int], ...]:
        """Return size and time of each file: they tell whether one changed while being read."""
        states = [file.stat() for file in self.files]
        return tuple((state.st_size, state.st_mtime_ns) for state in states)


def open_source(path: str, *, split: str = "train", key: str = "data.train.0") -> Source:
    """Find out what `path` is and return it ready to be read.

    `split` chooses in a saved DatasetDict or a hub data set; `key` is the recipe's dotted path of
    this source. Raises UserError for a path that is neither a readable file of a known type, nor a
    saved Dataset, nor a data set that the hub or its cache has.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        return _saved_folder(file, split, key)
    if file.is_file():
        return _plain_file(file, split, key)
    if is_local(path):
        raise UserError(f"{key}.path={path}: no such file{near_matches(path)}")
    return _hub_dataset(path, split, key)


def content_hash(source: Source, digest: Callable[[Path], str] = sha256) -> str:
    """Return a sha256 over the files' bytes, or over the hub's fingerprint.

    `digest` gives the one of a single file, for callers that know a faster way than reading it.
    """
    if not source.files:
        return hashlib.sha256(source.fingerprint.encode()).hexdigest()
    digests = " ".join(digest(file) for file in source.files)
    return hashlib.sha256(digests.encode()).hexdigest()


# ---- what a path is --------------------------------------------------------------------------


def _plain_file(file: Path, split: str, key: str) -> Source:
    readers = {".json": _json, ".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise UserError(
            f"{key}.path={file}: files of type {file.suffix or '(none)'} cannot be read; allowed: "
            f"{', '.join(FILE_TYPES)}, a folder written by Dataset.save_to_disk, or a hub name"
        )
    if split != "train":
        raise UserError(
            f"{key}.split={split}: {file} is a plain file and has no splits; remove {key}.split"
        )
    blame = f"{key}.path={file}"
    return Source(str(file), key, (file,), "", lambda: reader(file, blame))


def _saved_folder(folder: Path, split: str, key: str) -> Source:
    if not (folder / "state.json").is_file() and not (folder / "dataset_dict.json").is_file():
        raise UserError(
            f"{key}.path={folder}: a folder, but not one written by Dataset.save_to_disk (it has "
            f"neither state.json nor dataset_dict.json); to read a file in it, give the file's path"
        )
    import datasets
    import pyarrow

    try:
        saved = datasets.load_from_disk(str(folder))  # raises IndexError for one without rows
    except (OSError, ValueError, LookupError, pyarrow.ArrowInvalid) as error:
        raise UserError(
            f"{key}.path={folder}: the saved Dataset cannot be read: {_first_line(error)}"
        ) from error
    # A folder with one data set needs no split, but a split that contradicts it is a mistake.
    if isinstance(saved, datasets.DatasetDict):
        splits = {str(name): part for name, part in saved.items()}
    else:
        splits = {"train": saved, str(saved.split or "train"): saved}
    if split not in splits:
        raise UserError(
            f"{key}.split={split}: {folder} has no such split; available: {', '.join(splits)}"
        )
    dataset = splits[split]
    files = tuple(Path(entry["filename"]) for entry in dataset.cache_files)
    return Source(str(folder), key, files, "", lambda: _dataset_rows(dataset))


def _hub_dataset(name: str, split: str, key: str) -> Source:
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=split)
    except ValueError as error:  # an unknown split, or a configuration that has to be chosen
        raise UserError(f"{key}.split={split}: {name} on the hub: {_first_line(error)}") from error
    except OSError as error:  # what ConnectionError and DatasetNotFoundError have in common
        raise UserError(
            f"{key}.path={name}: neither a local file or folder{near_matches(name)} nor a "
            f"data set that the hub or its local cache has ({_first_line(error)}). On a node "
            f"without a network give a local copy: {key}.path=/path/to/file.jsonl"
        ) from error
    return Source(name, key, (), dataset._fingerprint, lambda: _dataset_rows(dataset))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- readers: one generator of rows per kind of file -----------------------------------------


def _json(file: Path, blame: str) -> Iterator[Row]:
    """Read one array of objects; a file that holds one object per line is read as JSON lines."""
    with file.open("rb") as stream:
        start = stream.read(4096).removeprefix(BOM).lstrip()
    if start[:1] == b"{":
        yield from _json_lines(file, blame)
        return
    for line, value in read_json_array(file, blame):
        yield value if isinstance(value, dict) else _not_an_object(line, value)


def _json_lines(file: Path, blame: str) -> Iterator[Row]:
    for line, offset, raw in _raw_lines(file):
        if line == 1 and raw.lstrip()[:1] == b"[":
            raise UserError(
                f"{blame}: line 1 starts a JSON array, but a .jsonl file holds one object per "
                f"line; rename it to .json"
            )
        if not raw.strip():
            continue
        try:
            value = json.loads(raw.decode())
        except UnicodeDecodeError as error:
            yield BadRow("not_utf8", not_utf8(line, offset + error.start))
        except (ValueError, RecursionError) as error:
            column = error.colno if isinstance(error, json.JSONDecodeError) else 1
            yield BadRow("broken_json", json_problem(error, line, column))
        else:
            yield value if isinstance(value, dict) else _not_an_object(line, value)


def _csv(file: Path, blame: str) -> Iterator[Row]:
    # The module's limit of 131,072 characters is shorter than some answers; but without any limit a
    # quote that never closes would pull the whole file into one cell.
    csv.field_size_limit(MAX_CSV_CELL_CHARS)
    cells = csv.reader(_text_lines(file, blame), strict=True)
    header: list[str] = []
    line = 1
    try:
        for row in cells:
            if not row:
                pass
            elif not header:
                _check_header(row, blame)
                header = row
            elif len(row) == len(header):
                yield dict(zip(header, row, strict=True))
            else:
                yield BadRow(
                    "uneven_columns",
                    f"line {line}: {len(row)} columns, but the header has {len(header)}",
                )
            line = cells.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{blame}: broken CSV in the row that starts at line {line}: {error}"
        ) from error


def _check_header(header: list[str], blame: str) -> None:
    if not set(header) & set(CSV_COLUMNS) or len(set(header)) != len(header):
        shown = ", ".join(repr(cell[:40]) for cell in header[:6])
        raise UserError(
            f"{blame}: line 1 is not a header: {shown}; it must name the columns, comma-separated "
            f"and each once, with one of {', '.join(CSV_COLUMNS)} among them"
        )


def _parquet(file: Path, blame: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{blame}: not a readable Parquet file: {_first_line(error)}") from error


def _dataset_rows(dataset: "datasets.Dataset") -> Iterator[Row]:
    for columns in dataset.iter(batch_size=1024):
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


def _raw_lines(file: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield (line from 1, byte offset of its start, bytes), without a byte order mark."""
    with file.open("rb") as stream:
        offset = 0
        for line, raw in enumerate(stream, start=1):
            text = raw.removeprefix(BOM) if line == 1 else raw
            yield line, offset + len(raw) - len(text), text
            offset += len(raw)


def _text_lines(file: Path, blame: str) -> Iterator[str]:
    for line, offset, raw in _raw_lines(file):
        try:
            yield raw.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{blame}: {not_utf8(line, offset + error.start)}") from error


def _not_an_object(line: int, value: object) -> BadRow:
    kinds = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    found = kinds.get(type(value), "a number")
    return BadRow("not_an_object", f"line {line}: a row must be an object {{...}}, not {found}")
