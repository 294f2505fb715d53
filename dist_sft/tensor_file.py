"""Safetensors files, written and read a piece at a time.

The format: 8 bytes with the header's length, a JSON header, then the tensors' bytes
(https://huggingface.co/docs/safetensors). The library's own writer wants all tensors at once,
hashes nothing and syncs nothing; its reader maps files, and counts against this process's memory
whatever was read, or reads whole tensors for a few of their elements.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_sft.digests import HashingFile

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE = 2**22
"""Elements that are read at once: 16 MiB of float32."""


class NotSafetensors(ValueError):
    """Report a file whose header is not that of a safetensors file."""


class Entry(NamedTuple):
    """A tensor to write: `pieces` are its flattened elements in order, of any float dtype."""

    dtype: torch.dtype
    shape: list[int]
    pieces: Iterable[Tensor]


def write_tensors(
    path: Path, entries: Mapping[str, Entry], mode: int, metadata: dict[str, str] | None = None
) -> tuple[int, str]:
    """Write tensors by name, and flush them to disk; return the file's size and SHA-256."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, entry in entries.items():
        start, end = end, end + math.prod(entry.shape) * entry.dtype.itemsize
        dtype = NAMES[entry.dtype]
        header[name] = {"dtype": dtype, "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        os.fchmod(stream.fileno(), mode)
        file = HashingFile(stream)
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries.values():
            for piece in entry.pieces:
                if piece.numel():
                    values = piece.detach().to("cpu", entry.dtype).contiguous()
                    array: Any = values.view(-1).view(torch.uint8).numpy()
                    file.write(memoryview(array))
        size, digest = file.finish()
    assert size == 8 + len(text) + end, "a tensor's pieces do not fill its shape"
    return size, digest


class TensorFile:
    """Read element ranges of the tensors in one file; it stays readable when it is deleted."""

    def __init__(self, path: Path) -> None:
        """Open the file. Raises NotSafetensors where it is something else."""
        self._path = path
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        try:
            length = int.from_bytes(self._bytes(0, 8), "little")
            self._tensors: dict[str, Any] = dict(json.loads(self._bytes(8, length)))
        except (ValueError, TypeError) as error:
            raise NotSafetensors(f"{path}: not safetensors ({error})") from None
        self._start = 8 + length

    def read(self, name: str, first: int, last: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (place, elements) of a flattened tensor, a piece at a time, from `first` to `last`.

        Raises NotSafetensors where they are not in the file.
        """
        try:
            dtype = DTYPES[self._tensors[name]["dtype"]]
            begin = self._start + self._tensors[name]["data_offsets"][0]
            for place in range(first, last, PIECE):
                count = min(PIECE, last - place)
                data = self._bytes(begin + place * dtype.itemsize, count * dtype.itemsize)
                yield place, torch.frombuffer(data, dtype=dtype)
        except (KeyError, ValueError) as error:
            raise NotSafetensors(f"{self._path}: no whole tensor {name} ({error})") from None

    def _bytes(self, offset: int, count: int) -> bytearray:
        """Read so many bytes. Raises ValueError where the file ends before."""
        size = os.fstat(self._file).st_size
        if offset + count > size:
            raise ValueError(f"it ends at byte {size}, before {offset + count}")
        data = bytearray(count)
        view = memoryview(data)
        while view:
            read = os.preadv(self._file, [view], offset)
            if not read:
                raise ValueError(f"it ends at byte {offset}")
            view, offset = view[read:], offset + read
        return data
