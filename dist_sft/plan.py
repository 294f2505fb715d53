"""Decide which samples make up every optimizer step, and which rank computes which of them.

`Plan` is a pure function of (rows, weights, seed, batch size): nothing is stored, so that any step
of the past or future is known at once, on any number of ranks. `layout` then spreads one global
batch over the ranks; it decides how fast the step is computed, never what it computes.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dist_sft.errors import UserError
from dist_sft.shuffle import Ints, Words, mix, permute

# Key labels: the order of an epoch and the passes over the sources must be independent shuffles.
_EPOCH_ORDER, _SOURCE_PASS = 0, 1
# What one more padded micro-batch costs besides its tokens, as a share of the token budget.
_PADDED_OVERHEAD = 1 / 32


@dataclass(frozen=True)
class Plan:
    """Say which samples make up every step.

    Steps count from 1, epochs from 0. Every source is read in shuffled passes: no row comes again
    before all other rows of its source have come, in this epoch or in the next ones. The batches do
    not depend on the numpy version: only 64-bit integer arithmetic takes part in them.

    Raises `UserError` for a source without rows.
    """

    rows: tuple[int, ...]
    """Rows of every source; sample numbers run through the sources in this order."""
    weights: tuple[float, ...]
    """Passes over every source in one epoch: 1.0 every row once, 2.0 twice, 0.5 half of the rows,
    and the other half in the next epoch. Rounded to whole rows, at least one."""
    seed: int
    batch_size: int
    """Examples in an optimizer step, over all ranks; the last batch of an epoch may be smaller."""

    def __post_init__(self) -> None:
        assert len(self.rows) == len(self.weights) > 0, "one weight for every source"
        assert all(0 < weight < math.inf for weight in self.weights), self.weights
        assert self.batch_size >= 1, self.batch_size
        for i, rows in enumerate(self.rows):
            if rows < 1:
                raise UserError(
                    f"data.train.{i} has {rows} usable rows, but a source needs at least one: "
                    "correct its rows or remove it from data.train"
                )

    @cached_property
    def draws_by_source(self) -> tuple[int, ...]:
        """Count the draws from every source in one epoch."""
        pairs = zip(self.rows, self.weights, strict=True)
        return tuple(max(1, math.floor(rows * weight + 0.5)) for rows, weight in pairs)

    @property
    def draws_per_epoch(self) -> int:
        """Count the examples of one epoch."""
        return sum(self.draws_by_source)

    @property
    def steps_per_epoch(self) -> int:
        """Count the steps of one epoch, the last and perhaps smaller one included."""
        return -(-self.draws_per_epoch // self.batch_size)

    def epoch_of(self, step: int) -> int:
        """Return the epoch that a step belongs to."""
        assert step >= 1, "steps count from 1"
        return (step - 1) // self.steps_per_epoch

    def samples(self, step: int) -> Ints:
        """Return the sample numbers of a step's global batch, in O(batch size) time and memory."""
        epoch = self.epoch_of(step)
        start = (step - 1) % self.steps_per_epoch * self.batch_size
        places = np.arange(start, min(start + self.batch_size, self.draws_per_epoch))
        places = permute(places, self.draws_per_epoch, self._key(_EPOCH_ORDER, epoch))

        samples = np.empty_like(places)
        first_place = first_sample = 0
        for source, (rows, draws) in enumerate(zip(self.rows, self.draws_by_source, strict=True)):
            mine = (places >= first_place) & (places < first_place + draws)
            # Draws are counted over the whole run, so a pass may begin in one epoch and end later.
            passes, offsets = np.divmod(places[mine] - first_place + epoch * draws, rows)
            keys = self._key(_SOURCE_PASS, source, passes)
            samples[mine] = first_sample + permute(offsets, rows, keys)
            first_place += draws
            first_sample += rows
        return samples

    def _key(self, *labels: int | Ints) -> Words:
        key = mix(np.array([self.seed % 2**64], np.uint64))
        for label in labels:
            key = mix(key + np.asarray(label).astype(np.uint64))
        return key


def layout(lengths: Ints, world: int, budget: int, *, packed: bool) -> list[list[Ints]]:
    """Spread one global batch over the ranks, as micro-batches within a token budget.

    `lengths` are the tokens of each row of the batch. The result has for every rank its
    micro-batches as positions into `lengths`, each position exactly once. All ranks have the same
    number of micro-batches, as they meet at each one; an empty micro-batch is a filler. A
    micro-batch costs the sum of its lengths when packed, rows times the longest row otherwise, and
    at most `budget` unless it is a single row. Packed ones are as few as first-fit-decreasing needs
    on the worst rank; padded ones may be more where that saves padding. The busiest rank has at
    most the mean of the ranks' tokens plus the longest row. Ties go to the lower position.
    """
    assert min(world, budget) >= 1, (world, budget)
    lengths = np.asarray(lengths, np.int64)
    tokens: list[int] = lengths.tolist()
    longest_first: list[int] = np.argsort(-lengths, kind="stable").tolist()
    shares = _spread(longest_first, tokens, world)
    fill = _first_fit if packed else _cut
    ranks = [fill(rows, tokens, budget) for rows in shares]
    micro_steps = max(map(len, ranks))
    if packed:
        pairs = zip(shares, ranks, strict=True)
        ranks = [_even_out(rows, bins, tokens, budget, micro_steps) for rows, bins in pairs]

    def cost(rows: list[int]) -> int:
        return micro_batch_cost([tokens[row] for row in rows], packed=packed)

    filler = np.empty(0, np.int64)
    return [
        # Heaviest first on every rank, so that ranks which meet at a micro-step have like loads.
        [np.array(sorted(rows), np.int64) for rows in sorted(bins, key=cost, reverse=True)]
        + [filler] * (micro_steps - len(bins))
        for bins in ranks
    ]


def micro_batch_cost(lengths: Sequence[int], *, packed: bool) -> int:
    """Count the tokens computed for a micro-batch of rows with these lengths, padding included."""
    return sum(lengths) if packed else len(lengths) * max(lengths, default=0)


def _spread(rows: list[int], tokens: list[int], bins: int) -> list[list[int]]:
    """Give each row to the bin with the fewest tokens so far (LPT, as `rows` come longest first).

    The row that makes a bin the fullest found it the emptiest, at or below the mean: so no bin
    exceeds the mean plus the longest row (Graham, Bounds on Multiprocessing Anomalies, 1969).
    """
    filled: list[list[int]] = [[] for _ in range(bins)]
    loads = [(0, i) for i in range(bins)]
    for row in rows:
        load, i = loads[0]
        filled[i].append(row)
        heapq.heapreplace(loads, (load + tokens[row], i))
    return filled


def _first_fit(rows: list[int], tokens: list[int], budget: int) -> list[list[int]]:
    """Put each row into the first bin with room for it (FFD, as `rows` come longest first)."""
    filled: list[list[int]] = []
    room: list[int] = []
    for row in rows:
        need = tokens[row]
        i = next((i for i, left in enumerate(room) if need <= left), len(room))
        if i == len(room):
            filled.append([])
            room.append(budget)
        filled[i].append(row)
        room[i] -= need
    return filled


def _even_out(
    rows: list[int], fitting: list[list[int]], tokens: list[int], budget: int, bins: int
) -> list[list[int]]:
    """Spread rows evenly over the bins, or return `fitting` (nearly full) if the budget forbids."""
    even = _spread(rows, tokens, bins)
    fits = all(len(b) <= 1 or sum(tokens[row] for row in b) <= budget for b in even)
    return even if fits else fitting


def _cut(rows: list[int], tokens: list[int], budget: int) -> list[list[int]]:
    """Cut rows, longest first, into padded micro-batches that cost the least altogether.

    The fewest micro-batches would waste a third of the work on padding, so each one counts as its
    tokens and an overhead, and dynamic programming finds the cheapest cuts. Later starts have
    shorter rows: once one beats an earlier start, it does so for every later end as well.
    """
    longest = [tokens[row] for row in rows]
    best = [0.0]  # best[end]: the least cost of rows[:end], whose last run begins at starts[end]
    starts = [0]
    start = 0
    for end in range(1, len(rows) + 1):
        while start < end - 1 and (end - start) * longest[start] > budget:
            start += 1
        costs = [best[i] + (end - i) * longest[i] for i in range(start, end)]
        start += costs.index(min(costs))
        best.append(min(costs) + budget * _PADDED_OVERHEAD)
        starts.append(start)
    runs = []
    end = len(rows)
    while end:
        runs.append(rows[starts[end] : end])
        end = starts[end]
    return runs


@dataclass(frozen=True)
class Summary:
    """Foretell a run: how many steps, how much of the computing is padding or waiting."""

    steps: int
    epochs: float
    tokens_per_epoch: int
    """Real tokens of one epoch, on average over the epochs (which differ where a weight is not a
    whole number)."""
    token_efficiency: float
    """Real tokens / tokens computed, padding included."""
    balance: float
    """Tokens computed by the mean rank / by the busiest rank of each step."""
    micro_batches_per_step: float
    """Micro-batches of each rank, on average over the steps."""
    max_micro_batches_per_step: int
    sampled_steps: int
    """Steps that the last four figures come from: all of them, or that many at equal distances."""


def summarize(
    plan: Plan,
    lengths: NDArray[np.integer],
    world: int,
    budget: int,
    *,
    packed: bool,
    steps: int,
    max_steps_looked_at: int = 200,
) -> Summary:
    """Foretell the first `steps` steps from `lengths`, the tokens of each sample of the plan."""
    assert steps >= 1, steps
    assert len(lengths) == sum(plan.rows), (len(lengths), plan.rows)
    looked_at = np.unique(np.linspace(1, steps, min(steps, max_steps_looked_at)).astype(np.int64))
    real = computed = busiest = 0
    micro_batches = []
    for step in looked_at.tolist():
        tokens = np.asarray(lengths[plan.samples(step)], np.int64)
        ranks = layout(tokens, world, budget, packed=packed)
        loads = [
            sum(micro_batch_cost(tokens[rows].tolist(), packed=packed) for rows in rank)
            for rank in ranks
        ]
        real += int(tokens.sum())
        computed += sum(loads)
        busiest += max(loads)
        micro_batches.append(len(ranks[0]))

    ends = np.cumsum(plan.rows)[:-1]
    by_source = [int(part.sum(dtype=np.int64)) for part in np.split(lengths, ends)]
    parts = zip(by_source, plan.draws_by_source, plan.rows, strict=True)
    return Summary(
        steps=steps,
        epochs=steps / plan.steps_per_epoch,
        tokens_per_epoch=round(sum(tokens * draws / rows for tokens, draws, rows in parts)),
        token_efficiency=real / computed,
        balance=computed / (world * busiest),
        micro_batches_per_step=sum(micro_batches) / len(micro_batches),
        max_micro_batches_per_step=max(micro_batches),
        sampled_steps=len(looked_at),
    )
