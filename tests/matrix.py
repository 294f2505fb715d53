"""What tests over several ranks share: the cells of a matrix, and the tiny problem they solve."""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 64
STEPS = 20
SEED = 7
# 25 rows in batches of 8: every fourth step has one row, so that all ranks but one have fillers.
ROWS, BATCH_SIZE = 25, 8
LEARNING_RATE, WARMUP_STEPS = 1e-3, 4
WEIGHT_DECAY = 0.1
CLIP = 2.1  # the norms of the gradients lie on both sides of it

# Everything that a DeepSpeed file may say about the layout, away from its default.
SHARDINGS: dict[str, Any] = {
    f"odd-zero{stage}": {"zero_optimization": {"stage": stage, **settings}}
    for stage, settings in (
        (
            1,
            {
                "allgather_partitions": False,
                "contiguous_gradients": False,
                "reduce_bucket_size": 500,
                "allgather_bucket_size": 500,
            },
        ),
        (
            2,
            {
                "reduce_scatter": False,
                "overlap_comm": True,
                "offload_optimizer": {"device": "cpu"},
                "reduce_bucket_size": 500,
                "allgather_bucket_size": 500,
            },
        ),
        (
            3,
            {
                "sub_group_size": 1000,
                "stage3_param_persistence_threshold": 100,
                "stage3_prefetch_bucket_size": 0,
                "stage3_max_live_parameters": 1,
                "stage3_max_reuse_distance": 1,
                "overlap_comm": False,
                "reduce_scatter": False,
                "contiguous_gradients": False,
                "reduce_bucket_size": 500,
                "offload_optimizer": {"device": "cpu"},
                "offload_param": {"device": "cpu"},
            },
        ),
    )
}


class Cell(NamedTuple):
    """One way to compute the run."""

    deepspeed: str | None = None
    packed: bool = True
    budget: int = 64
    model: str = "tied"
    dtype: str = "float32"
    checkpointing: bool = False
    steps: int = STEPS
    freeze: tuple[str, ...] = ()
    fault: str | None = None

    def __str__(self) -> str:
        parts = [
            self.deepspeed or "data-parallel",
            "packed" if self.packed else "padded",
            f"{self.budget}-tokens",
            self.model,
            self.dtype if self.dtype != "float32" else "",
            "checkpointing" if self.checkpointing else "",
            "frozen" if self.freeze else "",
            (self.fault or "").replace(" ", "-"),
        ]
        return "-".join(part for part in parts if part)


class Row(NamedTuple):
    input_ids: list[int]
    learned: list[bool]


def make_rows() -> list[Row]:
    """Counting in steps of 1 to 3, of very uneven length; a prompt and inner turns unlearned."""
    rng = random.Random(SEED)
    rows = []
    for number in range(ROWS):
        length = (3, 40)[number] if number < 2 else rng.randint(4, 40)
        start, stride = rng.randrange(VOCABULARY), rng.randint(1, 3)
        prompt = rng.randint(1, length - 2)
        learned = [i >= prompt and (i == length - 1 or rng.random() < 0.8) for i in range(length)]
        rows.append(Row([(start + stride * i) % VOCABULARY for i in range(length)], learned))
    return rows


def make_model(folder: Path, *, tied: bool, seed: int = SEED) -> Path:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=tied,
        initializer_range=0.1,  # large enough for attention to matter at once
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_job(
    run_dir: Path, models: dict[str, Path], cells: Iterable[Cell], **more: Any
) -> dict[str, Any]:
    """Return what the rank programs read: see `ranks/cells.py`."""
    return {
        "run_dir": str(run_dir),
        "rows": make_rows(),
        "models": {name: str(path) for name, path in models.items()},
        "shardings": SHARDINGS,
        "cells": [cell._asdict() for cell in cells],
        "seed": SEED,
        "batch_size": BATCH_SIZE,
        "optimizer": {
            "lr": LEARNING_RATE,
            "weight_decay": WEIGHT_DECAY,
            "clip": CLIP,
            "schedule": "constant",
            "warmup_steps": WARMUP_STEPS,
        },
        **more,
    }
