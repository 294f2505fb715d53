"""Which token comes next: the right ones, as often as they should, with numbers of their own."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dist_sft.sampling import (
    BLOCK,
    NUCLEUS,
    Sampling,
    choose,
    distribution,
    drawn,
    penalized,
    uniforms,
)

LARGEST = 2**63 - 1
numbers = st.integers(0, LARGEST)
patient = settings(deadline=None)  # what torch is asked for the first time takes long


def random_logits(rows: int, size: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def test_greedy_takes_the_highest() -> None:
    logits = random_logits(5, 40)
    chosen = choose(logits, Sampling(1), [], [0.0] * 5)
    assert chosen.tolist() == [int(row.argmax()) for row in logits]


@patient
@given(st.lists(st.tuples(numbers, numbers, numbers), min_size=2, max_size=6, unique=True))
def test_no_two_answers_share_a_number(keys: list[tuple[int, int, int]]) -> None:
    drawn = [uniforms(Sampling(50, seed=seed), row, sample) for seed, row, sample in keys]
    assert len(set(np.concatenate(drawn).tolist())) == 50 * len(keys)


def test_neighbouring_keys_share_no_number() -> None:
    """A counter that another sample's counter runs into would show here."""
    few = (0, 1, 2, LARGEST - 1, LARGEST)
    drawn = [uniforms(Sampling(300, seed=s), r, n) for s, r, n in itertools.product(few, repeat=3)]
    assert len(set(np.concatenate(drawn).tolist())) == 300 * 125


def test_numbers_do_not_depend_on_how_many_are_asked_for() -> None:
    few, many = (uniforms(Sampling(n, seed=LARGEST), LARGEST, 3) for n in (5, 500))
    assert few.tolist() == many[:5].tolist()


def test_numbers_are_uniform() -> None:
    """Over rows, as one row's own are: the first number of each of many rows."""
    first = np.array([uniforms(Sampling(1, seed=7), row, 0)[0] for row in range(4000)])
    counts = np.histogram(first, bins=20, range=(0, 1))[0]
    assert chi_square(counts, np.full(20, 1 / 20)) < CRITICAL[19]


# Exceeded once in a million times where the probabilities are right.
CRITICAL = {1: 23.9, 2: 27.6, 3: 30.7, 4: 33.4, 5: 35.9, 6: 38.3, 11: 48.9, 19: 64.6}


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


SETTINGS = {
    "plain": Sampling(1, temperature=1.0),
    "cold": Sampling(1, temperature=0.5),
    "hot": Sampling(1, temperature=2.0),
    "top_k": Sampling(1, temperature=1.0, top_k=4),
    "top_p": Sampling(1, temperature=1.5, top_p=0.8),
    "both": Sampling(1, temperature=2.0, top_k=7, top_p=0.9),
}


def expected(logits: Tensor, sampling: Sampling) -> Tensor:
    """Compute the probabilities as transformers would: [n, V], adding up to 1."""
    ids = torch.zeros(len(logits), 1, dtype=torch.int64)
    scores = TemperatureLogitsWarper(sampling.temperature)(ids, logits)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1.0:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
    return scores.double().softmax(-1)


@pytest.mark.parametrize("name", SETTINGS)
def test_frequencies_are_the_probabilities(name: str) -> None:
    """Of one row of logits, drawn with the numbers of 20000 rows."""
    sampling, many = SETTINGS[name], 20_000
    logits = random_logits(1, 12, seed=3) / 2
    draws = [uniforms(sampling, row, 0)[0] for row in range(many)]
    chosen = Counter(choose(logits.expand(many, -1), sampling, [], draws).tolist())
    probabilities = expected(logits, sampling)[0].numpy()
    possible = np.flatnonzero(probabilities)
    assert set(chosen) <= set(possible.tolist())
    counts = np.array([chosen[token] for token in possible])
    assert chi_square(counts, probabilities[possible]) < CRITICAL[len(possible) - 1]
    # The same test tells a wrong distribution from the right one.
    wrong = expected(logits, Sampling(1, temperature=sampling.temperature * 1.5))[0].numpy()
    wrong = wrong[possible] / wrong[possible].sum()
    assert chi_square(counts, wrong) > CRITICAL[len(possible) - 1]


@patient
@given(
    st.integers(2, 1000),
    st.floats(0.1, 3.0),
    st.integers(0, 1000),
    st.floats(0.01, 0.98) | st.just(1.0),
    st.integers(0, 2**31),
)
def test_top_k_and_top_p_are_those_of_transformers(
    size: int, temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    sampling = Sampling(1, temperature=temperature, top_k=top_k, top_p=top_p)
    logits = random_logits(3, size, seed)
    theirs = expected(logits, sampling)
    ours = distribution(logits, sampling).double()
    ours /= ours.sum(-1, keepdim=True)
    # The sums that top_p is compared with are rounded otherwise: at the border tokens may differ.
    largest, ids = expected(logits, replace(sampling, top_p=1.0)).sort(descending=True)
    clear = ((largest.cumsum(-1) - largest) - top_p).abs() > 1e-5
    assert torch.equal(clear & (ours > 0).gather(1, ids), clear & (theirs > 0).gather(1, ids))
    if torch.equal(ours > 0, theirs > 0):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_the_token_that_reaches_top_p_stays() -> None:
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log()
    for top_p, stays in (
        (0.01, [1]),
        (0.49, [1]),
        (0.51, [1, 2]),
        (0.79, [1, 2]),
        (0.81, [0, 1, 2]),
    ):
        probabilities = distribution(logits, Sampling(1, temperature=1.0, top_p=top_p))[0]
        assert probabilities.nonzero()[:, 0].tolist() == stays


def test_nuclei_of_all_sizes_beside_each_other() -> None:
    """Within what is sorted first, within what is sorted then, and larger; each as if alone."""
    size = 3 * NUCLEUS[1]
    spread = torch.tensor([10, 4 * NUCLEUS[0], 2 * NUCLEUS[1], 5, 2 * NUCLEUS[1] + 1])
    tokens = torch.arange(size)
    logits = torch.where(tokens < spread[:, None], 10 - tokens / (2 * spread[:, None]), -10.0)
    logits = logits[:, torch.randperm(size, generator=torch.Generator().manual_seed(0))]
    sampling = Sampling(1, temperature=1.0, top_p=0.9)
    stays = (distribution(logits, sampling) > 0).sum(-1).tolist()
    largest = logits.double().softmax(-1).sort(descending=True).values
    assert stays == (largest.cumsum(-1) - largest < 0.9).sum(-1).tolist()
    assert stays[0] < NUCLEUS[0] < stays[1] < NUCLEUS[1] < stays[2]
    for row, count in zip(logits, stays, strict=True):
        assert (distribution(row[None], sampling) > 0).sum() == count


@patient
@given(st.integers(1, 3 * BLOCK + 1), st.floats(0, 1, exclude_max=True), st.integers(0, 2**31))
def test_a_draw_is_where_the_running_sum_exceeds_it(size: int, draw: float, seed: int) -> None:
    """Half of the tokens are impossible: never one of them."""
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(3, size, generator=generator)
    probabilities *= torch.rand(3, size, generator=generator) < 0.5
    probabilities[:, seed % size] = 0.5
    chosen = drawn(probabilities, torch.full((3,), draw, dtype=torch.float64))
    cumulative = probabilities.double().cumsum(-1)
    wanted = draw * cumulative[:, -1]
    for row in range(3):
        assert probabilities[row, chosen[row]] > 0
        before = cumulative[row, chosen[row]] - probabilities[row, chosen[row]]
        assert before - 1e-9 <= wanted[row] <= cumulative[row, chosen[row]] + 1e-9


def test_sums_that_are_rounded_otherwise_choose_no_impossible_token() -> None:
    """Numbers of all sizes, whose sum depends on the order; draws up to the largest there is."""
    probabilities = torch.rand(500, 200, generator=torch.Generator().manual_seed(0)) ** 40
    probabilities[:, 150:] = 0
    double = probabilities.double()
    assert (double.sum(-1) > double.cumsum(-1)[:, -1]).any()
    chosen = drawn(probabilities, torch.full((500,), 1 - 2**-53, dtype=torch.float64))
    assert (probabilities.gather(1, chosen[:, None]) > 0).all()


def test_equals_at_the_border_stay_whatever_their_order() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0], [1.0, 0.0, 2.0, 1.0]])
    for sampling in (
        Sampling(1, temperature=1.0, top_k=2),
        Sampling(1, temperature=1.0, top_p=0.7),
    ):
        assert (distribution(logits, sampling) > 0).tolist() == (logits > 0.5).tolist()


def test_the_penalty_is_that_of_transformers() -> None:
    logits, histories = random_logits(3, 20), [[4, 4, 5], [1], [0, 19, 3, 0, 7]]
    ours = penalized(logits, histories, 1.7)
    for row, history in enumerate(histories):
        theirs = RepetitionPenaltyLogitsProcessor(1.7)(
            torch.tensor([history]), logits[row : row + 1].clone()
        )
        assert torch.equal(ours[row : row + 1], theirs)


def test_the_penalty_changes_what_is_chosen() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]] * 2)
    sampling = Sampling(1, repetition_penalty=2.0)
    assert choose(logits, sampling, [[1], [0]], [0.0, 0.0]).tolist() == [2, 1]


def test_a_draw_is_the_place_in_vocabulary_order() -> None:
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).expand(6, -1)
    draws = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert drawn(probabilities, draws).tolist() == [1, 1, 3, 3, 4, 4]


@patient
@given(st.integers(0, 2**31), st.sampled_from([0.0, 1e-12, 1 - 2**-53]))
def test_the_outermost_draws_choose_a_possible_token(seed: int, draw: float) -> None:
    sampling = Sampling(1, temperature=1.0, top_k=3)
    logits = random_logits(4, 50, seed)
    probabilities = distribution(logits, sampling)
    chosen = choose(logits, sampling, [], [draw] * 4)
    assert (probabilities.gather(1, chosen[:, None]) > 0).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_choose_nothing(temperature: float, bad: float) -> None:
    logits = random_logits(3, 10)
    logits[1, 4] = bad
    sampling = Sampling(1, temperature=temperature, top_k=5, top_p=0.9)
    chosen = choose(logits, sampling, [], [0.5] * 3).tolist()
    assert chosen[1] == -1
    assert min(chosen[0], chosen[2]) >= 0


def test_tokens_that_cannot_be_are_no_error() -> None:
    """Models put -inf where a token is impossible."""
    logits = random_logits(1, 10)
    logits[0, 3:] = -torch.inf
    for temperature in (0.0, 1.0):
        assert 0 <= choose(logits, Sampling(1, temperature=temperature), [], [0.9]).item() < 3


def test_half_precision_is_drawn_from_in_full() -> None:
    """Probabilities of bfloat16 add up to anything between 0.9 and 1.1."""
    logits = random_logits(1, 1000).bfloat16()
    sampling = Sampling(1, temperature=1.0)
    assert distribution(logits.float(), sampling).sum().item() == pytest.approx(1.0, abs=1e-5)
    draw = 0.7
    wanted = int((logits[0].double().softmax(-1).cumsum(0) > draw).nonzero()[0])
    assert choose(logits, sampling, [], [draw]).item() == wanted
