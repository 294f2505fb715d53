"""The mathematics does not depend on the machine: every way to compute a run gives the same one.

The reference is what anybody would write: one process, the global batch padded into one tensor,
Hugging Face's own loss, torch's AdamW. Against it stand the product's functions over 1, 2 and 3
ranks, packed and padded, under several token budgets, with and without ZeRO.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dist_sft.plan import Plan
from processes import run_ranks

PROGRAM = Path(__file__).parent / "ranks" / "mathematics.py"
VOCABULARY = 64
STEPS = 20
SEED = 7
# 25 rows in batches of 8: every fourth step has one row, so that all ranks but one have fillers.
ROWS, BATCH_SIZE = 25, 8
WARMUP_STEPS = 4
CLIP = 0.7
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.1
TOLERANCE = 1e-5
# Below the longest row; some micro-batches on every rank; the whole step in one.
BUDGETS = (24, 64, 1000)
SHARDINGS = (None, "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")


class Cell(NamedTuple):
    """One way to compute the run."""

    deepspeed: str | None = None
    packed: bool = True
    budget: int = 64
    model: str = "tied"
    dtype: str = "float32"
    checkpointing: bool = False
    fault: str | None = None

    def __str__(self) -> str:
        parts = [
            self.deepspeed or "data-parallel",
            "packed" if self.packed else "padded",
            f"{self.budget}-tokens",
            self.model,
            self.dtype if self.dtype != "float32" else "",
            "checkpointing" if self.checkpointing else "",
            (self.fault or "").replace(" ", "-"),
        ]
        return "-".join(part for part in parts if part)


@dataclass(frozen=True)
class Curve:
    """What a run computed, step by step."""

    losses: list[float]
    norms: list[float]
    """Norm of the whole gradient before clipping."""
    eval_loss: float


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


def make_model(folder: Path, *, tied: bool) -> Path:
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
    torch.manual_seed(SEED)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def train_plainly(folder: Path, rows: list[Row], gradients: Path) -> Curve:
    """Train as a textbook would; write the gradients of every step, before clipping, to a file."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    decayed = [p for n, p in model.named_parameters() if n.endswith(("proj.weight", "embed_tokens.weight", "lm_head.weight"))]
    others = [p for n, p in model.named_parameters() if n.endswith(("norm.weight", ".bias"))]
    assert len(decayed) + len(others) == len(list(model.parameters()))
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    )
    plan = Plan((ROWS,), (1.0,), SEED, BATCH_SIZE)
    losses, norms, kept = [], [], {}
    for step in range(1, STEPS + 1):
        loss = model(**padded([rows[i] for i in plan.samples(step)])).loss
        loss.backward()
        kept |= {f"{step}|{n}": p.grad.clone() for n, p in model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, step / WARMUP_STEPS)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        norms.append(norm.item())
    save_file(kept, gradients)
    with torch.no_grad():
        eval_loss = model(**padded(rows)).loss.item()
    return Curve(losses, norms, eval_loss)


def padded(rows: list[Row]) -> dict[str, torch.Tensor]:
    shape = (len(rows), max(len(row.input_ids) for row in rows))
    ids, mask = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
    labels = torch.full(shape, -100)
    for i, row in enumerate(rows):
        n = len(row.input_ids)
        ids[i, :n] = torch.tensor(row.input_ids)
        mask[i, :n] = 1
        labels[i, :n] = torch.where(torch.tensor(row.learned), ids[i, :n], -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass(frozen=True)
class Problem:
    folder: Path
    rows: list[Row]
    models: dict[str, Path]
    references: dict[str, Curve]
    gradients: dict[str, Path]


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Problem]:
    folder = tmp_path_factory.mktemp("mathematics")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = make_rows()
    names = ("tied", "untied")
    models = {name: make_model(folder / name, tied=name == "tied") for name in names}
    gradients = {name: folder / f"{name}.safetensors" for name in names}
    references = {name: train_plainly(models[name], rows, gradients[name]) for name in names}
    torch.set_num_threads(threads)
    return Problem(folder, rows, models, references, gradients)


Run = Callable[[int, tuple[Cell, ...], str], dict[Cell, dict[str, Any]]]


@pytest.fixture(scope="module")
def run(problem: Problem) -> Run:
    """Compute cells on some ranks, all of them in one process group: starting one takes 8 s."""

    @cache
    def run(world: int, cells: tuple[Cell, ...], name: str) -> dict[Cell, dict[str, Any]]:
        folder = problem.folder / f"{name}-{world}"
        folder.mkdir()
        job = {
            "run_dir": str(folder),
            "rows": problem.rows,
            "models": {name: str(path) for name, path in problem.models.items()},
            "references": {name: str(path) for name, path in problem.gradients.items()},
            "cells": [cell._asdict() for cell in cells],
            "steps": STEPS,
            "seed": SEED,
            "batch_size": BATCH_SIZE,
            "optimizer": {
                "lr": LEARNING_RATE,
                "weight_decay": WEIGHT_DECAY,
                "clip": CLIP,
                "schedule": "constant",
                "warmup_steps": WARMUP_STEPS,
            },
        }
        (folder / "job.json").write_text(json.dumps(job))
        run_ranks(PROGRAM, folder / "job.json", folder / "out.json", world=world, log_dir=folder, seconds=60 + 20 * len(cells))
        return dict(zip(cells, json.loads((folder / "out.json").read_text()), strict=True))

    return run
