"""Show what a recipe's data sets come to: counts, lengths, losses, repetitions, first samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dist_sft.chat import BadRow, Dropped, Encoder, Sample
from dist_sft.config import Data
from dist_sft.data import make_encoder
from dist_sft.look import (
    HEADING,
    Look,
    Source,
    explain_length,
    legend,
    read_rows,
    show_look,
    sources_of,
    tokens_of,
)
from dist_sft.store import Dataset, Store
from dist_sft.tokenizer import Words

HISTOGRAM_BARS = 12
BAR_WIDTH = 40
EXAMPLES = 3
"""How many rows are named for each thing that there is to say about rows."""
CANDIDATES = 200
"""How many of the rows left out are read again to find such examples."""


class Repeat(NamedTuple):
    """A sample and an earlier one with the same content, by number."""

    sample: int
    original: int


# ---- facts -----------------------------------------------------------------------------------


def repeats(hashes: NDArray[np.uint64]) -> tuple[int, list[Repeat]]:
    """Count the samples that equal an earlier one, and name the first few."""
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    originals = first[group]
    later = np.flatnonzero(originals != np.arange(len(hashes)))
    return len(later), [Repeat(int(i), int(originals[i])) for i in later[:EXAMPLES]]


def overlap(evaluated: NDArray[np.uint64], trained: NDArray[np.uint64]) -> tuple[int, list[Repeat]]:
    """Count the evaluation samples whose content is trained on, and name the first few."""
    shared = np.flatnonzero(np.isin(evaluated, trained))
    originals = (np.flatnonzero(trained == evaluated[i])[0] for i in shared[:EXAMPLES])
    pairs = zip(shared[:EXAMPLES], originals, strict=True)
    return len(shared), [Repeat(int(i), int(original)) for i, original in pairs]


def histogram(lengths: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Count samples by length: (shortest, longest, samples) of bars of one round width."""
    longest = int(lengths.max())
    width = round_up(longest / HISTOGRAM_BARS)
    counts = np.bincount((lengths - 1) // width)
    return [
        (i * width + 1, min((i + 1) * width, longest), int(count)) for i, count in enumerate(counts)
    ]


def round_up(value: float) -> int:
    """Return the next of 1, 2, 5, 10, 20, 50, ..."""
    power = 1
    while True:
        for digit in (1, 2, 5):
            if digit * power >= value:
                return digit * power
        power *= 10


def examples_of_losses(
    source: Source, store: Store, data: Data, words: Words
) -> dict[str, list[str]]:
    """Name a few rows that were dropped or cut, by reason, with what happened to them.

    Encodes them again: the store knows only how many there were.
    """
    meta = store.meta
    gone = np.setdiff1d(np.arange(meta.rows), store.row_numbers, assume_unique=True)
    full = store.row_numbers[store.lengths == data.max_length]
    candidates = [*gone[: CANDIDATES * bool(meta.dropped)].tolist(),
                  *full[: CANDIDATES * bool(meta.truncated)].tolist()]  # fmt: skip
    if not candidates:
        return {}
    rows = {n: row for n, row in read_rows(source, candidates).items() if isinstance(row, dict)}
    row_format = source.settings.format
    outcomes = make_encoder(data, words).encode(list(rows.values()), row_format)
    whole = Encoder(words.template, words.tokenizer, learn=data.learn)
    examples: dict[str, list[str]] = {}
    for (number, row), outcome in zip(rows.items(), outcomes, strict=True):
        if isinstance(outcome, BadRow) or (isinstance(outcome, Sample) and not outcome.truncated):
            continue
        reason = outcome.reason if isinstance(outcome, Dropped) else "cut"
        named = examples.setdefault(reason, [])
        if len(named) < EXAMPLES:
            (sample,) = whole.encode([row], row_format)
            why = "no assistant turn of it is learned"
            if isinstance(sample, Sample):
                why = explain_length(sample, data.max_length)
            named.append(f"row {number}: {why}")
    return examples


# ---- on a terminal ---------------------------------------------------------------------------


def show_totals(
    console: Console, data: Data, words: Words, train: Dataset, evals: Mapping[str, Dataset]
) -> None:
    """Print all totals of what `data.open_datasets` gives."""
    stores = list(train.stores)
    if data.eval:
        stores += [store for dataset in evals.values() for store in dataset.stores]
    encoded = list(zip(sources_of(data), stores, strict=True))
    console.print(counts_table(encoded, len(data.train)))
    if data.eval_fraction:
        held_out = len(evals["held_out"])
        console.print(
            f"of these {held_out:,} are held out for evaluation (data.eval_fraction: "
            f"{data.eval_fraction}) and {len(train):,} are trained on",
            highlight=False,
            soft_wrap=True,
        )
    if words.new_tokens:
        console.print(f"the template adds {words.new_tokens} tokens to the vocabulary")
    for source, store in encoded:
        _show_losses(console, source, store, data, words)
    _show_repeats(console, train, evals)
    for name, dataset in {"training": train, **evals}.items():
        _heading(console, f"Length of {name} samples in tokens")
        console.print(histogram_table(dataset.lengths))
    _heading(console, "First training samples")
    console.print(legend(console))
    for number in range(min(EXAMPLES, len(train))):
        show_look(console, look_at_sample(train, number, words), short=True)


def look_at_sample(dataset: Dataset, number: int, words: Words) -> Look:
    """Show a sample as it lies in the store."""
    ids, learned = dataset.sample(number)
    name, row = dataset.locate(number)
    sample = Sample(ids.tolist(), learned.tolist(), truncated=False)
    return Look(f"{name} row {row}", "", tokens_of(sample, words))


def counts_table(encoded: Sequence[tuple[Source, Store]], num_train: int) -> Table:
    """Return a table with one line per source, and the training sources' sum if several."""
    table = Table(box=None, header_style="bold", padding=(0, 1), pad_edge=False)
    table.add_column("source", overflow="fold")
    for name in (
        "rows", "kept", "cut", "left out", "repeated", "tokens", "learned", "median", "longest"
    ):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for number, (source, store) in enumerate(encoded, start=1):
        table.add_row(str(source), *_counts([store]))
        if number == num_train > 1:
            together = [store for _, store in encoded[:num_train]]
            table.add_row("all training sources", *_counts(together), style="bold")
    return table


def _counts(stores: Sequence[Store]) -> list[str]:
    metas = [store.meta for store in stores]
    rows, samples = sum(m.rows for m in metas), sum(m.samples for m in metas)
    tokens, learned = sum(m.tokens for m in metas), sum(m.learned_tokens for m in metas)
    repeated, _ = repeats(np.concatenate([store.content_hashes for store in stores]))
    lengths = np.concatenate([store.lengths for store in stores])
    numbers = (rows, samples, sum(m.truncated for m in metas), rows - samples, repeated, tokens)
    return [
        *(f"{number:,}" for number in numbers),
        f"{learned / tokens:.0%}",
        f"{int(np.median(lengths)):,}",
        f"{int(lengths.max()):,}",
    ]


def _show_losses(console: Console, source: Source, store: Store, data: Data, words: Words) -> None:
    meta = store.meta
    counts = Counter({reason: count for reason, count in meta.dropped.items() if count})
    counts |= Counter({reason: bad.count for reason, bad in meta.bad_rows.items()})
    if not counts and not meta.truncated:
        return
    named = examples_of_losses(source, store, data, words)
    for reason, bad in meta.bad_rows.items():
        named[reason] = [f"row {row}: {message}" for row, message in bad.first[:EXAMPLES]]
    _heading(console, f"Left out or cut in {source}")
    lines = [(count, reason, "left out") for reason, count in counts.most_common()]
    lines += [(meta.truncated, "cut", "to data.max_length")] if meta.truncated else []
    for count, reason, what in lines:
        console.print(Text.assemble((f"{count:,}", "bold"), f" {reason}, {what}"))
        for line in named.get(reason, []):
            console.print(Text(f"    {line}"), soft_wrap=True)


def _show_repeats(console: Console, train: Dataset, evals: Mapping[str, Dataset]) -> None:
    _heading(console, "Repetitions")
    hashes = train.content_hashes
    count, pairs = repeats(hashes)
    console.print(f"{count:,} of {len(train):,} training samples equal an earlier one",
                  highlight=False)  # fmt: skip
    _show_pairs(console, pairs, train, train)
    for name, dataset in evals.items():
        count, pairs = overlap(dataset.content_hashes, hashes)
        style = "yellow" if count else ""
        text = f"{count:,} of {len(dataset):,} samples of {name} are trained on as well"
        console.print(Text(text, style))
        _show_pairs(console, pairs, dataset, train)


def _show_pairs(
    console: Console, pairs: Sequence[Repeat], dataset: Dataset, originals: Dataset
) -> None:
    for pair in pairs:
        (name, row), (earlier, of) = dataset.locate(pair.sample), originals.locate(pair.original)
        console.print(Text(f"    {name} row {row} is {earlier} row {of}"), soft_wrap=True)


def histogram_table(lengths: NDArray[np.int64]) -> Table:
    """Return a bar for each range of lengths."""
    table = Table.grid(padding=(0, 2))
    for justify in ("right", "left", "right", "right"):
        table.add_column(justify=justify, no_wrap=True)
    bars = histogram(lengths)
    most = max(count for _, _, count in bars)
    for shortest, longest, count in bars:
        share = f"{count / len(lengths):.1%}"
        bar = Bar(most, 0, count, width=BAR_WIDTH, color="cyan")
        table.add_row(f"{shortest:,}-{longest:,}", bar, f"{count:,}", share)
    return table


def _heading(console: Console, title: str) -> None:
    console.print()
    console.print(Text(title, HEADING))
