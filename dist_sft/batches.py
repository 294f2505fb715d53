"""Samples -> tensors: this rank's micro-batches of a global batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_sft.attention import packed_inputs
from dist_sft.chat import IGNORE
from dist_sft.plan import layout
from dist_sft.store import Dataset


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank."""

    samples: NDArray[np.int64]
    """Sample numbers; empty for a filler."""
    inputs: dict[str, Any]
    """What the model takes beside `logits_to_keep`: input_ids [B, T] and what describes them."""
    keep: Tensor
    """bool [B, T]: positions whose next token is a target."""
    targets: Tensor
    """int64 [K]: those next tokens, in the order of `keep`."""
    tokens: int
    """Real tokens, padding not counted."""

    @property
    def computed(self) -> int:
        """Tokens with padding; a row's last one counts although it is only ever a target."""
        return int(self.inputs["input_ids"].numel()) + len(self.samples)


def collate(
    dataset: Dataset, samples: NDArray[np.int64], *, packed: bool, device: torch.device
) -> Batch:
    """Put samples into one row without padding, or into padded rows.

    A filler (no samples) is one token that predicts nothing: it keeps this rank in step with the
    others. The last token of a sample is only ever a target, so the model does not see it.
    """
    rows = [_inputs_and_targets(dataset, int(number)) for number in samples]
    rows = rows or [(np.zeros(1, np.int64), np.full(1, IGNORE))]
    lengths = [len(ids) for ids, _ in rows]
    if packed:
        ids = torch.from_numpy(np.concatenate([ids for ids, _ in rows]))[None]
        labels = torch.from_numpy(np.concatenate([labels for _, labels in rows]))[None]
        described = packed_inputs(lengths, device)
    else:
        ids = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
        labels = torch.full_like(ids, IGNORE)
        mask = torch.zeros_like(ids)
        for i, (row_ids, row_labels) in enumerate(rows):
            ids[i, : len(row_ids)] = torch.from_numpy(row_ids)
            labels[i, : len(row_ids)] = torch.from_numpy(row_labels)
            mask[i, : len(row_ids)] = 1
        described = {"attention_mask": mask.to(device), "use_cache": False}
    keep = labels != IGNORE
    return Batch(
        samples,
        {"input_ids": ids.to(device), **described},
        keep.to(device),
        labels[keep].to(device),
        int(dataset.lengths[samples].sum()),
    )


def _inputs_and_targets(
    dataset: Dataset, number: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    ids, learned = dataset.sample(number)
    return ids[:-1], np.where(learned[1:], ids[1:], IGNORE)


@dataclass(frozen=True)
class Feeder:
    """Give this rank its micro-batches of any global batch."""

    dataset: Dataset
    rank: int
    world: int
    budget: int
    packed: bool
    device: torch.device

    def micro_batches(self, samples: NDArray[np.int64]) -> list[Batch]:
        """Return this rank's share of the samples; on all ranks the same number of batches."""
        lengths = self.dataset.lengths[samples]
        ranks = layout(lengths, self.world, self.budget, packed=self.packed)
        return [
            collate(self.dataset, samples[rows], packed=self.packed, device=self.device)
            for rows in ranks[self.rank]
        ]

    def all_in_order(self, examples: int) -> Iterator[list[Batch]]:
        """Yield this rank's share of the whole data set, that many examples at a time."""
        for start in range(0, len(self.dataset), examples):
            chunk = np.arange(start, min(start + examples, len(self.dataset)))
            yield self.micro_batches(chunk)
