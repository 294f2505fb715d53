"""The decoding loop against `generate`, and what its memory must never mix up."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, VOCAB, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from dist_sft.decode import Answer, Decoder, Request
from dist_sft.errors import UserError
from dist_sft.sampling import Sampling
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


def decoder(model: Any, sampling: Sampling, **kwargs: Any) -> Decoder:
    return Decoder(model, [EOS], sampling, as_text, **kwargs)


def generated(model: PreTrainedModel, prompt: list[int], max_new_tokens: int) -> list[int]:
    """Return what transformers answers to one prompt alone, with the end token."""
    output: Tensor = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=0,
        forced_eos_token_id=None,  # BART's
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
