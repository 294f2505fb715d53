"""From prompts to answers: a decoding loop on a Hugging Face model, for all who generate.

Rows of similar length go together. A finished row leaves at once, and its place goes to one that
waits. Which rows meet which depends on the requests and `batch_tokens` alone, so the same requests
give the same bytes wherever they are answered.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dist_sft.sampling import Sampling, choose, uniforms
from dist_sft.slots import Slots, StockCache

SLACK = 64  # columns that are given back before the oldest ones are forgotten
WAITERS = 4  # a batch is filled up when one of so many places is free: prompts go together, too
BYTES_BEHIND = 8  # tokens behind the longest stop string in which it is looked for

Reason = Literal["eos", "stop", "length"]


class Request(NamedTuple):
    """A prompt; `row` and `sample` say which random numbers its answer is drawn with."""

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

    `stop_ids` are the tokens that end an answer, `text_of` makes text of ids. `tick` is told after
    every forward how many tokens were chosen, and may raise to leave.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stop_ids: Sequence[int],
        sampling: Sampling,
        text_of: Callable[[list[int]], str],
        tick: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        self._model = model
        self._stop_ids = frozenset(stop_ids)
        self._sampling = sampling
        self._text_of = text_of
        self._tick = tick
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._memory = Slots if Slots.hold(model) else StockCache

    @torch.inference_mode()
    def answer(self, requests: Sequence[Request], batch_tokens: int) -> list[Answer]:
        """Answer all requests, in their order.

        `batch_tokens` is the memory for keys and values, in tokens: rows x columns of a batch; one
        row always goes.
        """
        answers: dict[int, Answer] = {}
        for numbers in grouped([len(request.prompt) for request in requests], self._sampling):
            waiting = deque(self._row(number, requests[number]) for number in numbers)
            columns = len(waiting[0].request.prompt) + self._sampling.max_new_tokens + SLACK
            slots = max(1, min(len(waiting), batch_tokens // columns))
            for row, answer in self._answer(waiting, slots, columns):
                answers[row.number] = answer
        return [answers[number] for number in range(len(requests))]

    @torch.inference_mode()  # as a decorator it is left at every yield
    def stream(self, request: Request) -> Iterator[str]:
        """Yield the answer to one prompt in pieces of text, as they come."""
        said = ""
        memory = self._memory(self._model, 1, len(request.prompt) + self._sampling.max_new_tokens)
        row = self._row(0, request)
        logits = self._prefill(memory, [row])
        while True:
            answer = self._take([row], logits)[0]
            text = answer.text if answer else self._text_of(row.ids)
            sure = text if answer else _surely_said(text, self._sampling.stop)
            if len(sure) > len(said):
                yield sure[len(said) :]
                said = sure
            if answer:
                return
            logits = self._step(memory, [row])

    def _row(self, number: int, request: Request) -> _Row:
        draws = None
        if self._sampling.temperature:
            draws = uniforms(self._sampling, request.row, request.sample)
        return _Row(number, request, draws)

    def _answer(
        self, waiting: deque[_Row], slots: int, columns: int
    ) -> Iterator[tuple[_Row, Answer]]:
        """Answer rows, longest prompt first, so many at a time; yield each as it is finished."""
        memory = self._memory(self._model, slots, columns)
        rows: list[_Row] = []
        while waiting or rows:
            free = slots - len(rows)
            first = 0  # of the rows whose next token is to be chosen
            if waiting and (not rows or (memory.refills and WAITERS * free >= slots)):
                first = len(rows)
                new = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                logits = self._enter(memory, new, len(rows))
                rows += new
            else:
                oldest = memory.end - max(row.length for row in rows)
                if oldest >= SLACK:
                    memory.shift(oldest, len(rows))
                logits = self._step(memory, rows)
            answers = self._take(rows[first:], logits)
            done = {}
            for place, answer in enumerate(answers, start=first):
                if answer is not None:
                    done[place] = answer
                    yield rows[place], answer
            if done:
                kept = _closed_up(len(rows), done)
                rows = [rows[place] for place in kept]
                if rows:
                    memory.keep(kept)

    def _enter(self, memory: Slots | StockCache, new: list[_Row], at: int) -> Tensor:
        """Let rows in behind the first `at` ones; return the logits of their first tokens."""
        prompts: dict[int, int] = {}  # samples of one row have the same one, and share the work
        sources = [prompts.setdefault(id(row.request.prompt), len(prompts)) for row in new]
        distinct = [new[sources.index(number)] for number in range(len(prompts))]
        longest = max(len(row.request.prompt) for row in distinct)
        apart = self._memory(self._model, len(distinct), longest)
        logits = self._prefill(apart, distinct)
        memory.join(apart, sources, at)  # type: ignore[arg-type]
        return logits[torch.tensor(sources, device=logits.device)]

    def _prefill(self, memory: Slots | StockCache, rows: list[_Row]) -> Tensor:
        """Let the model read prompts, padded on the left: they end where the answers begin."""
        longest = max(len(row.request.prompt) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        for place, row in enumerate(rows):
            ids[place, longest - len(row.request.prompt) :] = torch.tensor(row.request.prompt)
        return self._forward(memory, ids, [len(row.request.prompt) for row in rows])

    def _step(self, memory: Slots | StockCache, rows: list[_Row]) -> Tensor:
        """Let the model read the newest token of every row."""
        ids = torch.tensor([[row.ids[-1]] for row in rows])
        return self._forward(memory, ids, [row.length + 1 for row in rows])

    def _forward(self, memory: Slots | StockCache, ids: Tensor, lengths: list[int]) -> Tensor:
        """Return the logits behind the last column [n, V]; `lengths` count it."""
        end, device = memory.end + ids.shape[1], self._model.device
        starts = end - torch.tensor(lengths)[:, None]
        columns = torch.arange(end)[None]
        inputs = {
            "input_ids": ids.to(device),
            "attention_mask": (columns >= starts).long().to(device),
        }
        if self._takes_positions:
            positions = (columns[:, memory.end :] - starts).clamp(min=0)
            inputs["position_ids"] = positions.to(device)
        logits: Tensor = self._model(
            **inputs, past_key_values=memory.cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
        memory.end = end
        return logits

    def _take(self, rows: list[_Row], logits: Tensor) -> list[Answer | None]:
        """Choose the next token of every row; return the answers that it ends."""
        sampling = self._sampling
        histories = [row.history for row in rows] if sampling.repetition_penalty != 1.0 else []
        tokens = choose(logits, sampling, histories, [row.draw for row in rows]).tolist()
        self._tick(len(tokens))
        answers: list[Answer | None] = []
        for row, token in zip(rows, tokens, strict=True):
            answer = None
            if token in self._stop_ids:
                answer = Answer(self._text_of(row.ids), row.ids, "eos")
            else:
                row.ids.append(token)
                cut = self._cut(row.ids) if sampling.stop else None
                if cut is not None:
                    answer = Answer(cut, row.ids, "stop")
                elif len(row.ids) == sampling.max_new_tokens:
                    answer = Answer(self._text_of(row.ids), row.ids, "length")
            answers.append(answer)
        return answers

    def _cut(self, ids: list[int]) -> str | None:
        """Return the text before the first stop string, or None where there is none yet."""
        stop = self._sampling.stop
        # A token is at least a byte: the newest ones are enough to see whether one has come.
        window = max(len(text.encode()) for text in stop) + BYTES_BEHIND
        if len(ids) > window and not any(x in self._text_of(ids[-window:]) for x in stop):
            return None
        text = self._text_of(ids)
        places = [place for x in stop if (place := text.find(x)) >= 0]
        return text[: min(places)] if places else None


def grouped(lengths: Sequence[int], sampling: Sampling) -> Iterator[list[int]]:
    """Yield numbers of prompts by their lengths, longest first, as they may share a batch.

    One long prompt must not make the memory of all others as long: in a group, none needs less than
    half of the longest one's columns.
    """
    group: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if group:
            most = lengths[group[0]] + sampling.max_new_tokens
            if 2 * (lengths[number] + sampling.max_new_tokens) < most:
                yield group
                group = []
        group.append(number)
    if group:
        yield group


def _closed_up(rows: int, gone: Collection[int]) -> list[int]:
    """Return which row is in each place when the last ones have moved into the gaps."""
    left = rows - len(gone)
    moving = (place for place in range(left, rows) if place not in gone)
    return [next(moving) if place in gone else place for place in range(left)]


def _surely_said(text: str, stop: Sequence[str]) -> str:
    """Leave out a character that is not whole yet, and what may be the start of a stop string."""
    text = text.rstrip("\ufffd")
    held = max((n for x in stop for n in range(1, len(x)) if text.endswith(x[:n])), default=0)
    return text[: len(text) - held]
