"""The mathematics of one optimizer step: token losses, gradients, and what ranks agree on."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.random import SeedSequence
from torch import Tensor

from dist_sft.batches import Batch, Feeder
from dist_sft.engine import Engine
from dist_sft.errors import UserError
from dist_sft.metrics import Clock

EVAL_EXAMPLES = 1024  # how many are laid out over the ranks at once


class Agreed(NamedTuple):
    """What all ranks know of a step before they compute it."""

    supervised: int
    """Targets of the global batch, at least 1."""
    computed: int
    """Tokens that the model computes, with padding and fillers."""
    stopping: bool
    """Some rank was asked to stop."""
    saving: bool
    """Rank 0's clock asks for a checkpoint after the step."""
    written: bool
    """Every rank has written its part of the checkpoint that is under way."""


def agree_on_step(
    batches: list[Batch],
    device: torch.device,
    *,
    stopping: bool = False,
    saving: bool = False,
    written: bool = False,
) -> Agreed:
    """Add up the tokens of the global batch, and learn what the other ranks want or have done."""
    targets = sum(len(batch.targets) for batch in batches)
    computed = sum(batch.computed for batch in batches)
    mine = [targets, computed, stopping, saving, written]
    numbers = torch.tensor(mine, dtype=torch.int64, device=device)
    dist.all_reduce(numbers)
    supervised, computed, *votes = numbers.tolist()
    everyone = dist.get_world_size()
    return Agreed(max(1, supervised), computed, votes[0] > 0, votes[1] > 0, votes[2] == everyone)


def run_micro_batches(
    engine: Engine,
    batches: list[Batch],
    supervised: int,
    clock: Clock,
    seed: tuple[int, ...] = (0,),
) -> list[Tensor]:
    """Compute a step's gradient; return every micro-batch's sum of token losses.

    `supervised` is the number of targets of the global batch. `seed` says where in the run this is
    (run's seed, step, rank): dropout follows from it, and not from what was drawn before. Raises
    UserError when memory runs out.
    """
    losses = []
    for number, batch in enumerate(batches):
        torch.manual_seed(int(SeedSequence([*seed, number]).generate_state(1, "uint64")[0]))
        last = number == len(batches) - 1
        with explaining_memory(batch, number), engine.micro_batch(last=last):
            with clock("forward"):
                loss_sum = token_loss(engine, batch)
            with clock("backward"):
                engine.backward(loss_sum * _poison(loss_sum), supervised)
        losses.append(loss_sum.detach().float())
    return losses


def _poison(loss_sum: Tensor) -> Tensor:
    """Return 1, or NaN for a loss that is not finite.

    Its gradient need not be infinite, too; this way no engine takes it for one to learn from, and
    nothing has to be read from the device in the middle of a step.
    """
    return torch.where(torch.isfinite(loss_sum.detach()), 1.0, math.nan)


def token_loss(engine: Engine, batch: Batch) -> Tensor:
    """Return the sum of the token losses of a micro-batch; the head runs on its targets only.

    A filler has no targets: its loss is 0 and so is every gradient, but every parameter gets one.
    Auxiliary losses of a mixture of experts are not part of it, `output_router_logits` or not.
    """
    output = engine(**batch.inputs, logits_to_keep=batch.keep)
    logits: Tensor = output.logits  # [K, V]
    if logits.dim() == 3:  # [B, T, V]: xlstm, for one, keeps them all
        logits = logits[batch.keep]
    return F.cross_entropy(logits.float(), batch.targets, reduction="sum")


def evaluate(
    engine: Engine,
    feeder: Feeder,
    agree: Callable[[list[Batch]], Agreed],
    device: torch.device,
    beat: Callable[[str], None] = lambda phase: None,
) -> float | None:
    """Return the mean loss per supervised token over a whole evaluation set; None on a stop.

    `agree` is `agree_on_step` with what this rank has to say; `beat` is called with the name of the
    phase for every micro-batch.
    """
    engine.module.eval()
    total = torch.zeros(2, dtype=torch.float64, device=device)
    stopping = False
    with torch.no_grad():
        for batches in feeder.all_in_order(EVAL_EXAMPLES):
            stopping = agree(batches).stopping
            if stopping:
                break
            for number, batch in enumerate(batches):
                beat("evaluation")
                with explaining_memory(batch, number):
                    total[0] += token_loss(engine, batch).double()
                total[1] += len(batch.targets)
    engine.module.train()
    if stopping:
        return None
    dist.all_reduce(total)
    return float(total[0] / total[1])


def summed(values: Sequence[Tensor], device: torch.device) -> float:
    """Add numbers up over this rank's micro-batches and all ranks."""
    total = torch.stack(list(values)).double().sum().to(device)
    dist.all_reduce(total)
    return float(total)


@contextlib.contextmanager
def explaining_memory(
    batch: Batch | None = None,
    number: int = 0,
    *,
    work: str = "the optimizer's update",
    advice: str = "try deepspeed: zero3-offload",
) -> Iterator[None]:
    """Turn running out of memory, on GPU or CPU, into a UserError that says what to try.

    Without a micro-batch, it is other `work` that ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not out_of_memory and "can't allocate memory" not in str(error):
            raise
        if batch is not None:
            work, advice = _memory_advice(batch, number)
        first_line = str(error).partition("\n")[0]
        raise UserError(
            f"out of memory in {work}; {advice}; in a new run_dir or in this one, on more "
            f"workers or with deepspeed: zero3, every one of them holds less\n{first_line}"
        ) from error


def _memory_advice(batch: Batch, number: int) -> tuple[str, str]:
    rows = len(batch.samples)
    where = f"micro-batch {number}: {batch.tokens} tokens in {rows} rows"
    if rows > 1:
        advice = f"try train.tokens_per_micro_batch: {batch.tokens // 2}"
    else:
        advice = f"it is a single row: try data.max_length: {batch.tokens // 2} in a new run_dir"
    return where, f"{advice}, or model.gradient_checkpointing: true"
