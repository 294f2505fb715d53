import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import VOCAB, WINDOW, tiny_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from dist_sft import attention
from dist_sft.attention import NAME, implementation, isolation, packed_inputs, prove
from dist_sft.batches import Batch
from dist_sft.step import token_loss

LENGTHS = [23, 5, 1, 11]  # longer than the windows, and the shortest that can be
CPU = torch.device("cpu")
PACKABLE = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3", "gpt_neox", "gpt2", "opt"),
    *("olmo2", "smollm3", "cohere", "granite", "qwen3_moe", "mixtral", "phimoe"),
)


def rows_of(lengths: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (1, n), generator=generator) for n in lengths]


def supervised(lengths: list[int]) -> list[Tensor]:
    """Return which positions are learned: the second half of each row, all of a row of one."""
    return [torch.arange(n)[None] >= n // 2 for n in lengths]


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def alone(model: PreTrainedModel, rows: list[Tensor], keep: list[Tensor]) -> Tensor:
    """Compute the kept positions' logits of every row by itself, by stock code only."""
    logits = [model(input_ids=row, use_cache=False).logits for row in rows]
    return torch.cat([x[kept] for x, kept in zip(logits, keep, strict=True)])


def packed(model: PreTrainedModel, rows: list[Tensor], keep: list[Tensor]) -> Tensor:
    inputs = packed_inputs([row.shape[1] for row in rows])
    with implementation(model, NAME):
        output = model(
            input_ids=torch.cat(rows, dim=1), logits_to_keep=torch.cat(keep, dim=1), **inputs
        )
    logits: Tensor = output.logits
    return logits


def relative(difference_of: Tensor, to: Tensor) -> float:
    return ((difference_of - to).abs().max() / to.abs().max()).item()


def worst_differences(model: PreTrainedModel, ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Return the largest relative differences of logits, and of any parameter's gradient."""
    targets = torch.arange(len(theirs)) % VOCAB
    F.cross_entropy(theirs, targets, reduction="sum").backward()
    expected = gradients(model)
    F.cross_entropy(ours, targets, reduction="sum").backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    # Some gradients are nothing but rounding (a key's bias moves no softmax).
    scale = max(gradient.abs().max() for gradient in expected.values())
    worst = max((found[n] - expected[n]).abs().max() / scale for n in expected)
    return relative(ours, theirs), worst.item()


@pytest.mark.parametrize("name", PACKABLE)
def test_packed_equals_unpacked(name: str) -> None:
    model = tiny_model(name)
    rows, keep = rows_of(LENGTHS), supervised(LENGTHS)

    logits, gradient = worst_differences(model, packed(model, rows, keep), alone(model, rows, keep))

    assert logits < 1e-5
    assert gradient < 1e-5
    assert prove(model, model, CPU).holds


@pytest.mark.parametrize("name", ["mistral", "phimoe"])
def test_a_window_longer_than_the_probe_is_that_of_the_stock_mask(name: str) -> None:
    # phimoe tells its attention nothing of its window: only the mask has it.
    model = tiny_model(name, sliding_window=attention.WINDOW_PROBE + 6)
    lengths = [100, 9]

    ours, theirs = (f(model, rows_of(lengths), supervised(lengths)) for f in (packed, alone))

    assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bloom", "BloomForCausalLM has no exchangeable attention"),
        ("mamba", "an example changes its neighbour's logits by"),
        ("lfm2", "an example changes its neighbour's logits by"),  # convolutions and attention
        ("qwen3_next", "can't keep packed sequences apart"),
        ("gpt_oss", "GptOssForCausalLM cannot be packed: attention sinks"),
        ("gemma2", "cannot be packed: soft-capped scores"),
        ("llama4_text", "cannot be packed: attention in chunks"),
        ("stablelm", "cannot be packed: layers that are not told where segments begin"),
        ("bart", "cannot be packed: a mask that is not simply causal"),
    ],
)
def test_other_models_fall_back_and_say_why(name: str, reason: str) -> None:
    model = tiny_model(name)
    stock = model.config._attn_implementation

    proof = prove(model, model, CPU)

    assert not proof.holds
    assert reason in proof.reason
    assert model.config._attn_implementation == stock


@pytest.mark.parametrize(
    "change", [{"use_cache": True}, {"attention_mask": torch.ones(1, 21, dtype=torch.int64)}]
)
def test_isolation_catches_the_stock_masks_leaks(change: dict[str, Any]) -> None:
    model = tiny_model("llama")

    def forward(changes: dict[str, Any]) -> attention.Forward:
        return lambda ids, lengths: model(input_ids=ids, **packed_inputs(lengths) | changes).logits

    with torch.no_grad():
        assert isolation(forward({}), VOCAB, (9, 12)).holds
        proof = isolation(forward(change), VOCAB, (9, 12))

    assert not proof.holds
    assert float(proof.reason.rsplit(" ", 1)[1]) > 0.01


def leak_in_training(model: PreTrainedModel, **inputs: Any) -> Any:
    output = model(**inputs)
    if model.training:
        output.logits = output.logits + 1e-6 * output.logits[:, :1]
    return output


def test_a_leak_in_training_mode_only_is_caught() -> None:
    model = tiny_model("llama")
    proof = prove(model, lambda **inputs: leak_in_training(model, **inputs), CPU)
    assert not proof.holds
    assert "neighbour" in proof.reason


def test_positions_that_do_not_start_again_are_caught() -> None:
    # Such a model is isolated bit by bit: what its second row sees is its own, at wrong places.
    model = tiny_model("gpt2")
    proof = prove(model, lambda position_ids=None, **inputs: model(**inputs), CPU)
    assert not proof.holds
    assert "differ from those of rows alone" in proof.reason


def test_nan_proves_nothing() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    assert not prove(model, model, CPU).holds


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_proof_leaves_everything_as_it_was(
    name: str, dtype: torch.dtype, training: bool
) -> None:
    model = tiny_model(name, attention_dropout=0.1).to(dtype).train(training)
    model.activation_checkpointing_enable({"use_reentrant": False})
    experts = model.get_experts_implementation()
    random_state = torch.get_rng_state()

    assert prove(model, model, CPU) == attention.Proof(True, "isolated bit by bit")

    assert model.training == training
    assert model.config._attn_implementation == "sdpa"
    assert model.get_experts_implementation() == experts
    assert torch.equal(torch.get_rng_state(), random_state)


def call_segment_attention(
    lengths: list[int], *, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, sum(lengths), 8, generator=generator) for heads in (4, 2, 2)
    )
    inputs = packed_inputs(lengths) | {"attention_mask": None} | kwargs
    output, _ = attention.segment_attention(nn.Module(), query, key, value.to(dtype), **inputs)
    return output


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attention_mask": torch.ones(1, 1, 7, 7)}, "a mask of its own"),
        ({"softcap": 30.0}, "soft-capped scores"),
        ({"s_aux": torch.zeros(4)}, "attention sinks"),
        ({"sliding_window": 3}, "another window than their mask has"),
        ({"sliding_window": 3, "attention_mask": torch.tensor(4)}, "another window"),
    ],
)
def test_features_that_would_be_left_out_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(attention.UnsupportedAttention, match=reason):
        call_segment_attention([4, 3], **change)


def test_a_mask_that_is_not_simply_causal_is_refused() -> None:
    model = tiny_model("llama")
    model.config.is_causal = False
    assert "not simply causal" in prove(model, model, CPU).reason


def test_autocast_computes_in_its_own_dtype() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        output = call_segment_attention(LENGTHS, dtype=torch.bfloat16)
    assert output.dtype == torch.bfloat16


def reference_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """Compute what torch documents, query by query: [T, H, D] in and out."""
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert cu_seq_q.dtype == torch.int32
    assert max_q == max_k == cu_seq_q.diff().max()
    assert enable_gqa
    left, right = window_size
    assert right == 0
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    outputs = []
    for start, end in itertools.pairwise(cu_seq_q.tolist()):
        for i in range(start, end):
            first = start if left == -1 else max(start, i - left)
            scores = torch.einsum("hd,thd->ht", query[i], key[first : i + 1]) * scale
            outputs.append(torch.einsum("ht,thd->hd", scores.softmax(-1), value[first : i + 1]))
    return torch.stack(outputs)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_cuda_kernel_gets_the_same_segments_and_windows(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    mask = None if window is None else torch.tensor(window)
    expected = call_segment_attention(LENGTHS, attention_mask=mask, scaling=0.3)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", reference_varlen_attn)
    monkeypatch.setattr(attention, "_flash_computes", lambda query, value: True)
    found = call_segment_attention(LENGTHS, attention_mask=mask, scaling=0.3)

    assert found.shape == expected.shape == (1, sum(LENGTHS), 4, 8)
    assert relative(found, expected) < 1e-5


class PlainEngine:
    """A model as the engine of a single process."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.module = model

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def padded_batch(rows: list[Tensor], keep: list[Tensor]) -> Batch:
    def pad(tensors: list[Tensor]) -> Tensor:
        return pad_sequence([tensor[0] for tensor in tensors], batch_first=True)

    inputs = {
        "input_ids": pad(rows),
        "attention_mask": pad([torch.ones_like(row) for row in rows]),
        "use_cache": False,
    }
    kept = sum(int(k.sum()) for k in keep)
    targets = torch.arange(kept) % VOCAB
    return Batch(np.arange(len(rows)), inputs, pad(keep), targets, sum(map(torch.numel, rows)))


@pytest.mark.parametrize("name", ["bloom", "gpt_oss", "mamba", "xlstm"])  # xlstm keeps all logits
def test_models_that_cannot_be_packed_train_on_padded_rows(name: str) -> None:
    model = tiny_model(name)
    rows, keep = rows_of(LENGTHS), supervised(LENGTHS)
    batch = padded_batch(rows, keep)

    expected = F.cross_entropy(alone(model, rows, keep), batch.targets, reduction="sum")
    expected.backward()
    expected_gradients = gradients(model)
    found = token_loss(PlainEngine(model), batch)
    found.backward()
    found_gradients = gradients(model)

    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    scale = max(gradient.abs().max() for gradient in expected_gradients.values())
    for parameter, gradient in expected_gradients.items():
        assert (found_gradients[parameter] - gradient).abs().max() < 1e-5 * scale


def test_router_logits_change_no_loss() -> None:
    batch = padded_batch(rows_of(LENGTHS), supervised(LENGTHS))
    losses = [
        token_loss(PlainEngine(tiny_model("mixtral", output_router_logits=wanted)), batch)
        for wanted in (False, True)
    ]
    assert losses[0] == losses[1]


def test_packed_inputs_restart_positions() -> None:
    inputs = packed_inputs([3, 1, 2])
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert inputs["cu_seq_lens_q"].tolist() == [0, 3, 4, 6]
    assert inputs["max_length_q"] == 3
    assert inputs["use_cache"] is False
