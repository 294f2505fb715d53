"""Read a checkpoint's tensors by name and element range, whatever layout they were saved from."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dist_sft import manifest
from dist_sft.manifest import DamagedCheckpoint
from dist_sft.tensor_file import NotSafetensors, TensorFile

BUFFERS = "buffers.safetensors"
KEYS = ("fp32", "exp_avg", "exp_avg_sq")
"""What there is of a trained parameter; of a frozen one there is only the first."""


class Reader:
    """Read element ranges of a checkpoint's tensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = manifest.read(folder)
        self.frozen = frozenset(self.manifest.get("frozen", ()))  # older ones have none
        self._pieces: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
        for file, entry in self.manifest["files"].items():
            for name, start, length in entry.get("pieces", ()):
                self._pieces[name].append((start, length, file))
        self._open: dict[str, TensorFile] = {}

    def keys(self, name: str) -> tuple[str, ...]:
        """Return the keys under which there is something of a parameter."""
        return KEYS[:1] if name in self.frozen else KEYS

    def read(self, name: str, key: str, start: int, length: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (offset from start, values), a few at a time and in order.

        They are the range of the flattened tensor, whole; else this raises DamagedCheckpoint.
        """
        covered = 0
        for piece_start, piece_length, file in sorted(self._pieces[name]):
            first = max(start, piece_start)
            last = min(start + length, piece_start + piece_length)
            if first < last:
                stored, shift = f"{name}|{key}|{piece_start}", piece_start - start
                try:
                    source = self._file(file)
                    for place, values in source.read(
                        stored, first - piece_start, last - piece_start
                    ):
                        yield place + shift, values
                except NotSafetensors as error:
                    raise DamagedCheckpoint(str(error)) from None
                covered += last - first
        if covered != length:
            raise DamagedCheckpoint(
                f"{self.folder} holds {covered} of {length} elements of {name}, though every byte "
                "is what was written: a fault of whoever wrote it"
            )

    def whole(self, name: str, key: str = "fp32") -> Iterator[Tensor]:
        """Yield all elements of the flattened tensor, a few at a time."""
        count = math.prod(self.manifest["shapes"][name])
        return (values for _, values in self.read(name, key, 0, count))

    def tensor(self, name: str, key: str = "fp32") -> Tensor:
        """Return one whole tensor in its own shape."""
        shape = self.manifest["shapes"][name]
        whole = torch.empty(shape)
        flat = whole.view(-1)
        for offset, piece in self.read(name, key, 0, flat.numel()):
            flat[offset : offset + len(piece)] = piece
        return whole

    def buffers(self) -> dict[str, Tensor]:
        """Return the buffers that belong to the weights; most models have none."""
        name = f"model/{BUFFERS}"
        return load_file(self.folder / name) if name in self.manifest["files"] else {}

    def _file(self, name: str) -> TensorFile:
        if name not in self._open:
            self._open[name] = TensorFile(self.folder / name)
        return self._open[name]
