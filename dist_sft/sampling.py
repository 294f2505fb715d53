"""From logits to the next token: greedy, or drawn with numbers that belong to a row and a sample.

A row's draws are the same in any batch, on any number of workers and after any restart: they do not
come from a stream that rows share, and the cumulative sum runs in vocabulary order, where a last
bit moves a border between two tokens, and not in the order of probabilities, where it swaps two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

ONE = 2**52  # what a float64 still counts by ones
NUCLEUS = 128, 4096  # probabilities that are sorted first: mostly, top_p is among these
BLOCK = 256  # tokens that are added up at once: sums are fast, running sums are not


@dataclass(frozen=True)
class Sampling:
    """How an answer is chosen and where it ends; the words are those of `generate`."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 takes the most probable token."""
    top_k: int = 0
    """0 means all."""
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0


def uniforms(sampling: Sampling, row: int, sample: int) -> npt.NDArray[np.float64]:
    """Return a number in [0, 1) for each token of an answer: float64 [max_new_tokens].

    Philox is a counter-based generator: key and counter say which numbers come (Salmon et al.,
    "Parallel Random Numbers: As Easy as 1, 2, 3", 2011). All three are from 0 to 2**63 - 1.
    """
    generator = np.random.Philox(key=[sampling.seed, row], counter=[0, 0, 0, sample])
    return np.random.Generator(generator).random(sampling.max_new_tokens)


def choose(
    logits: Tensor, sampling: Sampling, histories: Sequence[Sequence[int]], draws: Sequence[float]
) -> Tensor:
    """Return the next token of each row: int64 [n], -1 where logits are no numbers or infinite.

    logits [n, V]; `histories` are the tokens before it, prompt included, which the penalty is for;
    `draws` are one uniform number per row, not looked at where tokens are not drawn.
    """
    logits = logits.float()
    if sampling.repetition_penalty != 1.0:
        logits = penalized(logits, histories, sampling.repetition_penalty)
    if not sampling.temperature:
        highest, tokens = logits.max(-1)  # NaN counts as higher than any number
        return tokens.where(highest.isfinite(), -1)
    probabilities = distribution(logits, sampling)
    return drawn(probabilities, torch.tensor(draws, dtype=torch.float64, device=logits.device))


def penalized(logits: Tensor, histories: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Make tokens that were said less probable (Keskar et al., "CTRL", 2019, section 4.1)."""
    said = [torch.tensor(history, device=logits.device) for history in histories]
    # Beside shorter histories stands a token of their own, which changes nothing.
    padded = pad_sequence(said, batch_first=True, padding_value=-1)
    ids = torch.where(padded < 0, padded[:, :1], padded)
    scores = logits.gather(1, ids)
    return logits.scatter(1, ids, torch.where(scores < 0, scores * penalty, scores / penalty))


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return probabilities [n, V], of which those that top_k and top_p leave out are 0.

    They do not add up to 1 again. Tokens as probable as the last one that stays, stay, too: which
    of equals comes first must not matter.
    """
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits.masked_fill_(logits < least, -torch.inf)
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1.0:
        least = _least_in_nucleus(probabilities, sampling.top_p)
        probabilities.masked_fill_(probabilities < least, 0.0)
    return probabilities


def _least_in_nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Return the smallest probability of the smallest set that has at least top_p: [n, 1].

    (Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020, section 3.1)
    """
    size = probabilities.shape[1]
    least = probabilities.new_zeros(len(probabilities), 1)
    rows = torch.arange(len(probabilities), device=probabilities.device)  # not known yet
    for count in (*(few for few in NUCLEUS if few < size), size):
        largest = probabilities[rows].topk(count).values
        shares = _fixed(largest)
        inside = shares.cumsum(-1) - shares < top_p * ONE
        least[rows] = largest.masked_fill(~inside, torch.inf).amin(-1, keepdim=True)
        rows = rows[inside[:, -1]]
        if not len(rows):
            break
    return least


def drawn(probabilities: Tensor, draws: Tensor) -> Tensor:
    """Return the token at which the cumulative probability exceeds each row's draw: int64 [n].

    -1 where the probabilities are no numbers.
    """
    rows, size = probabilities.shape
    blocks = F.pad(_fixed(probabilities), (0, -size % BLOCK)).view(rows, -1, BLOCK)
    upto = blocks.sum(-1).cumsum(-1)
    total = upto[:, -1:]
    # Rounding could make the product as large as the total, where no token follows.
    below = torch.minimum((draws[:, None] * total).long(), total - 1)
    block = torch.searchsorted(upto, below, right=True).clamp(max=upto.shape[1] - 1)  # for NaN
    before = F.pad(upto, (1, 0)).gather(1, block)
    within = before + blocks[torch.arange(rows, device=block.device), block[:, 0]].cumsum(-1)
    place = torch.searchsorted(within, below, right=True)
    return (block * BLOCK + place)[:, 0].where(probabilities.isfinite().all(-1), -1)


def _fixed(probabilities: Tensor) -> Tensor:
    """Return probabilities as whole numbers of 1 / `ONE`: int64.

    Their sums are exact, so it does not matter in which order a GPU adds them; of floating-point
    numbers torch has no cumulative sum there that is the same each time.
    """
    return (probabilities.double() * ONE).long()
