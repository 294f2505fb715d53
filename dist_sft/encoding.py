"""Encode a source into a store: once, by one process, under a name that follows the content."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from dist_sft.chat import BadRow, Dropped, Encoder, Outcome, Sample
from dist_sft.digests import HashingFile, remembered_sha256
from dist_sft.errors import UserError
from dist_sft.once import make_once
from dist_sft.sources import Batch, Source, content_hash
from dist_sft.store import (
    COLUMNS,
    FORMAT_VERSION,
    LEARNED_BIT,
    BadRows,
    Int64Array,
    Store,
    StoreFile,
    StoreMeta,
)

BATCH_ROWS = 1024
NUM_BAD_ROWS_LISTED = 5

OnBadRow = Literal["error", "skip"]
UInt32Array = npt.NDArray[np.uint32]


def build_or_open(
    source: Source,
    encoder: Encoder,
    cache_dir: Path,
    *,
    name: str,
    row_format: str = "auto",
    on_bad_row: OnBadRow = "error",
    progress: Callable[[int], None] = lambda rows: None,
    say: Callable[[str], None] = print,
) -> Store:
    """Return the store of `source`, encoding it first where `cache_dir` has no undamaged one.

    Processes that ask for the same store at the same time wait on a lock file until the first has
    built it; call this outside of any collective. What did not change since it was last read
    through, source or store, is not read again: `remembered_sha256` says what goes unnoticed.
    `name` is the source's name in messages and metrics, `progress` gets the number of rows read so
    far, `say` a line for a person.

    Raises UserError for an unreadable source, for a broken row with `on_bad_row="error"`, and where
    no row is left; then nothing is left behind.
    """
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.cache_dir={cache_dir}: not a folder to write to: {error}") from error
    digest = partial(remembered_sha256, folder=cache_dir / "digests")
    stamps = source.stamps()
    settings = (content_hash(source, digest), encoder.fingerprint, row_format, on_bad_row)
    identity = json.dumps([FORMAT_VERSION, *settings])
    path = cache_dir / hashlib.sha256(identity.encode()).hexdigest()[:32]

    def build(folder: Path) -> None:
        tally, files = _encode(source, encoder, folder, row_format, on_bad_row, progress)
        if source.stamps() != stamps:
            raise UserError(
                f"{_blame(source)}: changed while it was being read; start again "
                f"when nothing writes to it"
            )
        _meta(settings, tally, files, folder).write(folder)

    return make_once(
        path,
        make=build,
        load=lambda: Store.open(path, name=name, digest=digest),
        what=f"{name}: the encoded data",
        say=say,
    )


# ---- rows -> columns -------------------------------------------------------------------------


@dataclass
class _Tally:
    """Count what became of the rows."""

    rows: int = 0
    samples: int = 0
    truncated: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    first_bad: dict[str, list[tuple[int, str]]] = field(default_factory=dict)

    def count_bad(self, row: int, problem: BadRow) -> None:
        self.bad[problem.reason] += 1
        listed = self.first_bad.setdefault(problem.reason, [])
        if len(listed) < NUM_BAD_ROWS_LISTED:
            listed.append((row, str(problem)))

    def __str__(self) -> str:
        parts = [f"{self.rows} rows read"]
        parts += [f"{count} dropped ({reason})" for reason, count in self.dropped.items()]
        for reason, count in self.bad.items():
            row, message = self.first_bad[reason][0]
            parts.append(f"{count} broken ({reason}; row {row}: {message})")
        return ", ".join(parts)


def _encode(
    source: Source,
    encoder: Encoder,
    folder: Path,
    row_format: str,
    on_bad_row: OnBadRow,
    progress: Callable[[int], None],
) -> tuple[_Tally, dict[str, StoreFile]]:
    """Write the columns into `folder`, a batch of rows at a time; return counts and checksums."""
    tally = _Tally()
    with ExitStack() as stack:
        columns = {
            name: _Column(stack.enter_context((folder / name).open("wb")), dtype)
            for name, dtype in COLUMNS.items()
        }
        columns["offsets.i64"].append([0])
        for batch in source.batches(BATCH_ROWS):
            samples: list[Sample] = []
            row_numbers = []
            for row, outcome in _outcomes(source, batch, encoder, row_format):
                if isinstance(outcome, BadRow):
                    if on_bad_row == "error":
                        raise _refusal(source, row, outcome)
                    tally.count_bad(row, outcome)
                elif isinstance(outcome, Dropped):
                    tally.dropped[outcome.reason] += 1
                else:
                    samples.append(outcome)
                    row_numbers.append(row)
            if samples:
                tokens, ends = _packed(samples)
                columns["tokens.u32"].append(tokens)
                columns["offsets.i64"].append(tally.tokens + ends)
                columns["content_hashes.u64"].append(_content_hashes(tokens, ends))
                columns["row_numbers.i64"].append(row_numbers)
                tally.samples += len(samples)
                tally.truncated += sum(sample.truncated for sample in samples)
                tally.tokens += len(tokens)
                tally.learned_tokens += int(np.count_nonzero(tokens >> np.uint32(LEARNED_BIT)))
            tally.rows += len(batch.rows)
            progress(tally.rows)
        files = {name: column.finish() for name, column in columns.items()}
    if not tally.samples:
        raise UserError(f"{_blame(source)}: no row is left to learn from: {tally}")
    return tally, files


def _outcomes(
    source: Source, batch: Batch, encoder: Encoder, row_format: str
) -> Iterator[tuple[int, Outcome]]:
    """Yield each row's number and what became of it; an unreadable row is a BadRow already."""
    # An unreadable row leaves an empty one in its place, so that the encoder's row numbers hold.
    rows = [{} if isinstance(row, BadRow) else row for row in batch.rows]
    try:
        encoded = encoder.encode(rows, row_format, first_row=batch.first_row)
    except UserError as error:
        raise type(error)(f"{_blame(source)}: {error}") from error
    for number, (row, outcome) in enumerate(zip(batch.rows, encoded, strict=True), batch.first_row):
        yield number, row if isinstance(row, BadRow) else outcome


def _refusal(source: Source, row: int, problem: BadRow) -> UserError:
    return UserError(
        f"{_blame(source)}: row {row} (from 0) is broken ({problem.reason}): {problem}. "
        f"Repair it, or set data.on_bad_row=skip to leave such rows out and have them counted"
    )


def _blame(source: Source) -> str:
    return f"{source.key}.path={source.path}"


def _packed(samples: Sequence[Sample]) -> tuple[UInt32Array, Int64Array]:
    """Return all tokens in a row, and where each sample ends in them."""
    lengths = np.array([len(sample.input_ids) for sample in samples], np.int64)
    num_tokens = int(lengths.sum())
    ids = chain.from_iterable(sample.input_ids for sample in samples)
    learned = chain.from_iterable(sample.learned for sample in samples)
    tokens = np.fromiter(ids, np.uint32, num_tokens)
    assert tokens.max() < 1 << LEARNED_BIT, "a token id needs the bit of the mask"
    mask = np.fromiter(learned, np.bool_, num_tokens).astype(np.uint32)
    return tokens | mask << np.uint32(LEARNED_BIT), np.cumsum(lengths)


def _content_hashes(tokens: UInt32Array, ends: Int64Array) -> npt.NDArray[np.uint64]:
    data = tokens.astype(COLUMNS["tokens.u32"]).tobytes()
    borders = pairwise([0, *(4 * ends).tolist()])
    digests = (hashlib.blake2b(data[start:end], digest_size=8) for start, end in borders)
    return np.frombuffer(b"".join(digest.digest() for digest in digests), "<u8")


class _Column:
    """Append to the file of one column."""

    def __init__(self, stream: BinaryIO, dtype: np.dtype[Any]) -> None:
        self._file = HashingFile(stream)
        self._dtype = dtype

    def append(self, values: npt.ArrayLike) -> None:
        self._file.write(np.asarray(values, self._dtype).tobytes())

    def finish(self) -> StoreFile:
        return StoreFile(*self._file.finish())


def _meta(
    settings: tuple[str, str, str, str],
    tally: _Tally,
    files: Mapping[str, StoreFile],
    folder: Path,
) -> StoreMeta:
    hashes = np.fromfile(folder / "content_hashes.u64", COLUMNS["content_hashes.u64"])
    return StoreMeta(
        *settings,
        rows=tally.rows,
        samples=tally.samples,
        truncated=tally.truncated,
        dropped=dict(tally.dropped),
        bad_rows={
            reason: BadRows(count, tuple(tally.first_bad[reason]))
            for reason, count in tally.bad.items()
        },
        tokens=tally.tokens,
        learned_tokens=tally.learned_tokens,
        duplicates=tally.samples - len(np.unique(hashes)),
        files=files,
    )
