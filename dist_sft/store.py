"""Encoded data as memory-mapped arrays: one folder per source, and several of them in a row.

A store folder is whole as soon as it has its final name; `dist_sft.encoding` writes it. Columns are
raw little-endian arrays, so that they can be written as a stream and read without being loaded:

    tokens.u32          token id, and in the highest bit whether the token is learned
    offsets.i64         sample i is tokens[offsets[i] : offsets[i + 1]]
    content_hashes.u64  equal for two samples if their tokens and masks are equal
    row_numbers.i64     number of the sample's row in the source, from 0
    meta.json           `StoreMeta`
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from dist_sft.errors import UserError
from dist_sft.once import DamagedError
from dist_sft.shuffle import finalize

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
Number = TypeVar("Number", bound=np.generic)

FORMAT_VERSION = 1
LEARNED_BIT = 31
COLUMNS: dict[str, np.dtype[Any]] = {
    "tokens.u32": np.dtype("<u4"),
    "offsets.i64": np.dtype("<i8"),
    "content_hashes.u64": np.dtype("<u8"),
    "row_numbers.i64": np.dtype("<i8"),
}


@dataclass(frozen=True)
class BadRows:
    """Count the broken rows of one reason; list (row number, message) of the first few."""

    count: int
    first: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class StoreFile:
    """Say what one column's file must be."""

    size: int
    sha256: str


@dataclass(frozen=True)
class StoreMeta:
    """Say what a store was made from, what became of each row, and what its files must be.

    `rows` read = `samples` kept + `dropped` + `bad_rows`; `truncated` samples are among those kept.
    `duplicates` counts samples that equal an earlier one.
    """

    content_hash: str
    encoder: str
    row_format: str
    on_bad_row: str
    rows: int
    samples: int
    truncated: int
    dropped: Mapping[str, int]
    bad_rows: Mapping[str, BadRows]
    tokens: int
    learned_tokens: int
    duplicates: int
    files: Mapping[str, StoreFile]
    checksum: str = ""
    """sha256 of everything above, as written."""

    def sealed(self) -> Self:
        """Return a copy whose checksum covers it."""
        bare = _META.dump_json(replace(self, checksum=""))
        return replace(self, checksum=hashlib.sha256(bare).hexdigest())

    def write(self, folder: Path) -> None:
        """Write meta.json into `folder`."""
        (folder / "meta.json").write_bytes(_META.dump_json(self.sealed(), indent=1))

    @staticmethod
    def read(folder: Path) -> "StoreMeta":
        """Read meta.json from `folder`. Raises DamagedError if it is not what was written."""
        try:
            meta = _META.validate_json((folder / "meta.json").read_bytes())
        except (OSError, ValidationError) as error:
            raise DamagedError(f"{folder}: meta.json cannot be read") from error
        if meta != meta.sealed():
            raise DamagedError(f"{folder}: meta.json was changed")
        return meta


_META = TypeAdapter(StoreMeta)


class Store:
    """Read the encoded samples of one source; opens files, loads nothing."""

    def __init__(self, path: Path, name: str, meta: StoreMeta) -> None:
        self.path = path
        self.name = name
        self.meta = meta
        columns = {
            file: np.asarray(np.memmap(path / file, dtype, "r")) for file, dtype in COLUMNS.items()
        }
        self._tokens = columns["tokens.u32"]
        self._offsets = columns["offsets.i64"]
        self.content_hashes: npt.NDArray[np.uint64] = columns["content_hashes.u64"]
        self.row_numbers: Int64Array = columns["row_numbers.i64"]

    @classmethod
    def open(cls, path: Path, *, name: str, digest: Callable[[Path], str] | None = None) -> "Store":
        """Open a finished store; `name` is the source's name in messages and metrics.

        `digest` gives the sha256 of a file (see `dist_sft.digests` for what each way notices);
        without it only sizes are looked at. Raises DamagedError.
        """
        meta = StoreMeta.read(path)
        if set(meta.files) != set(COLUMNS):
            raise DamagedError(f"{path}: written by another version of dist_sft")
        for file, expected in meta.files.items():
            _verify_file(path / file, expected, digest)
        return cls(path, name, meta)

    def __len__(self) -> int:
        return self.meta.samples

    @cached_property
    def lengths(self) -> Int64Array:
        """Return the number of tokens of every sample: int64 of shape (samples,)."""
        return np.diff(self._offsets)

    def sample(self, index: int) -> tuple[Int64Array, BoolArray]:
        """Return token ids and which of them are learned, both of shape (tokens,)."""
        packed = self._tokens[self._offsets[index] : self._offsets[index + 1]]
        ids = packed & np.uint32((1 << LEARNED_BIT) - 1)
        return ids.astype(np.int64), (packed >> np.uint32(LEARNED_BIT)).astype(np.bool_)

    def row_number(self, index: int) -> int:
        """Return the number of the sample's row in the source, from 0."""
        return int(self.row_numbers[index])


def _verify_file(file: Path, expected: StoreFile, digest: Callable[[Path], str] | None) -> None:
    try:
        size = file.stat().st_size
        if size != expected.size:
            raise DamagedError(f"{file} has {size} bytes instead of {expected.size}")
        if digest is not None and digest(file) != expected.sha256:
            raise DamagedError(f"{file} was changed: its sha256 differs")
    except OSError as error:
        raise DamagedError(f"{file} cannot be read: {error.strerror}") from error


class Dataset:
    """Number the samples of several stores through, from 0; in the order of the stores."""

    def __init__(self, stores: Sequence[Store], selected: Int64Array | None = None) -> None:
        self.stores = tuple(stores)
        self._starts = (0, *accumulate(len(store) for store in stores))
        # Ascending numbers of the samples that belong to this data set; None: all of them.
        self._selected = selected

    def __len__(self) -> int:
        return self._starts[-1] if self._selected is None else len(self._selected)

    def select(self, numbers: Int64Array) -> "Dataset":
        """Return the data set of these samples only; `split_fraction` gives such numbers."""
        assert np.all(np.diff(numbers) > 0), "sample numbers must ascend"
        return Dataset(self.stores, numbers if self._selected is None else self._selected[numbers])

    @property
    def rows_per_source(self) -> tuple[int, ...]:
        """Return the number of samples of each store."""
        if self._selected is None:
            return tuple(len(store) for store in self.stores)
        return tuple(np.diff(np.searchsorted(self._selected, self._starts)).tolist())

    @cached_property
    def lengths(self) -> Int64Array:
        """Return the number of tokens of every sample: int64 of shape (samples,)."""
        return self._chosen(np.concatenate([store.lengths for store in self.stores]))

    @property
    def content_hashes(self) -> npt.NDArray[np.uint64]:
        """Return what `split_fraction` needs: uint64 of shape (samples,)."""
        return self._chosen(np.concatenate([store.content_hashes for store in self.stores]))

    def sample(self, number: int) -> tuple[Int64Array, BoolArray]:
        """Return token ids and which of them are learned, both of shape (tokens,)."""
        store, index = self._find(number)
        return store.sample(index)

    def locate(self, number: int) -> tuple[str, int]:
        """Return the source's name and the row's number in it, from 0."""
        store, index = self._find(number)
        return store.name, store.row_number(index)

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash that is equal on all ranks exactly if they have the same samples."""
        digest = hashlib.sha256(" ".join(store.path.name for store in self.stores).encode())
        if self._selected is not None:
            digest.update(self._selected.astype("<i8").tobytes())
        return digest.hexdigest()

    def _find(self, number: int) -> tuple[Store, int]:
        assert 0 <= number < len(self), f"sample {number} of {len(self)}"
        number = number if self._selected is None else int(self._selected[number])
        source = bisect_right(self._starts, number) - 1
        return self.stores[source], number - self._starts[source]

    def _chosen(self, values: npt.NDArray[Number]) -> npt.NDArray[Number]:
        return values if self._selected is None else values[self._selected]


def split_fraction(
    content_hashes: npt.NDArray[np.uint64], fraction: float, seed: int
) -> tuple[Int64Array, Int64Array]:
    """Hold out `fraction` of the samples: return ascending numbers for training, for evaluation.

    A sample's side depends on its content and the seed, not on its place, and equal samples are
    always on one side. As many are held out as asked for, rounded and at least one, unless groups
    of equal samples leave no way to reach that number; then fewer.

    Raises UserError where one side would be empty.
    """
    wanted = max(1, round(fraction * len(content_hashes)))
    groups, group_of, group_sizes = np.unique(
        content_hashes, return_inverse=True, return_counts=True
    )
    held_out = np.zeros(len(groups), np.bool_)
    queue = np.argsort(_mixed(groups, seed), kind="stable")
    while wanted and len(queue):
        # Skip groups that are too large by now, then take as many as fit.
        queue = queue[group_sizes[queue] <= wanted]
        totals = np.cumsum(group_sizes[queue])
        num_fitting = int(np.searchsorted(totals, wanted, side="right"))
        held_out[queue[:num_fitting]] = True
        wanted -= int(totals[num_fitting - 1]) if num_fitting else 0
        queue = queue[num_fitting:]
    chosen = held_out[group_of]
    if chosen.all() or not chosen.any():
        raise UserError(
            f"data.eval_fraction={fraction}: {len(content_hashes)} samples, {len(groups)} of them "
            f"different, cannot be divided so that training and evaluation share none; give "
            f"evaluation data with data.eval instead"
        )
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def _mixed(keys: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """Return a pseudo-random order key per content hash."""
    start = hashlib.blake2b(str(seed).encode(), digest_size=8).digest()
    return finalize(keys ^ np.frombuffer(start, "<u8"))
