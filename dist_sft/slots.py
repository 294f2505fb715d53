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
    """Room for the keys and values of `rows` rows of `columns` tokens.

    What rows need no more is forgotten by looking at later columns only; the columns in use are
    moved to the front when the last one is full. The more there are to spare, the rarer that is.
    """

    refills = True

    def __init__(self, model: PreTrainedModel, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self._begin = self._end = 0  # the columns in use
        layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
        self._layers = [_Layer(self) if isinstance(layer, PLAIN) else layer for layer in layers]
        self.cache = Cache(layers=self._layers)

    @staticmethod
    def hold(model: PreTrainedModel) -> bool:
        """Tell whether a model remembers nothing but keys and values."""
        layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
        return bool(layers) and all(type(layer) in (*PLAIN, DummyLayer) for layer in layers)

    @property
    def width(self) -> int:
        """Return how many columns are in use."""
        return self._end - self._begin

    def clear(self) -> None:
        """Forget all rows."""
        self._begin = self._end = 0

    def trim(self, width: int, rows: int) -> None:
        """Forget all but the newest `width` columns; make room for one more of `rows` rows."""
        self._begin = self._end - width
        if self._end == self.columns:
            for buffer in self._buffers():
                buffer[:rows, :, :width] = buffer[:rows, :, self._begin :].clone()
            self._begin, self._end = 0, width

    def grow(self, columns: int) -> None:
        """Take the columns that a forward has written into use."""
        self._end += columns

    def join(self, others: Slots, sources: list[int], at: int) -> None:
        """Copy rows of `others`, by their numbers, behind the first `at` rows."""
        places, first = slice(at, at + len(sources)), self._end - others.width
        assert first >= self._begin
        for mine, theirs in zip(self._buffers(), others._buffers(), strict=True):
            # What a mask leaves out is multiplied by zero, and must not be a former row's NaN.
            mine[places, :, self._begin : first] = 0
            mine[places, :, first : self._end] = theirs[sources, :, : others.width]

    def keep(self, rows: list[int]) -> None:
        """Leave only these rows, in this order; none moves to a later place."""
        self._copy([(place, row) for place, row in enumerate(rows)])

    def spread(self, rows: list[int]) -> None:
        """Put these rows, several times each, in this order; none moves to an earlier place."""
        self._copy([(place, row) for place, row in enumerate(rows)][::-1])

    def _copy(self, moves: list[tuple[int, int]]) -> None:
        used = slice(self._begin, self._end)
        for buffer in self._buffers():
            for place, row in moves:
                if place != row:
                    buffer[place, :, used] = buffer[row, :, used]

    def _buffers(self) -> list[Tensor]:
        layers = [x for x in self._layers if isinstance(x, _Layer) and x.is_initialized]
        return [buffer for layer in layers for buffer in (layer.keys, layer.values)]

    def write(self, buffer: Tensor, states: Tensor) -> Tensor:
        """Put new columns [n, heads, m, width] behind those in use; return a view of them all."""
        rows, end = states.shape[0], self._end + states.shape[2]
        assert end <= self.columns
        buffer[:rows, :, self._end : end] = states
        return buffer[:rows, :, self._begin : end]


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
        """Write behind the columns in use; return views of them all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = self._slots.write(self.keys, key_states)
        return keys, self._slots.write(self.values, value_states)

    def get_seq_length(self) -> int:
        """Return the number of columns in use."""
        return self._slots.width


class StockCache:
    """transformers' own cache, for models with states of other kinds: a batch at a time."""

    refills = False

    def __init__(self, model: PreTrainedModel, rows: int, columns: int) -> None:
        self._config = model.config.get_text_config(decoder=True)
        self.clear()

    def clear(self) -> None:
        """Forget all rows."""
        self.width = 0
        self.cache = DynamicCache(config=self._config)

    def trim(self, width: int, rows: int) -> None:
        """Do nothing: it forgets nothing."""

    def grow(self, columns: int) -> None:
        """Count the columns that a forward has written."""
        self.width += columns

    def join(self, others: StockCache, sources: list[int], at: int) -> None:
        """Refuse: it takes no rows beside others."""
        raise NotImplementedError

    def keep(self, rows: list[int]) -> None:
        """Leave only these rows, in this order."""
        self.cache.reorder_cache(torch.tensor(rows))

    spread = keep
