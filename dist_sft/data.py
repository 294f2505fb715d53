"""From a recipe's sources to the batches of (step, rank): encode once, then only read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_sft.attention import packed_inputs
from dist_sft.chat import IGNORE, Encoder
from dist_sft.config import Data, Source
from dist_sft.encoding import build_or_open
from dist_sft.plan import Plan, layout
from dist_sft.sources import open_source
from dist_sft.store import Dataset, Store, StoreMeta, split_fraction
from dist_sft.tokenizer import Words

Say = Callable[[str], None]


@dataclass(frozen=True)
class Stores:
    """Where the encoded sources are; what one process of a node tells the others."""

    train: list[tuple[str, str]]
    """(source name, store folder)"""
    eval: list[tuple[str, str]]
    vocab_size: int

    def to_json(self) -> str:
        """Return the text of the file that waiting ranks read."""
        return json.dumps(asdict(self))


def cache_folder(data: Data) -> Path:
    """Return where encoded data is kept."""
    if data.cache_dir is not None:
        return Path(data.cache_dir)
    default = Path.home() / ".cache" / "dist_sft"
    return Path(os.environ.get("DIST_SFT_CACHE", default))


def prepare(
    data: Data, words: Words, say: Say, progress: Callable[[int], None] = lambda rows: None
) -> Stores:
    """Encode every source that is not encoded yet; one process per node calls this."""
    encoder = Encoder(
        words.template,
        words.tokenizer,
        max_length=data.max_length,
        overlong=data.overlong,
        learn=data.learn,
    )

    def build(sources: tuple[Source, ...], kind: str) -> list[tuple[str, str]]:
        built = []
        for number, source in enumerate(sources):
            store = build_or_open(
                open_source(source.path, split=source.split, key=f"data.{kind}.{number}"),
                encoder,
                cache_folder(data),
                name=source.label,
                row_format=source.format,
                on_bad_row=data.on_bad_row,
                progress=progress,
                say=say,
            )
            say(f"{kind} {describe(store.meta, source.label)}")
            built.append((source.label, str(store.path)))
        return built

    return Stores(build(data.train, "train"), build(data.eval, "eval"), len(words.tokenizer))


def describe(meta: StoreMeta, name: str) -> str:
    """Return one line on what became of a source's rows."""
    lost = {reason: count for reason, count in meta.dropped.items() if count}
    lost |= {reason: bad.count for reason, bad in meta.bad_rows.items()}
    parts = [
        f"{name}: {meta.samples:,} of {meta.rows:,} rows",
        f"{meta.tokens:,} tokens, {meta.learned_tokens / max(1, meta.tokens):.0%} learned",
    ]
    if meta.truncated:
        parts.append(f"{meta.truncated:,} cut to data.max_length")
    if lost:
        parts.append("left out: " + ", ".join(f"{n:,} {reason}" for reason, n in lost.items()))
    if meta.duplicates:
        parts.append(f"{meta.duplicates:,} duplicates")
    return "; ".join(parts)


def open_datasets(stores: Stores, data: Data, seed: int) -> tuple[Dataset, dict[str, Dataset]]:
    """Open what `prepare` encoded: the training set and the evaluation sets by name."""

    def opened(places: list[tuple[str, str]]) -> list[Store]:
        return [Store.open(Path(folder), name=name) for name, folder in places]

    train = Dataset(opened(stores.train))
    if data.eval_fraction:
        kept, held_out = split_fraction(train.content_hashes, data.eval_fraction, seed)
        return train.select(kept), {"held_out": train.select(held_out)}
    return train, {store.name: Dataset([store]) for store in opened(stores.eval)}


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


def make_plan(dataset: Dataset, data: Data, seed: int, batch_size: int) -> Plan:
    """Return which samples make up every step."""
    weights = tuple(source.weight for source in data.train)
    return Plan(dataset.rows_per_source, weights, seed, batch_size)


def total_steps(plan: Plan, epochs: float | None, steps: int | None) -> int:
    """Return how many steps a run has: `train.steps`, or `train.epochs` (1 if neither is set)."""
    if steps is not None:
        return steps
    return max(1, round((1.0 if epochs is None else epochs) * plan.steps_per_epoch))
