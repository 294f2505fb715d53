"""The decoding loop against `generate`, and what its memory must never mix up."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest
import torch
from scripted_model import BEGIN, ScriptedModel, saying
from tiny_models import CONFIGS, VOCAB, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from dist_sft import decode
from dist_sft.decode import Answer, Decoder, Request, grouped
from dist_sft.errors import UserError
from dist_sft.sampling import Sampling, distribution
from dist_sft.slots import Slots

EOS = 2
LENGTHS = [23, 5, 1, 11, 8, 30, 2, 11]  # longer than the windows; the shortest that can be
PLAIN = ("llama", "qwen2", "gpt2", "bloom", "opt", "mistral", "gemma3_text", "deepseek_v3")
"""Models that remember keys and values only."""
OTHERS = ("lfm2", "qwen3_next", "mamba")
EQUAL_ONLY = {"bart"}  # counts positions without looking at the mask
OWN_WAY = {"xlstm"}  # a cache of its own class


def prompts_of(lengths: Sequence[int], vocab_size: int = VOCAB) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def as_text(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def decoder(model: Any, sampling: Sampling, *args: Any, **kwargs: Any) -> Decoder:
    return Decoder(model, [EOS], sampling, as_text, *args, **kwargs)


def generated(
    model: PreTrainedModel, prompt: list[int], max_new_tokens: int, **kwargs: Any
) -> list[int]:
    """Return what transformers answers to one prompt alone, with the end token."""
    output: Tensor = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=0,
        forced_eos_token_id=None,  # BART's
        **kwargs,
    )
    ids: list[int] = output[0, len(prompt) :].tolist()
    return ids


def with_end(answer: Answer) -> list[int]:
    return [*answer.ids, EOS] if answer.reason == "eos" else answer.ids


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in OWN_WAY])
def test_greedy_is_generate(name: str) -> None:
    """Rows that leave and rows that come, beside each other, in float32."""
    model = tiny_model(name)
    prompts = prompts_of(LENGTHS)
    theirs = [generated(model, prompt, 20) for prompt in prompts]
    ours = decoder(model, Sampling(20)).answer([Request(prompt) for prompt in prompts], 300)
    assert [with_end(answer) for answer in ours] == theirs
    assert name not in PLAIN or Slots.hold(model)
    assert name not in OTHERS or not Slots.hold(model)
    assert (name not in EQUAL_ONLY) == decoder(model, Sampling(20))._pads
    together = decoder(model, Sampling(20)).answer([Request(prompt) for prompt in prompts], 10**6)
    assert together == ours


@pytest.mark.parametrize("name", sorted(OWN_WAY))
def test_a_cache_of_an_unknown_kind_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="cannot generate here"):
        decoder(tiny_model(name), Sampling(1))


def test_ranks_that_agree_take_the_same_way() -> None:
    """The second one's model would say other things, and end elsewhere."""
    models = [tiny_model("llama"), tiny_model("qwen2")]
    requests = [Request(prompt, row) for row, prompt in enumerate(prompts_of(LENGTHS))]
    sampling = Sampling(20, temperature=1.0)
    alone = [decoder(model, sampling).answer(requests, 300) for model in models]
    assert alone[0] != alone[1]
    broadcast: list[Tensor] = []

    def send(tokens: Tensor) -> Tensor:
        broadcast.append(tokens.clone())
        return tokens

    first = decoder(models[0], sampling, agree=send).answer(requests, 300)
    received = iter(broadcast)
    second = decoder(models[1], sampling, agree=lambda tokens: next(received))
    assert first == second.answer(requests, 300) == alone[0]
    assert next(received, None) is None


def test_one_new_token_and_a_penalty_are_as_in_generate() -> None:
    model = tiny_model("llama")
    prompts = prompts_of(LENGTHS)
    for new, penalty in ((1, 1.0), (20, 1.6)):
        theirs = [generated(model, x, new, repetition_penalty=penalty) for x in prompts]
        ours = decoder(model, Sampling(new, repetition_penalty=penalty))
        assert [with_end(x) for x in ours.answer([Request(x) for x in prompts], 300)] == theirs
    assert theirs != [generated(model, prompt, 20) for prompt in prompts]


def test_answers_are_told_with_their_ends() -> None:
    answers = [[5, 6, 7], [8] * 6, [9, 5], []]
    model = ScriptedModel(saying(answers, EOS), VOCAB)
    requests = [Request([n + 1, BEGIN]) for n in range(len(answers))]
    ours = decoder(model, Sampling(4, stop=("9 5",))).answer(requests, 10**6)
    assert ours == [
        Answer("5 6 7", [5, 6, 7], "eos"),
        Answer("8 8 8 8", [8] * 4, "length"),
        Answer("", [9, 5], "stop"),
        Answer("", [], "eos"),
    ]


@contextmanager
def counted(slack: int, prefill_tokens: int = 256) -> Iterator[Counter[str]]:
    """Count what happens to the memory, of which fewer columns are to spare."""
    counts: Counter[str] = Counter()
    join, copy, trim = Slots.join, Slots._copy, Slots.trim

    def counted_join(self: Slots, others: Slots, sources: list[int], at: int) -> None:
        counts["refilled"] += 1
        counts["refilled, longer than some"] += others.width < self.width
        counts["samples refilled"] += len(sources) > len(set(sources))
        join(self, others, sources, at)

    def counted_copy(self: Slots, moves: list[tuple[int, int]]) -> None:
        counts["moved down"] += any(place < row for place, row in moves)
        counts["spread"] += any(place > row for place, row in moves)
        copy(self, moves)

    def counted_trim(self: Slots, width: int, rows: int) -> None:
        before = self._begin, self._end
        trim(self, width, rows)
        counts["forgotten"] += self._begin > before[0]
        counts["moved to the front"] += self._end < before[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Slots, "join", counted_join)
        patch.setattr(Slots, "_copy", counted_copy)
        patch.setattr(Slots, "trim", counted_trim)
        patch.setattr(decode, "SLACK", slack)
        patch.setattr(decode, "PREFILL_TOKENS", prefill_tokens)
        yield counts


def test_no_mixture_of_lengths_mixes_rows_up() -> None:
    """Every kind of move in the memory, and every token where it belongs."""
    total: Counter[str] = Counter()
    for seed in range(60):
        random = Random(seed)
        most = random.choice([3, 12, 40])
        answers = [
            [random.randrange(3, VOCAB) for _ in range(random.randrange(most))]
            for _ in range(random.randrange(1, 50))
        ]
        prompts = [
            [n + 1, *random.choices(range(3, VOCAB), k=random.randrange(20)), BEGIN]
            for n in range(len(answers))
        ]
        samples = random.choice([1, 1, 3])
        requests = [
            Request(x, row, sample) for row, x in enumerate(prompts) for sample in range(samples)
        ]
        model = ScriptedModel(saying(answers, EOS), VOCAB)
        sampling = Sampling(random.choice([5, 8, 50]))
        share = random.choice([1, 30, 256])
        with counted(slack=random.choice([1, 2, 64]), prefill_tokens=share) as counts:
            ours = decoder(model, sampling).answer(requests, random.choice([1, 200, 500, 10**6]))
        for request, answer in zip(requests, ours, strict=True):
            wanted = answers[request.row]
            assert answer.ids == wanted[: sampling.max_new_tokens]
            assert answer.reason == ("eos" if len(wanted) < sampling.max_new_tokens else "length")
        total += counts
    assert len(total) == 7, total
    assert min(total.values()) >= 5, total


def test_finished_rows_leave_and_waiting_ones_come() -> None:
    """The whole course of a batch: who is read when."""
    answers = [[5] * n for n in (1, 4, 4, 9, 2, 2)]
    requests = [Request([n + 1, 3, BEGIN]) for n in range(6)]
    model = ScriptedModel(saying(answers, EOS), VOCAB)
    with counted(slack=0):
        decoder(model, Sampling(20)).answer(requests, 4 * (3 + 20))
    assert model.shapes == [
        *[(4, 3), (4, 1)],  # row 0 says one token and its end
        *[(1, 3), (4, 1), (4, 1)],  # row 4 comes and says two and its end
        *[(1, 3), (4, 1)],  # row 5 comes; rows 1 and 2 say the end after four
        (2, 1),  # row 5 says its end after two
        *[(1, 1)] * 4,  # row 3 is left
    ]


def test_samples_share_the_prefill() -> None:
    answers = [[5] * 4, [6] * 3]
    model = ScriptedModel(saying(answers, EOS), VOCAB)
    requests = [Request([n + 1, 3, BEGIN], n, sample) for n in range(2) for sample in range(3)]
    ours = decoder(model, Sampling(20)).answer(requests, 10**6)
    assert model.shapes == [(2, 3), (6, 1), (6, 1), (6, 1), (3, 1)]
    assert [answer.ids for answer in ours] == [[5] * 4] * 3 + [[6] * 3] * 3


def test_prompts_are_padded_to_others_of_like_length() -> None:
    """As soon as they are enough to keep the processor busy; samples of one stay together."""
    lengths = [40, 35, 35, 30, 20, 20, 9, 3, 3]
    prompts = [[n + 1, *[3] * (length - 2), BEGIN] for n, length in enumerate(lengths)]
    model = ScriptedModel(saying([[5]] * len(lengths), EOS), VOCAB)
    requests = [Request(prompt, row, s) for row, prompt in enumerate(prompts) for s in range(2)]
    with counted(slack=0, prefill_tokens=60), pytest.MonkeyPatch.context() as patch:
        ours = decoder(model, Sampling(40)).answer(requests, 10**6)
        patch.setattr(decode, "MOST_TOKENS", 40)
        fewer = decoder(model, Sampling(40)).answer(requests, 10**6)
        together = decoder(model, Sampling(40), agree=lambda tokens: tokens)  # ZeRO-3
        at_once = together.answer(requests, 10**6)
    assert model.shapes == [
        *[(3, 40), (3, 30), (3, 9), (18, 1)],
        *[(1, 40), (2, 35), (3, 30), (3, 9), (18, 1)],
        *[(9, 40), (18, 1)],
    ]
    assert [answer.ids for answer in ours] == [[5]] * 18
    assert ours == fewer == at_once


def test_a_batch_keeps_within_its_tokens_and_prompts_of_like_length_go_together() -> None:
    sampling = Sampling(30)
    lengths = [3, 100, 5, 40, 4, 99, 200]
    assert list(grouped(lengths, 30)) == [[6, 1, 5], [3, 2], [4, 0]]
    assert list(grouped([3, 4, 3, 4], 30, equal=True)) == [[1, 3], [0, 2]]
    assert list(grouped([], 30)) == []
    answers = [[5] * 29 for _ in range(40)]
    requests = [Request([n + 1, *[3] * 18, BEGIN]) for n in range(40)]
    spare = decode.SLACK * 10
    for batch_tokens, places in ((1, 1), (500 + spare, 10), (2000, 40), (10**6, 40)):
        model = ScriptedModel(saying(answers, EOS), VOCAB)
        decoder(model, sampling).answer(requests, batch_tokens)
        assert max(rows for rows, _ in model.shapes) == places
    assert decoder(model, sampling).answer([], 1) == []


def sampled(model: PreTrainedModel, rows: int, batch_tokens: int, **kwargs: Any) -> list[Answer]:
    prompts = prompts_of([3 + n % 20 for n in range(rows)], model.config.vocab_size)
    requests = [Request(prompt, row) for row, prompt in enumerate(prompts)]
    sampling = Sampling(**{"max_new_tokens": 20, "temperature": 0.9, "top_p": 0.95} | kwargs)
    return decoder(model, sampling).answer(requests, batch_tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_requests_give_the_same_bytes(dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    once, again = (sampled(model, 40, 500, seed=2**63 - 1) for _ in range(2))
    assert once == again
    assert once != sampled(model, 40, 500, seed=2**63 - 2)
    assert len({tuple(answer.ids) for answer in once}) > 35


def test_another_batch_keeps_nearly_all_sampled_rows() -> None:
    model = tiny_model("qwen2")
    first = sampled(model, 100, 500)
    for batch_tokens in (1, 3000, 10**6):
        other = sampled(model, 100, batch_tokens)
        assert sum(a == b for a, b in zip(first, other, strict=True)) >= 97


def test_another_batch_changes_greedy_rows_only_where_two_tokens_are_alike() -> None:
    """Every token has a twin, whose logit differs by what rounding makes of it."""
    model = tiny_model("llama")
    head = model.lm_head.weight.data
    head[1::2] = head[:-1:2] * (1 + 1e-7 * torch.randn(len(head[1::2]), 1))
    first = sampled(model, 100, 500, temperature=0.0)
    differing = 0
    for batch_tokens in (1, 3000, 10**6):
        other = sampled(model, 100, batch_tokens, temperature=0.0)
        prompts = prompts_of([3 + n % 20 for n in range(100)], VOCAB)
        for prompt, a, b in zip(prompts, first, other, strict=True):
            if a != b:
                differing += 1
                pairs = zip(with_end(a), with_end(b), strict=False)
                same = next(n for n, (x, y) in enumerate(pairs) if x != y)
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + a.ids[:same]])).logits[0, -1]
                best, second = logits.topk(2).values
                assert best - second < 1e-4
    assert differing, "the twins are not alike enough for this test"


def test_sampled_frequencies_are_the_models_probabilities() -> None:
    """Over 4000 samples of one prompt: the first token, and the second after the likeliest."""
    model = tiny_model("llama", vocab_size=12)
    sampling = Sampling(2, temperature=2.0, top_k=9, top_p=0.95, seed=5)
    prompt = [3, 7, 5]
    requests = [Request(prompt, 0, sample) for sample in range(4000)]
    answers = Decoder(model, [], sampling, as_text).answer(requests, 10**6)
    firsts = Counter(answer.ids[0] for answer in answers)
    likeliest = firsts.most_common(1)[0][0]
    seconds = Counter(answer.ids[1] for answer in answers if answer.ids[0] == likeliest)
    for read, counts in ((prompt, firsts), ([*prompt, likeliest], seconds)):
        with torch.no_grad():
            logits = model(torch.tensor([read])).logits[:, -1]
        probabilities = distribution(logits, sampling)[0].double()
        probabilities /= probabilities.sum()
        possible = probabilities.nonzero()[:, 0].tolist()
        assert set(counts) <= set(possible)
        assert len(possible) >= 4
        many = counts.total()
        assert many >= 400
        for token in possible:
            expected = many * float(probabilities[token])
            assert abs(counts[token] - expected) < 5 * math.sqrt(expected) + 1


def test_half_precision_is_near_generate() -> None:
    """Other shapes round otherwise, so the answers may part; they begin alike."""
    model = tiny_model("llama").bfloat16()
    prompts = prompts_of(LENGTHS)
    ours = decoder(model, Sampling(5)).answer([Request(prompt) for prompt in prompts], 300)
    theirs = [generated(model, prompt, 5) for prompt in prompts]
    alike = [with_end(a)[0] == b[0] for a, b in zip(ours, theirs, strict=True)]
    assert sum(alike) >= len(alike) - 1


def test_a_row_of_which_the_model_makes_no_numbers_harms_no_other() -> None:
    """Those that were beside it, and those that take its place."""
    model = tiny_model("llama", tie_word_embeddings=False)
    model.model.embed_tokens.weight.data[3] = math.inf
    prompts = [[token if token != 3 else 4 for token in x] for x in prompts_of(LENGTHS * 3)]
    bad = [5, 11, 20]
    for number in bad:
        prompts[number][-1] = 3
    ours = decoder(model, Sampling(20)).answer([Request(prompt) for prompt in prompts], 300)
    for number, (prompt, answer) in enumerate(zip(prompts, ours, strict=True)):
        if number in bad:
            assert answer == Answer("", [], "error")
        else:
            assert with_end(answer) == generated(model, prompt, 20)


class Full(ScriptedModel):
    """Has no memory for more than `limit` rows."""

    limit = 3
    fault: Any = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def forward(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(input_ids) > self.limit:
            if isinstance(self.fault, int):
                torch.empty(self.fault)
            raise self.fault
        return super().forward(input_ids, *args, **kwargs)

    __call__ = forward


ANSWERS = [[5] * n for n in (1, 4, 14, 9, 2, 3, 8, 0, 7, 6)]
REQUESTS = [Request([n + 1, *[3] * (n % 4), BEGIN]) for n in range(10)]


def full(limit: int, fault: Any = Full.fault) -> Full:
    model = Full(saying(ANSWERS, EOS), VOCAB)
    # Its signature is what a Decoder looks at.
    model.forward, model.limit, model.fault = ScriptedModel.forward, limit, fault  # type: ignore
    return model


ONEDNN = RuntimeError("could not create a primitive")


@pytest.mark.parametrize("fault", [Full.fault, MemoryError("numpy"), ONEDNN, 2**60])
def test_rows_that_do_not_fit_into_memory_begin_again_in_halves(fault: Any) -> None:
    """The last fault is what torch really says on CPU."""
    told: list[tuple[int, int]] = []
    shrinking = decoder(full(3, fault), Sampling(20), shrunk=lambda *x: told.append(x))
    assert [answer.ids for answer in shrinking.answer(REQUESTS, 10**6)] == ANSWERS
    assert told == [(10, 3)]
    assert [answer.ids for answer in shrinking.answer(REQUESTS[:3], 10**6)] == ANSWERS[:3]
    assert len(told) == 1, "three of them fit at once"


def test_memory_that_is_full_in_the_middle_keeps_finished_answers() -> None:
    model, told = full(10), []
    steps = 0

    def tick(tokens: int, answers: int) -> None:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise torch.OutOfMemoryError

    shrinking = decoder(model, Sampling(20), tick, shrunk=lambda *x: told.append(x))
    assert [answer.ids for answer in shrinking.answer(REQUESTS, 10**6)] == ANSWERS
    assert told == [(6, 3)]


def test_rows_that_do_not_fit_alone_are_given_up_one_by_one() -> None:
    told: list[tuple[int, int]] = []
    shrinking = decoder(full(0), Sampling(20), shrunk=lambda *x: told.append(x))
    answers = shrinking.answer(REQUESTS, 10**6)
    assert {(answer.text, answer.reason) for answer in answers} == {("", "memory")}
    assert told == [(10, 3), (10, 1), *((rows, 1) for rows in range(9, 0, -1))]


class TooLong(ScriptedModel):
    """Has no memory for a prompt of the longest length."""

    def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if input_ids.shape[1] >= max(len(request.prompt) for request in REQUESTS):
            raise torch.OutOfMemoryError
        return self.forward(input_ids, *args, **kwargs)


def test_a_row_that_does_not_fit_alone_costs_no_other_one() -> None:
    answers = decoder(TooLong(saying(ANSWERS, EOS), VOCAB), Sampling(20)).answer(REQUESTS, 10**6)
    assert [n for n, answer in enumerate(answers) if answer.reason == "memory"] == [3, 7]
    assert [answer.ids for n, answer in enumerate(answers) if n not in (3, 7)] == [
        ids for n, ids in enumerate(ANSWERS) if n not in (3, 7)
    ]


def test_other_errors_and_ranks_that_agree_do_not_shrink() -> None:
    with pytest.raises(RuntimeError, match="illegal"):
        decoder(full(3, RuntimeError("illegal")), Sampling(20)).answer(REQUESTS, 10**6)
    with pytest.raises(torch.OutOfMemoryError):
        decoder(full(3), Sampling(20), agree=lambda tokens: tokens).answer(REQUESTS, 10**6)


def test_tick_is_told_every_token_and_may_leave() -> None:
    model, told = ScriptedModel(saying(ANSWERS, EOS), VOCAB), []
    decoder(model, Sampling(20), lambda *x: told.append(x)).answer(REQUESTS, 10**6)
    assert sum(tokens for tokens, _ in told) == sum(len(answer) + 1 for answer in ANSWERS)
    assert sum(ended for _, ended in told) == len(ANSWERS)

    def leave(tokens: int, answers: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decoder(model, Sampling(20), leave).answer(REQUESTS, 10**6)
