"""Which samples make up a step, and how a step is spread over the ranks."""

from __future__ import annotations

import json
import math
import os
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dist_sft.errors import UserError
from dist_sft.plan import Plan, Summary, layout, micro_batch_cost, summarize
from dist_sft.shuffle import mix, permute

Ints = NDArray[np.int64]

PRIMES_POWERS_AND_NEIGHBOURS = [*range(1, 40), 63, 64, 65, 127, 128, 1009, 4096, 4097, 10_000]


def one_source(rows: int, *, seed: int = 0, weight: float = 1.0, batch_size: int = 32) -> Plan:
    return Plan(rows=(rows,), weights=(weight,), seed=seed, batch_size=batch_size)


def epoch(plan: Plan, number: int = 0) -> Ints:
    first = number * plan.steps_per_epoch + 1
    return np.concatenate([plan.samples(first + i) for i in range(plan.steps_per_epoch)])


def alpaca_like(rows: int, seed: int, max_length: int) -> Ints:
    lengths = np.random.default_rng(seed).lognormal(4.4, 0.8, rows)
    return np.clip(lengths, 8, max_length).astype(np.int64)


def real_alpaca_files() -> list[Path]:
    if folder := os.environ.get("DIST_SFT_TEST_DATA"):
        return [Path(folder) / "alpaca_en_demo.json"]
    return sorted((Path(__file__).parent / "assets").glob("alpaca*.json"))


def rank_tokens(lengths: Ints, ranks: list[list[Ints]]) -> list[int]:
    return [int(sum(lengths[rows].sum() for rows in rank)) for rank in ranks]


# --- Plan: every row as often as its weight says ---------------------------------------------


@pytest.mark.parametrize("rows", PRIMES_POWERS_AND_NEIGHBOURS)
def test_an_epoch_has_every_row_exactly_once(rows: int) -> None:
    plan = one_source(rows, batch_size=97)
    assert sorted(epoch(plan)) == list(range(rows))
    assert sorted(epoch(plan, 1)) == list(range(rows))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    data=st.data(),
    seed=st.integers(-(2**70), 2**70),
    batch_size=st.integers(20, 100),
)
def test_no_row_comes_again_before_all_others_of_its_source(
    rows: list[int], data: st.DataObject, seed: int, batch_size: int
) -> None:
    weight = st.sampled_from([0.01, 0.3, 0.5, 1.0, 1.7, 2.0, 3.0])
    weights = data.draw(st.lists(weight, min_size=len(rows), max_size=len(rows)))
    plan = Plan(tuple(rows), tuple(weights), seed, batch_size)
    counts = np.zeros(sum(rows), np.int64)
    for number in range(4):
        drawn = epoch(plan, number)
        assert len(drawn) == plan.draws_per_epoch
        counts += np.bincount(drawn, minlength=len(counts))
        first = 0
        for source, n in enumerate(rows):
            mine = counts[first : first + n]
            assert mine.max() - mine.min() <= 1
            expected = (number + 1) * max(1, math.floor(n * weights[source] + 0.5))
            assert mine.sum() == expected
            first += n


def test_half_a_pass_takes_one_half_and_then_the_other() -> None:
    plan = one_source(1000, weight=0.5)
    first, second, third = (set(epoch(plan, number).tolist()) for number in range(3))
    assert len(first) == len(second) == 500
    assert first | second == set(range(1000))
    assert third not in (first, second)


def test_two_passes_take_every_row_twice() -> None:
    assert set(Counter(epoch(one_source(50, weight=2.0)).tolist()).values()) == {2}


def test_sources_are_mixed_evenly_over_an_epoch() -> None:
    plan = Plan(rows=(3000, 1000), weights=(1.0, 1.0), seed=1, batch_size=400)
    shares = [np.mean(plan.samples(step) >= 3000) for step in range(1, 11)]
    assert all(0.15 < share < 0.35 for share in shares)  # 0.25 +- 4.6 standard deviations


def test_steps_count_from_one_and_the_last_step_of_an_epoch_is_smaller() -> None:
    plan = Plan(rows=(10, 5), weights=(1.0, 2.0), seed=0, batch_size=8)
    assert (plan.draws_per_epoch, plan.steps_per_epoch) == (20, 3)
    assert [len(plan.samples(step)) for step in range(1, 7)] == [8, 8, 4, 8, 8, 4]
    assert [plan.epoch_of(step) for step in range(1, 8)] == [0, 0, 0, 1, 1, 1, 2]


def test_a_batch_larger_than_the_data_is_the_whole_epoch() -> None:
    plan = one_source(3, batch_size=100)
    assert plan.steps_per_epoch == 1
    assert sorted(plan.samples(7)) == [0, 1, 2]


def test_a_source_without_rows_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.train\.1 has 0 usable rows"):
        Plan(rows=(3, 0), weights=(1.0, 1.0), seed=0, batch_size=4)


def test_batches_never_change_between_versions() -> None:
    """A checkpoint continues with the batches of the version that wrote it: never edit these."""
    plan = Plan(rows=(1000, 70, 3), weights=(1.0, 0.5, 2.0), seed=42, batch_size=8)
    assert plan.samples(1).tolist() == [819, 368, 79, 411, 906, 21, 863, 122]
    assert plan.samples(987_654).tolist() == [304, 639, 309, 623, 516, 359, 133, 113]
    assert one_source(10_000_000, seed=7, batch_size=4).samples(1).tolist() == [
        8425474,
        7779769,
        5096536,
        5067749,
    ]


def test_a_step_costs_no_more_in_a_large_data_set() -> None:
    plan = one_source(10_000_000, batch_size=256)
    tracemalloc.start()
    plan.samples(20_000)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 256 * 1024


# --- Plan: the shuffle is a good one ----------------------------------------------------------


def chi_square_z(counts: NDArray[np.int64]) -> float:
    """Return how many standard deviations chi-square of equally likely cells is off its mean."""
    expected = counts.sum() / counts.size
    degrees = counts.size - 1
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    return (chi_square - degrees) / math.sqrt(2 * degrees)


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 6])
def test_all_orders_of_a_few_rows_are_equally_likely(rows: int) -> None:
    """Look at one shuffle alone: `Plan.samples` composes two, which would hide a weak one."""
    keys = mix(np.arange(30_000, dtype=np.uint64))
    orders = np.stack([permute(np.full(len(keys), i), rows, keys) for i in range(rows)], axis=1)
    _, counts = np.unique(orders @ rows ** np.arange(rows), return_counts=True)
    assert len(counts) == math.factorial(rows)
    assert abs(chi_square_z(counts)) < 4


def test_every_epoch_mixes_the_sources_in_another_order() -> None:
    plan = Plan(rows=(500, 500), weights=(1.0, 1.0), seed=0, batch_size=1000)
    first, second = plan.samples(1) < 500, plan.samples(2) < 500
    assert 420 < np.sum(first == second) < 580


def test_every_row_is_as_likely_at_every_place() -> None:
    cells = 20
    counts = np.zeros((cells, cells), np.int64)
    for seed in range(20):
        order = epoch(one_source(5000, seed=seed, batch_size=5000))
        np.add.at(counts, (np.arange(5000) * cells // 5000, order * cells // 5000), 1)
    # Rows and columns of one shuffle have fixed sums: fewer degrees of freedom than cells.
    expected = counts.sum() / counts.size
    degrees = (cells - 1) ** 2
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - degrees) < 4 * math.sqrt(2 * degrees)


def test_displacements_are_those_of_a_random_order() -> None:
    rows, cells = 100_003, 50
    order = epoch(one_source(rows, batch_size=rows))
    displacement = (order - np.arange(rows)) % rows
    assert abs(chi_square_z(np.bincount(displacement * cells // rows, minlength=cells))) < 4


def test_neighbours_do_not_stay_neighbours() -> None:
    rows, cells = 100_003, 50
    order = epoch(one_source(rows, batch_size=rows))
    gaps = np.diff(order) % rows
    assert np.sum((gaps == 1) | (gaps == rows - 1)) < 12  # 2 expected
    assert abs(chi_square_z(np.bincount(gaps * cells // rows, minlength=cells))) < 4


def test_seeds_and_epochs_give_unrelated_orders() -> None:
    rows = 2000
    shuffles = [
        epoch(one_source(rows, seed=seed), number) for seed in range(5) for number in (0, 1)
    ]
    for i, one in enumerate(shuffles):
        for other in shuffles[:i]:
            assert np.sum(one == other) < 12  # 1 expected
            assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(rows)


# --- layout -----------------------------------------------------------------------------------

batches = st.lists(st.integers(1, 300), min_size=1, max_size=80).map(
    lambda lengths: np.array(lengths, np.int64)
)


def first_fit_decreasing(lengths: list[int], budget: int) -> int:
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        for i, left in enumerate(room):
            if length <= left:
                room[i] -= length
                break
        else:
            room.append(budget - length)
    return len(room)


@settings(max_examples=200, deadline=None)
@given(lengths=batches, world=st.integers(1, 12), budget=st.integers(1, 700), packed=st.booleans())
def test_layout_keeps_its_promises(lengths: Ints, world: int, budget: int, packed: bool) -> None:
    ranks = layout(lengths, world, budget, packed=packed)
    assert len(ranks) == world
    assert len({len(rank) for rank in ranks}) == 1, "ranks would wait for each other for ever"
    placed = np.concatenate([rows for rank in ranks for rows in rank])
    assert sorted(placed) == list(range(len(lengths)))
    for rank in ranks:
        for rows in rank:
            assert rows.dtype == np.int64
            cost = micro_batch_cost(lengths[rows].tolist(), packed=packed)
            assert cost <= budget or len(rows) == 1
        costs = [micro_batch_cost(lengths[rows].tolist(), packed=packed) for rows in rank]
        assert costs == sorted(costs, reverse=True)
    assert max(rank_tokens(lengths, ranks)) <= lengths.sum() / world + lengths.max()


@settings(max_examples=100, deadline=None)
@given(lengths=batches, world=st.integers(1, 8), budget=st.integers(1, 700))
def test_packed_micro_steps_are_as_few_as_first_fit_needs(
    lengths: Ints, world: int, budget: int
) -> None:
    ranks = layout(lengths, world, budget, packed=True)
    rows_of_ranks = [np.concatenate(rank) for rank in ranks]
    needed = max(first_fit_decreasing(lengths[rows].tolist(), budget) for rows in rows_of_ranks)
    assert len(ranks[0]) == needed


@pytest.mark.parametrize("max_length", [256, 1024, 4096])
@pytest.mark.parametrize(("world", "rows_per_rank"), [(1, 32), (2, 8), (3, 8), (8, 9), (256, 8)])
def test_ranks_are_fair_on_alpaca_like_batches(
    world: int, rows_per_rank: int, max_length: int
) -> None:
    for seed in range(4 if world == 256 else 20):
        lengths = alpaca_like(world * rows_per_rank, seed, max_length)
        busiest = max(rank_tokens(lengths, layout(lengths, world, 8192, packed=True)))
        assert busiest <= 1.05 * max(lengths.sum() / world, lengths.max())


def test_ranks_are_fair_on_real_rows() -> None:
    """Spread Alpaca rows, with a token for every four characters."""
    for path in real_alpaca_files():
        rows = json.loads(path.read_text(encoding="utf-8"))
        characters = np.array([sum(map(len, map(str, row.values()))) for row in rows])
        for max_length in (256, 1024):
            all_lengths = np.clip(characters // 4, 1, max_length)
            plan = one_source(len(rows), batch_size=64)
            for step in range(1, plan.steps_per_epoch):
                lengths = all_lengths[plan.samples(step)]
                for world in (1, 2, 3, 5, 8):
                    ranks = layout(lengths, world, 4096, packed=True)
                    busiest = max(rank_tokens(lengths, ranks))
                    assert busiest <= 1.05 * max(lengths.sum() / world, lengths.max())


def test_ranks_meet_at_micro_steps_with_like_loads() -> None:
    lengths = alpaca_like(512, 0, 1024)
    ranks = layout(lengths, 8, 2048, packed=True)
    loads = np.array([[lengths[rows].sum() for rows in rank] for rank in ranks])
    assert loads.shape[1] > 2
    assert loads.mean() / loads.max(axis=0).mean() > 0.97


def test_padding_is_small_because_neighbours_in_length_are_together() -> None:
    lengths = alpaca_like(32, 0, 1024)
    (rank,) = layout(lengths, 1, 4096, packed=False)
    computed = sum(micro_batch_cost(lengths[rows].tolist(), packed=False) for rows in rank)
    assert lengths.sum() / computed > 0.85  # 0.5 to 0.6 in the order of the file


def test_padded_rows_of_equal_length_make_full_micro_batches() -> None:
    (rank,) = layout(np.full(32, 256), 1, 2048, packed=False)
    assert [len(rows) for rows in rank] == [8, 8, 8, 8]


def test_padded_cuts_are_the_cheapest_ones() -> None:
    """Compare with all ways to cut nine rows, each micro-batch costing 1/32 of the budget more."""
    budget = 320
    for seed in range(20):
        lengths = np.sort(np.random.default_rng(seed).integers(1, 200, 9))[::-1]

        def cost(cuts: tuple[int, ...], lengths: Ints = lengths) -> float:
            runs = [run.tolist() for run in np.split(lengths, cuts)]
            costs = [micro_batch_cost(run, packed=False) for run in runs]
            fits = all(c <= budget or len(r) == 1 for c, r in zip(costs, runs, strict=True))
            return sum(costs) + len(runs) * budget / 32 if fits else math.inf

        every_way = [
            tuple(i for i in range(1, 9) if choice & (1 << (i - 1))) for choice in range(256)
        ]
        (rank,) = layout(lengths, 1, budget, packed=False)
        chosen = sum(micro_batch_cost(lengths[rows].tolist(), packed=False) for rows in rank)
        assert chosen + len(rank) * budget / 32 == min(map(cost, every_way))


def test_more_ranks_than_rows_get_fillers() -> None:
    ranks = layout(np.array([5, 7, 6]), 5, 100, packed=True)
    assert [[rows.tolist() for rows in rank] for rank in ranks] == [[[1]], [[2]], [[0]], [[]], [[]]]


def test_rows_that_only_just_fit_are_not_evened_out_beyond_the_budget() -> None:
    ranks = layout(np.array([3, 3, 2, 2, 2]), 1, 6, packed=True)  # spread evenly: 7 and 5
    assert [rows.tolist() for rows in ranks[0]] == [[0, 1], [2, 3, 4]]


def test_ties_go_to_the_lower_position() -> None:
    ranks = layout(np.full(6, 10), 2, 20, packed=True)
    assert [[rows.tolist() for rows in rank] for rank in ranks] == [[[0, 4], [2]], [[1, 5], [3]]]


def test_every_world_size_computes_the_same_batch() -> None:
    plan = one_source(1000, batch_size=64)
    all_lengths = alpaca_like(1000, 3, 1024)
    batch = plan.samples(11)
    for world in (1, 2, 3, 7, 64, 100):
        for packed in (True, False):
            ranks = layout(all_lengths[batch], world, 2048, packed=packed)
            seen = np.concatenate([batch[rows] for rank in ranks for rows in rank])
            assert sorted(seen) == sorted(batch)


@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_for_many_ranks_is_laid_out_at_once(packed: bool) -> None:
    lengths = alpaca_like(4096, 0, 1024)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        layout(lengths, 256, 4096, packed=packed)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.1


# --- summarize --------------------------------------------------------------------------------


def test_summary_of_a_short_run_is_exact() -> None:
    plan = Plan(rows=(4, 2), weights=(1.0, 2.0), seed=0, batch_size=4)
    lengths = np.array([10, 10, 10, 10, 10, 10])
    assert summarize(plan, lengths, 3, 20, packed=True, steps=3) == Summary(
        steps=3,
        epochs=1.5,
        tokens_per_epoch=80,
        token_efficiency=1.0,
        balance=2 / 3,  # four rows on three ranks: two, one and one
        micro_batches_per_step=1.0,
        max_micro_batches_per_step=1,
        sampled_steps=3,
    )


def test_summary_counts_padding() -> None:
    plan = one_source(2, batch_size=2)
    summary = summarize(plan, np.array([100, 98]), 1, 1000, packed=False, steps=1)
    assert summary.token_efficiency == 198 / 200


def test_tokens_of_an_epoch_are_the_average_over_epochs() -> None:
    plan = Plan(rows=(4, 2), weights=(0.5, 1.0), seed=0, batch_size=2)
    lengths = np.array([1, 2, 3, 4, 100, 200])
    assert summarize(plan, lengths, 1, 300, packed=True, steps=4).tokens_per_epoch == 305


def test_summary_of_a_long_run_looks_at_some_steps_and_says_so() -> None:
    plan = one_source(4000)
    lengths = alpaca_like(4000, 0, 1024)
    whole = summarize(plan, lengths, 2, 2048, packed=False, steps=125)
    part = summarize(plan, lengths, 2, 2048, packed=False, steps=125, max_steps_looked_at=40)
    assert (whole.sampled_steps, part.sampled_steps) == (125, 40)
    assert part.tokens_per_epoch == whole.tokens_per_epoch == lengths.sum()
    assert part.token_efficiency == pytest.approx(whole.token_efficiency, abs=0.02)
    assert part.balance == pytest.approx(whole.balance, abs=0.02)


def test_ten_million_rows_are_planned_in_seconds_and_little_memory(tmp_path: Path) -> None:
    rows = 10_000_000
    np.resize(alpaca_like(10_007, 0, 1024).astype(np.int32), rows).tofile(tmp_path / "lengths")
    lengths = np.memmap(tmp_path / "lengths", np.int32, mode="r")
    plan = one_source(rows, batch_size=128)
    start = time.perf_counter()
    summary = summarize(plan, lengths, 8, 4096, packed=True, steps=plan.steps_per_epoch)
    assert time.perf_counter() - start < 5
    assert (summary.steps, summary.sampled_steps) == (78_125, 200)

    tracemalloc.start()
    summarize(plan, lengths, 8, 4096, packed=True, steps=3)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2 * 1024 * 1024
