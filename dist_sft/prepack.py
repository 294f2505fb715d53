"""Weights in the order in which oneDNN reads them: on CPU, answering is faster by it.

torch's own `linear` brings a weight into such an order anew at every call, and hands float32 to
another library, MKL. Where few rows go through a layer at a time, that is most of the work.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = (torch.float32, torch.bfloat16)
PRIVATE = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
"""Functions of torch that a version may not have."""


class PrepackedLinear(nn.Linear):
    """A linear layer that computes with a copy of its weight, made by `prepack`."""

    prepacked: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Return input [..., in] times the weight, plus the bias: [..., out]."""
        result: Tensor = _onednn()._linear_pointwise(
            input, self.prepacked, self.bias, "none", [], ""
        )
        return result


def can_prepack(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether this torch has what `prepack` needs, for this dtype and device."""
    return (
        device.type == "cpu"
        and dtype in DTYPES
        and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
        and all(hasattr(_onednn(), name) for name in PRIVATE)
        and (dtype != torch.bfloat16 or _onednn()._is_mkldnn_bf16_supported())
    )


def prepack(model: nn.Module) -> None:
    """Lay the weights of all linear layers out anew, in a model whose weights stay what they are.

    `torch.compile` does so by the same functions for weights that it freezes. The memory of weights
    that are in a file's pages is given back: they are read again if anybody looks at them.
    """
    mapped = list(_mapped())
    for layer in model.modules():
        if type(layer) is nn.Linear and layer.weight.dtype in DTYPES:
            layer.prepacked = _onednn()._reorder_linear_weight(layer.weight.detach(), None)
            layer.__class__ = PrepackedLinear
            _forget(layer.weight, mapped)


def _onednn() -> Any:
    return torch.ops.mkldnn


def _mapped() -> Iterator[tuple[int, int]]:
    """Yield the addresses, first and end, of this process's mappings of files."""
    if sys.platform != "linux":
        return
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, inode, *_ = line.split()
        if inode != "0":
            first, end = addresses.split("-")
            yield int(first, 16), int(end, 16)


def _forget(weight: Tensor, mapped: list[tuple[int, int]]) -> None:
    """Give a weight's whole pages back where a file has its content."""
    first = weight.data_ptr()
    end = first + weight.nbytes
    if any(a <= first and end <= b for a, b in mapped):
        first += -first % mmap.PAGESIZE
        end -= end % mmap.PAGESIZE
        if first < end:
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED
            )
