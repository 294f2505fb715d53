"""From prompts to answers: a decoding loop on a Hugging Face model, for all who generate.

Rows of similar length go together. A finished row leaves at once, and its place goes to one that
waits. Which rows meet which depends on the requests and `batch_tokens` alone, so the same requests
give the same bytes wherever they are answered, on machines and numbers of threads that are alike.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dist_sft.errors import UserError
from dist_sft.sampling import Sampling, choose, uniforms
from dist_sft.slots import Slots, StockCache
from dist_sft.stop_strings import StopStrings

SLACK = 16  # columns to spare: so many steps go by before columns are moved to the front
WAITERS = 4  # a batch is filled up when one of so many places is free: prompts go together, too
PREFILL_TOKENS = 256  # so many keep a CPU busy: shorter prompts need not be padded to them
LIKE_LENGTH = 0.8  # of the longest: what is shorter begins another share
MOST_TOKENS = 1024  # of a share: all but the first are in memory beside the batch

Reason = Literal["eos", "stop", "length", "error", "memory"]


class Request(NamedTuple):
    """A prompt of one token or more; `row` and `sample` say which random numbers it gets."""

    prompt: Sequence[int]
    row: int = 0
    sample: int = 0


class Answer(NamedTuple):
    """What follows a prompt."""

    text: str
    """Without what ended it."""
    ids: list[int]
    """Everything that was generated but for the end token."""
    reason: Reason
    """`error` where the model's next logits were no numbers, or infinite; `memory` where there was
    not enough for this row alone."""


@dataclass
class _Row:
    """A request that is being answered."""

    number: int
    request: Request
    draws: npt.NDArray[np.float64] | None
    ids: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Return how many tokens the model has read: the newest one is its next input."""
        return len(self.request.prompt) + max(0, len(self.ids) - 1)

    @property
    def history(self) -> list[int]:
        return [*self.request.prompt, *self.ids]

    @property
    def draw(self) -> float:
        return 0.0 if self.draws is None else float(self.draws[len(self.ids)])


class Decoder:
    """Answer prompts with one model, in the way of one `Sampling`.

    The model is in eval mode and has its stock attention. `stop_ids` are the tokens that end an
    answer, `text_of` makes text of ids. `tick` is told after every step how many tokens were
    chosen and how many answers they ended, and may raise to leave.

    Where memory does not suffice, the rows that are not finished begin again, half as many at a
    time, and `shrunk` is told how many rows begin again and how many places there are now: from
    there on the last bits of their logits, and so their answers, may be other ones.

    Ranks that share one model (ZeRO-3) call with the same requests, and `agree` makes of the tokens
    [n] that each of them chose the ones that all take, such as rank 0's: then they go through the
    same forwards, whatever their last bits are. With it, memory that does not suffice is an error.

    Raises UserError for a model that has no cache of a kind that is known here.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stop_ids: Sequence[int],
        sampling: Sampling,
        text_of: Callable[[list[int]], str],
        tick: Callable[[int, int], None] = lambda tokens, answers: None,
        *,
        agree: Callable[[Tensor], Tensor] | None = None,
        shrunk: Callable[[int, int], None] = lambda rows, places: None,
    ) -> None:
        self._model = model
        self._stop_ids = frozenset(stop_ids)
        self._sampling = sampling
        self._text_of = text_of
        self._stops = StopStrings(sampling.stop, text_of)
        self._tick = tick
        self._agree = agree
        self._shrunk = shrunk
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        plain = Slots.hold(model)
        if "past_key_values" in accepted:
            self._cache_name = "past_key_values"
        elif "cache_params" in accepted and not plain:
            self._cache_name = "cache_params"
        else:
            kind = type(model).__name__
            raise UserError(f"{kind} cannot generate here: its cache is of a kind of its own")
        self._memory = Slots if plain else StockCache
        # Who is not told positions finds them out: from the mask, or by counting padding, too.
        self._pads = self._takes_positions or self._sees_no_padding()
        # A GPU is kept busy by more than a batch; and with ZeRO-3, a forward gathers all weights.
        self._shares = plain and agree is None and model.device.type == "cpu"

    @torch.no_grad()  # not inference_mode: weights that ZeRO-3 gathers in it cannot be trained
    def answer(self, requests: Sequence[Request], batch_tokens: int) -> list[Answer]:
        """Answer all requests, in their order.

        `batch_tokens` is the memory for keys and values, in tokens: rows x columns of a batch; one
        row always goes.
        """
        assert not self._model.training
        answers: dict[int, Answer] = {}
        lengths = [len(request.prompt) for request in requests]
        for numbers in grouped(lengths, self._sampling.max_new_tokens, equal=not self._pads):
            longest = len(requests[numbers[0]].prompt) + self._sampling.max_new_tokens
            places, columns = room(len(numbers), longest, batch_tokens)
            while numbers:
                waiting = deque((number, requests[number]) for number in numbers)
                try:
                    for number, answer in self._answer(waiting, places, columns):
                        answers[number] = answer
                except (RuntimeError, MemoryError) as error:
                    if self._agree or not _out_of_memory(error):
                        raise
                    if places == 1:  # the first one that is not answered
                        alone = next(number for number in numbers if number not in answers)
                        answers[alone] = Answer("", [], "memory")
                    # No later group of this call is larger: what it is for one, it is for others.
                    batch_tokens = max(1, places // 2) * columns
                numbers = [number for number in numbers if number not in answers]
                if numbers:
                    torch.cuda.empty_cache()
                    places, columns = room(len(numbers), longest, batch_tokens)
                    self._shrunk(len(numbers), places)
        return [answers[number] for number in range(len(requests))]

    @torch.no_grad()  # as a decorator it is left at every yield
    def stream(self, request: Request) -> Generator[str, None, Answer]:
        """Yield the answer to one prompt in pieces of text, as they come; return it in the end.

        Together they are its text, as long as what the model says is Unicode: with some tokenizers
        a broken character makes those before it broken, too, and they have been yielded then.
        """
        assert not self._model.training
        said = ""
        memory = self._memory(self._model, 1, len(request.prompt) + self._sampling.max_new_tokens)
        row = self._row(0, request)
        logits = self._prefill(memory, [row])
        while True:
            answer = self._take([row], logits)[0]
            text = answer.text if answer else self._stops.sure(self._text_of(row.ids))
            if len(text) > len(said):
                yield text[len(said) :]
                said = text
            if answer:
                return answer
            logits = self._step(memory, [row])

    @torch.no_grad()
    def _sees_no_padding(self) -> bool:
        """Tell whether a prompt has the same logits with padding before it."""
        prompts = [1, 2, 3], [0] * 6 + [1, 2, 3]
        alone, padded = (
            self._forward(self._memory(self._model, 1, 9), torch.tensor([prompt]), [3])
            for prompt in prompts
        )
        tolerance = 1e-3 if alone.dtype == torch.float32 else 5e-2
        return bool((alone - padded).abs().max() <= tolerance * alone.abs().max())

    def _row(self, number: int, request: Request) -> _Row:
        assert request.prompt, "a prompt without tokens"
        draws = None
        if self._sampling.temperature:
            draws = uniforms(self._sampling, request.row, request.sample)
        return _Row(number, request, draws)

    def _answer(
        self, waiting: deque[tuple[int, Request]], places: int, columns: int
    ) -> Iterator[tuple[int, Answer]]:
        """Answer rows, longest prompt first, so many at a time; yield each as it is finished."""
        memory = self._memory(self._model, places, columns)
        rows: list[_Row] = []
        while waiting or rows:
            free = places - len(rows)
            first = 0  # of the rows whose next token is to be chosen
            refills = memory.refills and self._pads
            if waiting and (not rows or (refills and WAITERS * free >= places)):
                first = len(rows)
                new = [self._row(*waiting.popleft()) for _ in range(min(free, len(waiting)))]
                logits = self._enter(memory, new, first)
                rows += new
            else:
                logits = self._step(memory, rows)
            done = {}
            for place, answer in enumerate(self._take(rows[first:], logits), start=first):
                if answer is not None:
                    done[place] = answer
                    yield rows[place].number, answer
            if done:
                kept = _closed_up(len(rows), done)
                rows = [rows[place] for place in kept]
                if rows:
                    memory.keep(kept)

    def _enter(self, memory: Slots | StockCache, new: list[_Row], at: int) -> Tensor:
        """Let rows in behind the first `at` ones; return the logits of their first tokens."""
        logits = []
        for some in _alike(new) if self._shares else [new]:
            logits.append(self._enter_together(memory, some, at))
            at += len(some)
        return torch.cat(logits) if len(logits) > 1 else logits[0]

    def _enter_together(self, memory: Slots | StockCache, new: list[_Row], at: int) -> Tensor:
        """Do so in one forward."""
        prompts: dict[tuple[int, ...], int] = {}  # samples of one row share the work
        sources = [prompts.setdefault(tuple(row.request.prompt), len(prompts)) for row in new]
        distinct = [new[sources.index(number)] for number in range(len(prompts))]
        if at:
            longest = max(len(row.request.prompt) for row in distinct)
            apart = self._memory(self._model, len(distinct), longest)
            logits = self._prefill(apart, distinct)
            memory.join(apart, sources, at)  # type: ignore[arg-type]
        else:
            memory.clear()
            logits = self._prefill(memory, distinct)
            if len(new) > len(distinct):
                memory.spread(sources)
        return logits[sources]

    def _prefill(self, memory: Slots | StockCache, rows: list[_Row]) -> Tensor:
        """Let the model read prompts, padded on the left: they end where the answers begin."""
        longest = max(len(row.request.prompt) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        for place, row in enumerate(rows):
            ids[place, longest - len(row.request.prompt) :] = torch.tensor(row.request.prompt)
        return self._forward(memory, ids, [len(row.request.prompt) for row in rows])

    def _step(self, memory: Slots | StockCache, rows: list[_Row]) -> Tensor:
        """Let the model read the newest token of every row."""
        memory.trim(max(row.length for row in rows), len(rows))
        ids = torch.tensor([[row.ids[-1]] for row in rows])
        return self._forward(memory, ids, [row.length + 1 for row in rows])

    def _forward(self, memory: Slots | StockCache, ids: Tensor, lengths: list[int]) -> Tensor:
        """Return the logits behind the last column [n, V]; `lengths` count it."""
        before, after, device = memory.width, memory.width + ids.shape[1], self._model.device
        starts = after - torch.tensor(lengths)[:, None]
        columns = torch.arange(after)[None]
        inputs = {
            "input_ids": ids.to(device),
            "attention_mask": (columns >= starts).long().to(device),
        }
        if self._takes_positions:
            inputs["position_ids"] = (columns[:, before:] - starts).clamp(min=0).to(device)
        cache = {self._cache_name: memory.cache}
        output = self._model(**inputs, **cache, **self._last_only, use_cache=True)
        memory.grow(ids.shape[1])
        logits: Tensor = output.logits[:, -1]
        return logits

    def _take(self, rows: list[_Row], logits: Tensor) -> list[Answer | None]:
        """Choose the next token of every row; return the answers that it ends."""
        sampling = self._sampling
        histories = [row.history for row in rows] if sampling.repetition_penalty != 1.0 else []
        chosen = choose(logits, sampling, histories, [row.draw for row in rows])
        tokens = (self._agree(chosen) if self._agree else chosen).tolist()
        answers = [self._add(row, token) for row, token in zip(rows, tokens, strict=True)]
        self._tick(len(tokens), sum(answer is not None for answer in answers))
        return answers

    def _add(self, row: _Row, token: int) -> Answer | None:
        """Add a token to an answer; return the answer if that ends it."""
        if token < 0 or token in self._stop_ids:
            return Answer(self._text_of(row.ids), row.ids, "error" if token < 0 else "eos")
        row.ids.append(token)
        cut = self._stops.cut(row.ids)
        if cut is not None:
            return Answer(cut, row.ids, "stop")
        if len(row.ids) == self._sampling.max_new_tokens:
            return Answer(self._text_of(row.ids), row.ids, "length")
        return None


def grouped(
    lengths: Sequence[int], max_new_tokens: int, *, equal: bool = False
) -> Iterator[list[int]]:
    """Yield numbers of prompts by their lengths, longest first, as they may share a batch.

    One long prompt must not make the memory of all others as long: in a group, none needs less than
    half of the longest one's columns. With `equal`, all are of one length.
    """
    group: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if group:
            most, length = lengths[group[0]], lengths[number]
            if 2 * (length + max_new_tokens) < most + max_new_tokens or (equal and length < most):
                yield group
                group = []
        group.append(number)
    if group:
        yield group


def _alike(rows: list[_Row]) -> Iterator[list[_Row]]:
    """Yield rows, longest prompt first, as they go through one forward: little is padding.

    Rows of one length stay together, and with them the samples of one prompt.
    """
    some: list[_Row] = []
    longest = tokens = 0
    for length, group in groupby(rows, key=lambda row: len(row.request.prompt)):
        least = PREFILL_TOKENS if length < LIKE_LENGTH * longest else MOST_TOKENS
        if tokens >= least:
            yield some
            some, longest, tokens = [], 0, 0
        same = list(group)
        some += same
        longest = max(longest, length)
        tokens += length * len({tuple(row.request.prompt) for row in same})
    yield some


def room(rows: int, longest: int, batch_tokens: int) -> tuple[int, int]:
    """Return how many rows of at most `longest` tokens go at once, and the columns of each."""
    if rows * longest <= batch_tokens:
        return rows, longest
    # Where rows take the places of others, columns are forgotten.
    columns = longest + SLACK
    return max(1, min(rows, batch_tokens // columns)), columns


def _closed_up(rows: int, gone: Collection[int]) -> list[int]:
    """Return which row is in each place when the last ones have moved into the gaps."""
    left = rows - len(gone)
    moving = (place for place in range(left, rows) if place not in gone)
    return [next(moving) if place in gone else place for place in range(left)]


def _out_of_memory(error: Exception) -> bool:
    """Tell whether memory did not suffice: what torch raises for it on CPU is any RuntimeError."""
    said = str(error)
    no_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    known = "DefaultCPUAllocator" in said or "not enough memory" in said
    return no_memory or known or said == "could not create a primitive"  # oneDNN's word for it
