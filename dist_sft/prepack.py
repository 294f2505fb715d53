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

    Subclasses of `Linear` and of `Parameter`, as quantization has them, are left alone. The memory
    of weights that are in a file's pages is given back: they are read again if anybody looks.
    """
    unchanged = list(_unchanged_mappings())
    linear = (layer for layer in model.modules() if isinstance(layer, nn.Linear))
    layers = [layer for layer in linear if _is_plain(layer)]
    # The largest one first: the memory that it needs twice is not needed on top of all others.
    for layer in sorted(layers, key=lambda layer: -layer.weight.nbytes):
        layer.prepacked = _onednn()._reorder_linear_weight(layer.weight.detach(), None)
        layer.__class__ = PrepackedLinear
        _forget(layer.weight, unchanged)


def _is_plain(layer: nn.Linear) -> bool:
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and layer.weight.dtype in DTYPES
        and layer.weight.device.type == "cpu"
    )


def _onednn() -> Any:
    return torch.ops.mkldnn


def _unchanged_mappings() -> Iterator[tuple[int, int]]:
    """Yield the addresses, first and end, of mappings whose every page is what a file has."""
    if sys.platform != "linux":
        return
    first = end = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            # addresses, permissions, offset, device, inode, path; no inode: no file
            first, end = (int(number, 16) for number in words[0].split("-"))
            end = end if words[4] != "0" else first
        elif words[0] == "Anonymous:" and words[1] == "0" and first < end:
            yield first, end


def _forget(weight: Tensor, unchanged: list[tuple[int, int]]) -> None:
    """Give a weight's whole pages back where a file has its content."""
    first = weight.data_ptr()
    end = first + weight.nbytes
    if any(a <= first and end <= b for a, b in unchanged):
        first += -first % mmap.PAGESIZE
        end -= end % mmap.PAGESIZE
        if first < end:
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED
            )
