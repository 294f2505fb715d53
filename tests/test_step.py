"""Advice when a step fails, the learning rate, and the counting of operations."""

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from dist_sft.batches import Batch
from dist_sft.config import Optimizer
from dist_sft.errors import UserError
from dist_sft.metrics import Clock, FlopCounter, matmul_rate
from dist_sft.optim import build_optimizer, learning_rate
from dist_sft.step import run_micro_batches

CPU = torch.device("cpu")


def batch(samples: list[int], tokens: int) -> Batch:
    keep = torch.zeros(1, 1, dtype=torch.bool)
    return Batch(np.array(samples), {}, keep, torch.zeros(0, dtype=torch.int64), tokens)


class FailingEngine:
    """An engine whose forward pass raises."""

    def __init__(self, error: RuntimeError) -> None:
        self.error = error

    def __call__(self, **_inputs: object) -> object:
        raise self.error

    def micro_batch(self, *, last: bool) -> torch.autograd.profiler.record_function:
        return torch.autograd.profiler.record_function(f"micro-batch, last: {last}")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_says_what_to_try(error: RuntimeError) -> None:
    with pytest.raises(UserError) as raised:
        run_micro_batches(FailingEngine(error), [batch([4, 2], 3000)], 10, Clock(CPU))
    text = str(raised.value)
    assert "micro-batch 0: 3000 tokens in 2 rows" in text
    assert "train.tokens_per_micro_batch: 1500" in text
    assert str(error).splitlines()[0] in text


def test_out_of_memory_with_a_single_row_points_at_its_length() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(UserError, match=r"single row: try data\.max_length: 1500"):
        run_micro_batches(FailingEngine(error), [batch([4], 3000)], 10, Clock(CPU))


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shape mismatch") as raised:
        run_micro_batches(
            FailingEngine(RuntimeError("shape mismatch")), [batch([1], 5)], 1, Clock(CPU)
        )
    assert not isinstance(raised.value, UserError)


def test_learning_rate_follows_the_step_alone() -> None:
    settings = Optimizer(lr=1.0, schedule="constant", warmup_steps=4)
    assert [learning_rate(s, 8, settings) for s in range(1, 7)] == [0.25, 0.5, 0.75, 1, 1, 1]
    linear = Optimizer(lr=1.0, schedule="linear")
    assert [learning_rate(s, 4, linear) for s in (1, 2, 3, 4)] == [1.0, 0.75, 0.5, 0.25]
    cosine = Optimizer(lr=2.0, schedule="cosine", warmup_ratio=0.1, min_lr_ratio=0.1)
    rates = [learning_rate(step, 100, cosine) for step in range(1, 101)]
    assert rates[9] == pytest.approx(2.0) == pytest.approx(max(rates))
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert 0.2 < rates[-1] < 0.201
    # Half-way between the peak (step 10) and the step after the last, half of the way is gone.
    middle = (learning_rate(55, 100, cosine) + learning_rate(56, 100, cosine)) / 2
    assert middle == pytest.approx(0.2 + 0.5 * 1.8, rel=1e-3)


def test_only_matrices_decay() -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8,
                                         num_hidden_layers=1, num_attention_heads=2))  # fmt: skip
    decayed, plain = build_optimizer(model, Optimizer(weight_decay=0.1)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in plain["params"]} == {
        name for name in names.values() if "norm" in name
    }
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_flops_of_a_known_model() -> None:
    config = LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536,
                         num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                         tie_word_embeddings=True)  # fmt: skip
    with torch.device("meta"):
        flops = FlopCounter(LlamaForCausalLM(config))
    body = 30 * (576 * 576 * 2 + 2 * 576 * 192 + 3 * 576 * 1536)
    lengths = np.array([100, 300])
    expected = 6 * body * 400 + 6 * 576 * 49152 * 150 + 6 * 30 * 576 * (100**2 + 300**2)
    assert flops(lengths, 150) == pytest.approx(expected)


def test_flops_leave_out_tables_and_sleeping_experts() -> None:
    lengths, targets = np.array([10, 30]), 7
    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50))
        mixture = MixtralForCausalLM(
            MixtralConfig(
                vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=4, num_local_experts=8,
                num_experts_per_tok=2,
            )
        )  # fmt: skip
    attention = 6 * 2 * 32 * (10**2 + 30**2)
    head = 6 * 32 * 50 * targets
    layer = 4 * 32 * 32 + 2 * 32 * 128  # positions are looked up, not multiplied
    assert FlopCounter(gpt2)(lengths, targets) == 6 * 2 * layer * 40 + head + attention
    layer = 4 * 32 * 32 + 32 * 8 + 2 * 3 * 32 * 64  # a router, and 2 of 8 experts
    assert FlopCounter(mixture)(lengths, targets) == 6 * 2 * layer * 40 + head + attention


def test_the_clock_adds_up_and_starts_again() -> None:
    clock = Clock(CPU)
    for _ in range(2):
        with clock("forward"):
            pass
    assert set(clock.read()) == {"forward"}
    assert clock.read() == {}


def test_matmul_rate_is_a_plausible_number() -> None:
    assert 1e8 < matmul_rate(CPU, torch.float32, seconds=0.05) < 1e15
