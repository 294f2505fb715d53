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
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

NAME = "dist_sft_segments"
WINDOW_PROBE = 64  # proofs do not reach beyond longer windows: their length comes from the mask
LEFT_OUT = {
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "position_bias": "a bias on the scores",
    "indices": "a choice of keys",
    "block_indices": "a choice of keys",
}
"""Arguments that models pass to their attention for what is not computed here."""

QKV = tuple[Tensor, Tensor, Tensor]


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
    and `max_length_q` come from the batch, the mask is that of `window_as_mask`. Returns
    [1, T, H, D]. Raises UnsupportedAttention for features that would silently be left out.
    """
    unsupported = [LEFT_OUT[name] for name in LEFT_OUT if kwargs.get(name) is not None]
    if attention_mask is not None and attention_mask.dim() > 0:
        unsupported.append("a mask of its own")
    if "cu_seq_lens_q" not in kwargs:
        unsupported.append("layers that are not told where segments begin")
    if unsupported:
        raise UnsupportedAttention(", ".join(unsupported))
    window = None if attention_mask is None else int(attention_mask)
    if kwargs.get("sliding_window") not in (None, window):
        raise UnsupportedAttention("layers that name another window than their mask has")
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings leave float32 behind
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    bounds: Tensor = kwargs["cu_seq_lens_q"]
    if not dropout and _flash_computes(query, value):
        longest: int = kwargs["max_length_q"]
        return _on_cuda((query, key, value), bounds, longest, scaling, window), None
    lengths = bounds.diff().tolist()
    return _per_segment((query, key, value), lengths, scaling, dropout, window), None


def window_as_mask(
    config: Any, local_size: int | None = None, use_vmap: bool = False, **kwargs: Any
) -> Tensor | None:
    """Stand in for a mask where transformers builds one: None, or the sliding window's size [].

    So every layer's window is that of its stock mask, and masks of other shapes are refused on
    rows too short to show them. Raises UnsupportedAttention.
    """
    if use_vmap or "allow_is_bidirectional_skip" in kwargs:  # transformers' signs of such masks
        raise UnsupportedAttention("a mask that is not simply causal")
    if local_size is None:
        return None
    if local_size != getattr(config, "sliding_window", None):
        raise UnsupportedAttention("attention in chunks")
    return torch.tensor(local_size)


def _per_segment(
    qkv: QKV, lengths: list[int], scaling: float | None, dropout: float, window: int | None
) -> Tensor:
    grouped = qkv[0].shape[1] != qkv[1].shape[1]
    # Not slices: the gradient of each would be a tensor of zeros as long as the whole row.
    segments = zip(*(torch.split_with_sizes(x, lengths, dim=2) for x in qkv), strict=True)
    outputs = []
    for (q, k, v), length in zip(segments, lengths, strict=True):
        mask = None
        if window is not None and length > window:
            ones = torch.ones(length, length, dtype=torch.bool, device=qkv[0].device)
            mask = ones.tril().triu(1 - window)
        output = F.scaled_dot_product_attention(
            q, k, v, mask, dropout, mask is None, scale=scaling, enable_gqa=grouped
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _flash_computes(query: Tensor, value: Tensor) -> bool:
    dim = query.shape[-1]
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and half and dim == value.shape[-1] and dim % 8 == 0 and dim <= 256


def _on_cuda(
    qkv: QKV, bounds: Tensor, longest: int, scaling: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (tensor[0].transpose(0, 1) for tensor in qkv)  # [T, H or G, D]
    where = (bounds, bounds, longest, longest)
    # (left, right) neighbours beside the token itself; -1 is unlimited.
    reach = (-1 if window is None else window - 1, 0)
    gqa = q.shape[1] != k.shape[1]
    output = varlen_attn(q, k, v, *where, scale=scaling, window_size=reach, enable_gqa=gqa)
    assert isinstance(output, Tensor)
    return output[None]


AttentionInterface.register(NAME, segment_attention)
AttentionMaskInterface.register(NAME, window_as_mask)


def packed_inputs(lengths: list[int], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return the model inputs that describe segments of the given lengths in one packed row.

    The names are transformers' own for packed rows, so that its flash kernels understand them too.
    `use_cache=False` and the absent attention mask are part of what keeps stock masks honest.
    """
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])
    return {
        "position_ids": positions[None].to(device),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
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
    first, other, second = (_row(vocab_size, lengths[i], seed=n) for n, i in enumerate((0, 0, 1)))
    other[0, -1] = (first[0, -1] + 1) % vocab_size  # two short random rows might be alike
    before = forward(torch.cat([first, second], dim=1), list(lengths))[0, lengths[0] :]
    after = forward(torch.cat([other, second], dim=1), list(lengths))[0, lengths[0] :]
    if torch.equal(before, after):
        return Proof(True, "isolated bit by bit")
    leak = (before.float() - after.float()).abs().max().item()
    return Proof(False, f"an example changes its neighbour's logits by {leak:.3g}")


def _row(vocab_size: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (1, length), generator=generator)


def prove(
    model: PreTrainedModel,
    call: Callable[..., Any],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Proof:
    """Prove that packing neither mixes examples nor changes what the model computes on each.

    Isolation is proved in training mode, with gradient checkpointing and dropout; then a segment
    must equal the stock attention on it alone, which finds positions that do not start again and
    parts left out. `call` runs the model, sharded or not; with ZeRO-3 all ranks call this together.
    `dtype` is what the model computes in, where that is not the dtype of its logits (autocast).
    Not seen: rotary embeddings that follow the longest row ("dynamic", "longrope"; padding mixes
    these too), and unknown features that begin beyond the probe's few tokens.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    lengths = (9, window + 3 if 0 < window <= WINDOW_PROBE else 12)
    kind = type(model).__name__
    was_training, experts = model.training, model.get_experts_implementation()
    stock = model.config._attn_implementation

    def packed(ids: Tensor, segments: list[int]) -> Tensor:
        torch.manual_seed(0)  # the same dropout every time
        logits: Tensor = call(input_ids=ids.to(device), **packed_inputs(segments, device)).logits
        return logits

    devices = [device] if device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices), implementation(model, NAME):
            if model.config._attn_implementation != NAME:
                return Proof(False, f"{kind} has no exchangeable attention")
            model.train()
            proof = isolation(packed, config.vocab_size, lengths)
            if not proof.holds:
                # Experts take their tokens at once, and how many decides how sums round: routing
                # of one example shows in its neighbours' last bits, but not token by token.
                model.set_experts_implementation("batched_mm")
                proof = isolation(packed, config.vocab_size, lengths)
            if not proof.holds:
                return proof
            model.eval()
            first, second = (_row(config.vocab_size, length, seed=length) for length in lengths)
            ours = packed(torch.cat([first, second], dim=1), list(lengths))[:, lengths[0] :]
            with implementation(model, stock):
                theirs = call(input_ids=second.to(device), use_cache=False).logits.float()
    except UnsupportedAttention as error:
        return Proof(False, f"{kind} cannot be packed: {error}")
    except Exception as error:  # whatever a model says to inputs it was not made for
        return Proof(False, f"{kind} cannot be packed: {type(error).__name__}: {error}")
    finally:
        model.set_experts_implementation(experts)
        model.train(was_training)
    difference = (ours.float() - theirs).abs().max() / theirs.abs().max()
    if difference <= (1e-4 if (dtype or ours.dtype) == torch.float32 else 5e-2):  # NaN is not
        return proof
    return Proof(False, f"packed logits differ from those of rows alone by {difference:.3g}")
