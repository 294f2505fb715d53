"""Evaluate a model in training by its answers: exact matches, and samples to read.

All ranks answer the same prompts together, for ZeRO-3 gathers weights layer by layer from all of
them: each takes rank 0's tokens, and any of them may ask to stop.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from dist_sft import attention
from dist_sft.asking import Prompts, ask, is_exact
from dist_sft.chat import Encoder
from dist_sft.decode import Answer
from dist_sft.engine import Engine, ZeroEngine
from dist_sft.runs import write_atomically
from dist_sft.step import explaining_memory

FOLDER = "samples"
LOOKS_EVERY = 8  # tokens; whether to stop is asked of a file, on a file system that may be slow


class StopAsked(Exception):
    """Leave the middle of an answer, on all ranks after the same token."""


class Sharded:
    """A model in training as a `Decoder` sees a model."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self._module = engine.module
        # DistributedDataParallel would send buffers around in every forward.
        self._call = engine if isinstance(engine, ZeroEngine) else engine.module
        self.forward, self.config = engine.module.forward, engine.module.config
        self.device = device  # where it computes: ZeRO-3 may keep weights elsewhere

    @property
    def training(self) -> bool:
        """Tell whether dropout works."""
        return bool(self._module.training)

    def __call__(self, **inputs: Any) -> Any:
        return self._call(**inputs)


class Examiner:
    """Let a model in training answer prompts; every rank calls `examine` together."""

    def __init__(
        self,
        prompts: Prompts,
        encoder: Encoder,
        text_of: Callable[[list[int]], str],
        stock: str,
        max_new_tokens: int,
        batch_tokens: int,
    ) -> None:
        """Use the attention `stock`, which knows caches and masks, and as much memory as said."""
        self._prompts, self._encoder, self._text_of = prompts, encoder, text_of
        self._stock = stock
        self._max_new_tokens, self._batch_tokens = max_new_tokens, batch_tokens

    def examine(
        self,
        engine: Engine,
        device: torch.device,
        stopping: Callable[[], bool],
        beat: Callable[[str], None],
    ) -> list[Answer] | None:
        """Return the answers; None where a stop cut them short. Training goes on as before.

        `stopping` agrees with the other ranks whether to stop, every few tokens.
        """
        count = 0

        def agree(tokens: Tensor) -> Tensor:
            nonlocal count
            beat("evaluation")
            if count % LOOKS_EVERY == 0 and stopping():
                raise StopAsked
            count += 1
            dist.broadcast(tokens, src=0)
            return tokens

        advice = f"try eval.max_new_tokens: {max(1, self._max_new_tokens // 2)}"
        with _evaluating(engine.module, self._stock):
            try:
                with explaining_memory(work="answering eval.prompts", advice=advice):
                    return ask(
                        cast(PreTrainedModel, Sharded(engine, device)),
                        self._prompts.ids,
                        self._encoder.stop_ids,
                        self._text_of,
                        self._max_new_tokens,
                        self._batch_tokens,
                        agree=agree,
                    )
            except StopAsked:
                return None

    def score(self, answers: Sequence[Answer]) -> float:
        """Return the share of answers that are exact."""
        pairs = zip(answers, self._prompts.expected, strict=True)
        return sum(is_exact(answer.text, expected) for answer, expected in pairs) / len(answers)

    def write(self, run_dir: Path, step: int, answers: Sequence[Answer]) -> None:
        """Write what was answered after a step to RUN_DIR/samples."""
        lines = []
        for ids, expected, answer in zip(*self._prompts, answers, strict=True):
            line = {
                "step": step,
                "prompt": self._text_of(ids),
                "expected": expected,
                "generated": answer.text,
                "finish_reason": answer.reason,
                "exact": is_exact(answer.text, expected),
            }
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        (run_dir / FOLDER).mkdir(exist_ok=True)
        write_atomically(run_dir / FOLDER / f"step-{step:08d}.jsonl", "".join(lines))


@contextmanager
def _evaluating(model: PreTrainedModel, stock: str) -> Iterator[None]:
    """Switch a model from training to answering within a block."""
    model.eval()
    try:
        with attention.implementation(model, stock):
            yield
    finally:
        model.train()
