"""The sizes of a Llama-like model that say what training one token costs. Imports no torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class ModelSize(NamedTuple):
    """The sizes of a decoder with grouped-query attention and a gated MLP."""

    layers: int
    hidden: int
    attention: int
    """Width of all query heads together."""
    key_value: int
    """Width of all key heads together, and of all value heads."""
    mlp: int
    vocabulary: int

    @classmethod
    def read(cls, model_folder: Path) -> "ModelSize":
        """Read the sizes from the `config.json` of a Hugging Face folder."""
        config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        head_size = config.get("head_dim") or hidden // heads
        return cls(
            layers=config["num_hidden_layers"],
            hidden=hidden,
            attention=heads * head_size,
            key_value=config.get("num_key_value_heads", heads) * head_size,
            mlp=config["intermediate_size"],
            vocabulary=config["vocab_size"],
        )

    def layer_matrices(self) -> list[tuple[int, int]]:
        """List (outputs, inputs) of every weight matrix in one layer."""
        return [
            (self.attention, self.hidden),
            (self.key_value, self.hidden),
            (self.key_value, self.hidden),
            (self.hidden, self.attention),
            (self.mlp, self.hidden),
            (self.mlp, self.hidden),
            (self.hidden, self.mlp),
        ]

    def training_flops(self, row_lengths: Sequence[int], supervised_tokens: int) -> int:
        """Count the useful floating-point operations of training these rows once.

        Six for each weight and token (a multiply and an add; forward, and twice that backward),
        and 12 x layers x attention width x length for each token's attention, halved because a
        token looks only at those before it: Chowdhery et al., PaLM (2022), appendix B; the halving
        as in Dao, FlashAttention-2 (2023), section 4.1. The output head counts on supervised tokens
        only, for nothing else is needed of it. Padding is no useful work and recomputation neither.
        For SmolLM2-135M that is 0.64 GFLOP per token and 0.17 per supervised token.
        """
        weights = self.layers * sum(rows * columns for rows, columns in self.layer_matrices())
        head = self.vocabulary * self.hidden
        pairs = sum(length * length for length in row_lengths)
        return (
            6 * weights * sum(row_lengths)
            + 6 * head * supervised_tokens
            + 6 * self.layers * self.attention * pairs
        )
