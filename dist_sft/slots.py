"""Keys and values of the rows that are being answered, in memory that is taken once.

Rows end in the same column, however long they are, so that a step writes one column and reads a
rectangle; a row's first column follows from its length. A finished row's place is taken by the last
row, or by one that waits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers that remember keys and values only; how far back to look, the mask says."""


class Slots:
    """Room for the keys and values of `rows` rows of `columns` tokens."""

    refills = True

    def __init__(self, model: PreTrainedModel, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.end = 0
        """The column behind the newest token of every row."""
        layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
        self._layers = [_Layer(self) if isinstance(layer, PLAIN) else layer for layer in layers]
        self.cache = Cache(layers=self._layers)

    @staticmethod
    def hold(model: PreTrainedModel) -> bool:
        """Tell whether a model remembers nothing but keys and values."""
        layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
        return bool(layers) and all(type(layer) in (*PLAIN, DummyLayer) for layer in layers)

    def join(self, others: Slots, sources: list[int], at: int) -> None:
        """Copy rows of `others`, by their numbers, behind the first `at` rows."""
        if not at:
            self.end = others.end
        index = torch.tensor(sources)
        for mine, theirs in self._pairs(others):
            mine[at : at + len(sources), :, self.end - others.end : self.end] = theirs[
                index.to(theirs.device), :, : others.end
            ]

    def keep(self, rows: list[int]) -> None:
        """Leave only these rows, in this order; what is in its place stays there."""
        for place, row in enumerate(rows):
            if place != row:
                for buffer in self._buffers():
                    buffer[place, :, : self.end] = buffer[row, :, : self.end]

    def shift(self, columns: int, rows: int) -> None:
        """Forget the oldest columns of the first `rows` rows."""
        for buffer in self._buffers():
            buffer[:rows, :, : self.end - columns] = buffer[:rows, :, columns : self.end].clone()
        self.end -= columns

    def _buffers(self) -> list[Tensor]:
        return [
            buffer
            for layer in self._layers
            if isinstance(layer, _Layer) and layer.keys is not None
            for buffer in (layer.keys, layer.values)
        ]

    def _pairs(self, others: Slots) -> list[tuple[Tensor, Tensor]]:
        for mine, theirs in zip(self._layers, others._layers, strict=True):
            if isinstance(mine, _Layer) and mine.keys is None and theirs.keys is not None:
                mine.lazy_initialization(theirs.keys, theirs.values)
        return list(zip(self._buffers(), others._buffers(), strict=True))


class _Layer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values: [rows, heads, columns, width] each."""

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self._slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the memory. Zeros, for what a mask leaves out still must be a number."""
        self.dtype, self.device = key_states.dtype, key_states.device
        shape = (self._slots.rows, key_states.shape[1], self._slots.columns)
        self.keys = key_states.new_zeros(*shape, key_states.shape[3])
        self.values = value_states.new_zeros(*shape, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write behind the end; return views of everything up to there."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, start = key_states.shape[0], self._slots.end
        end = start + key_states.shape[2]
        self.keys[:rows, :, start:end] = key_states
        self.values[:rows, :, start:end] = value_states
        return self.keys[:rows, :, :end], self.values[:rows, :, :end]

    def get_seq_length(self) -> int:
        """Return the number of columns."""
        return self._slots.end


class StockCache:
    """transformers' own cache, for models with states of other kinds: a batch at a time."""

    refills = False

    def __init__(self, model: PreTrainedModel, rows: int, columns: int) -> None:
        self.columns, self.end = columns, 0
        self.cache = DynamicCache(config=model.config.get_text_config(decoder=True))

    def join(self, others: StockCache, sources: list[int], at: int) -> None:
        """Take the rows of others, by their numbers."""
        assert not at, "it takes no rows beside others"
        self.cache, self.end = others.cache, others.end
        self.keep(sources)

    def keep(self, rows: list[int]) -> None:
        """Leave only these rows, in this order."""
        self.cache.reorder_cache(torch.tensor(rows))

    def shift(self, columns: int, rows: int) -> None:
        """Do nothing: without new rows none becomes longer than the first ones were."""
