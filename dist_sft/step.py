"""The mathematics of one optimizer step: token losses, gradients, and what ranks agree on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.random import SeedSequence
from torch import Tensor

from dist_sft.batches import Batch, Feeder
from dist_sft.engine import Engine
from dist_sft.errors import UserError
from dist_sft.metrics import Clock
from dist_sft.stopping import StopFlag
from dist_sft.store import Dataset

EVAL_EXAMPLES = 1024  # how many are laid out over the ranks at once


def agree_on_step(batches: list[Batch], stop: StopFlag, device: torch.device) -> tuple[int, bool]:
    """Add up the targets of the global batch, and learn whether any rank was asked to stop."""
    targets = sum(len(batch.targets) for batch in batches)
    numbers = torch.tensor([targets, stop.reason is not None], dtype=torch.int64, device=device)
    dist.all_reduce(numbers)
    supervised, stopping = numbers.tolist()
    return max(1, supervised), stopping > 0


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
        try:
            with engine.micro_batch(last=number == len(batches) - 1):
                with clock("forward"):
                    loss_sum = token_loss(engine, batch)
                with clock("backward"):
                    engine.backward(loss_sum, supervised)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise UserError(explain_memory(error, batch, number)) from error
            raise
        losses.append(loss_sum.detach().float())
    return losses


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


def evaluate(engine: Engine, feeder: Feeder, device: torch.device) -> float:
    """Return the mean loss per supervised token over a whole evaluation set."""
    engine.module.eval()
    total = torch.zeros(2, dtype=torch.float64, device=device)
    with torch.no_grad():
        for batches in feeder.all_in_order(EVAL_EXAMPLES):
            for batch in batches:
                total[0] += token_loss(engine, batch).double()
                total[1] += len(batch.targets)
    engine.module.train()
    dist.all_reduce(total)
    return float(total[0] / total[1])


def summed(values: Sequence[Tensor], device: torch.device) -> float:
    """Add numbers up over this rank's micro-batches and all ranks."""
    total = torch.stack(list(values)).double().sum().to(device)
    dist.all_reduce(total)
    return float(total)


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error means that memory ran out, on GPU or CPU."""
    return isinstance(
        error, torch.OutOfMemoryError | MemoryError
    ) or "can't allocate memory" in str(error)


def explain_memory(error: Exception, batch: Batch, number: int) -> str:
    """Say which micro-batch was too large, and what to try."""
    rows = len(batch.samples)
    if rows > 1:
        advice = f"try train.tokens_per_micro_batch: {batch.tokens // 2}"
    else:
        advice = f"it is a single row: try data.max_length: {batch.tokens // 2}"
    return (
        f"out of memory in micro-batch {number}: {batch.tokens} tokens in {rows} rows; {advice}, "
        "or model.gradient_checkpointing: true, or, in a new run_dir, deepspeed: zero3\n"
        f"{str(error).partition(chr(10))[0]}"
    )


def rows_of_bad_losses(
    batches: Sequence[Batch], losses: Sequence[Tensor], dataset: Dataset
) -> list[str]:
    """Name the rows of every micro-batch on this rank whose loss is not finite."""
    return [
        f"{name} row {row}"
        for batch, loss in zip(batches, losses, strict=True)
        if not torch.isfinite(loss)
        for name, row in (dataset.locate(int(number)) for number in batch.samples)
    ]


def explain_divergence(value: float, step: int, bad: Sequence[str]) -> str:
    """Say where a loss or gradient norm stopped being finite, and what people do about it."""
    what = "loss" if bad else "loss or gradient norm"
    where = f"; the micro-batches of these rows: {', '.join(bad[:20])}" if bad else ""
    return (
        f"the {what} is {value} in step {step}{where}. The step was not saved. Look at the rows "
        f"with `dist-sft plan RECIPE --step {step}` and `dist-sft inspect RECIPE --row N`; lower "
        "optimizer.lr, lengthen optimizer.warmup_steps, or set optimizer.clip"
    )
