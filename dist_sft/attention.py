"""Packed rows without padding: attention per segment, and the proof that segments are isolated.

A packed row is [1, T] tokens of several examples; `cu_seq_lens` [N + 1] says where each begins.
Stock masks keep examples apart only under conditions that nobody checks (no attention mask, no
cache, a model that reads position ids), so dist_sft brings its own attention and proves it on the
very model that is trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

NAME = "dist_sft_segments"
WINDOW_PROBE = 64  # a window longer than this is taken on trust: probing it would cost real time


class UnsupportedAttention(NotImplementedError):
    """Say which part of a model's attention the segment attention does not compute."""


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend causally within every segment; the signature is that of `AttentionInterface`.

    query [1, H, T, D], key and value [1, G, T, D] with H a multiple of G; `cu_seq_lens_q` [N + 1]
    and `max_length_q` come from the batch, `sliding_window` (in tokens) from the layer. Returns
    [1, T, H, D]. Raises UnsupportedAttention for features that would silently be left out.
    """
    unsupported = [name for name in ("softcap", "s_aux", "position_bias") if _is_set(kwargs, name)]
    if attention_mask is not None:
        unsupported.append("attention_mask")
    if "cu_seq_lens_q" not in kwargs:
        unsupported.append("a model that does not pass cu_seq_lens_q on to its attention")
    if unsupported:
        raise UnsupportedAttention(", ".join(unsupported))
    window: int | None = kwargs.get("sliding_window")
    bounds: Tensor = kwargs["cu_seq_lens_q"]
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not dropout:
        return _on_cuda(query, key, value, bounds, kwargs["max_length_q"], scaling, window), None
    return _per_segment(query, key, value, bounds.tolist(), scaling, dropout, window), None


def _is_set(kwargs: dict[str, Any], name: str) -> bool:
    return kwargs.get(name) is not None


def _per_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: list[int],
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        mask = None
        if window is not None and end - start > window:
            ones = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device)
            mask = ones.tril().triu(1 - window)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, start:end],
                value[:, :, start:end],
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=grouped,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _on_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    output = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        # (left, right) neighbours beside the token itself; -1 is unlimited.
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output[None]


# No mask function of this name is registered, so transformers builds no mask at all.
AttentionInterface.register(NAME, segment_attention)


def packed_inputs(lengths: list[int], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return the model inputs that describe segments of the given lengths in one packed row.

    The names are transformers' own for packed rows, so that its flash kernels understand them too.
    `use_cache=False` and the absent attention mask are part of what keeps stock masks honest.
    """
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.cat([torch.arange(n) for n in lengths])
    cu_seq_lens = bounds.to(device=device, dtype=torch.int32)
    return {
        "position_ids": positions[None].to(device),
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "use_cache": False,
    }


@contextlib.contextmanager
def implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Switch the model's attention within a block."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@dataclass(frozen=True)
class Proof:
    """Hold whether packing is safe on a model, and the reason if it is not."""

    holds: bool
    reason: str


Forward = Callable[[Tensor, list[int]], Tensor]
"""(input_ids [1, T], segment lengths) -> logits [1, T, V]"""


def isolation(forward: Forward, vocab_size: int, lengths: tuple[int, int]) -> Proof:
    """Prove that a packed forward keeps two segments apart, on random tokens.

    Another first segment must leave the second's logits equal bit by bit.
    """
    generator = torch.Generator().manual_seed(0)
    first, other = (torch.randint(vocab_size, (lengths[0],), generator=generator) for _ in "ab")
    second = torch.randint(vocab_size, (lengths[1],), generator=generator)
    other[-1] = (first[-1] + 1) % vocab_size  # two short random rows might be alike
    before = forward(torch.cat([first, second])[None], list(lengths))[0, lengths[0] :]
    after = forward(torch.cat([other, second])[None], list(lengths))[0, lengths[0] :]
    if torch.equal(before, after):
        return Proof(True, "isolated bit by bit")
    leak = (before.float() - after.float()).abs().max().item()
    return Proof(False, f"an example changes its neighbour's logits by {leak:.3g}")


def prove(model: PreTrainedModel, call: Callable[..., Any], device: torch.device) -> Proof:
    """Prove that segment attention is isolated and computes what the stock attention computes.

    `call` runs the model, sharded or not; with ZeRO-3 all ranks must call this together.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    lengths = (9, window + 3 if 0 < window <= WINDOW_PROBE else 12)
    stock = model.config._attn_implementation

    def packed(input_ids: Tensor, segments: list[int]) -> Tensor:
        inputs = packed_inputs(segments, device)
        logits: Tensor = call(input_ids=input_ids.to(device), **inputs).logits
        return logits

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), implementation(model, NAME):
            if model.config._attn_implementation != NAME:
                return Proof(False, f"{type(model).__name__} has no exchangeable attention")
            proof = isolation(packed, config.vocab_size, lengths)
            if not proof.holds:
                return proof
            ids = torch.randint(
                config.vocab_size, (1, lengths[1]), generator=torch.Generator().manual_seed(1)
            )
            ours = packed(ids, [lengths[1]])
            with implementation(model, stock):
                theirs = call(input_ids=ids.to(device), use_cache=False).logits
    except (UnsupportedAttention, ValueError) as error:
        return Proof(False, f"segment attention does not support {error}")
    finally:
        model.train(was_training)
    difference = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()
    tolerance = 1e-4 if theirs.dtype == torch.float32 else 5e-2
    if not difference <= tolerance:
        return Proof(False, f"it differs from the model's own attention by {difference:.3g}")
    return proof
