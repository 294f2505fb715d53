"""One rank of `test_same_mathematics.py`: train many cells of the matrix in one process group.

python mathematics.py JOB.json OUT.json: see `cells.py` for the job; rank 0 writes what every cell
computed, and how far its gradients were from those in the job's `references` (model -> file). Every
cell tries one of its steps with an infinite loss first, which must leave no trace.
"""

import contextlib
import functools
import json
import math
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from cells import Run, own_state
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import load_file

from dist_sft import attention, batches, engine, step

INFINITE = 6


def train_cell(job: SimpleNamespace, cell: SimpleNamespace) -> dict[str, Any]:
    run = Run(job, cell)
    reference = load_file(job.references[cell.model])
    curve: dict[str, Any] = {"losses": [], "norms": [], "gradients": [], "micro_batches": []}
    for number in range(1, cell.steps + 1):
        if number == INFINITE:
            with infinite_loss():
                assert run.gradient(number)[0] == math.inf
            assert not math.isfinite(run.update(number)), "the gradient's norm"
        loss, micro_batches = run.gradient(number)
        if number in job.gradient_steps:
            curve["gradients"].append(worst_difference(run.engine, reference, number))
        curve["losses"].append(loss)
        curve["norms"].append(run.update(number))
        curve["micro_batches"].append(micro_batches)
    return curve | {"eval_loss": run.evaluate()}


@contextlib.contextmanager
def infinite_loss() -> Iterator[None]:
    """Let one rank's losses be infinite, though their gradients are not."""
    token_loss = step.token_loss

    def infinite(*arguments: Any) -> torch.Tensor:
        return token_loss(*arguments) + (math.inf if dist.get_rank() == 0 else 0.0)

    with patch.object(step, "token_loss", infinite):
        yield


def worst_difference(
    sharded: engine.Engine, reference: dict[str, torch.Tensor], number: int
) -> float:
    """Return the largest relative distance of a parameter's gradient from the reference's."""
    worst = 0.0
    for name, parameter in sharded.module.named_parameters():
        if f"{number}|{name}" not in reference:
            assert not parameter.requires_grad, f"{name} is trained"
            assert parameter.grad is None, f"{name} is frozen and has a gradient"
            continue
        is_zero = isinstance(sharded, engine.ZeroEngine)
        ours = safe_get_full_grad(parameter) if is_zero else parameter.grad
        assert ours is not None, f"{name} has no gradient"
        truth = reference[f"{number}|{name}"]
        worst = max(worst, float((ours.float().cpu() - truth).norm() / truth.norm()))
    return worst


@contextlib.contextmanager
def broken(fault: str | None) -> Iterator[None]:
    """Take one of the product's precautions away, to see that the comparison notices."""
    with contextlib.ExitStack() as stack:
        if fault == "world size left out":
            alone = SimpleNamespace(get_world_size=lambda: 1)
            stack.enter_context(patch.object(engine, "dist", alone))
        if fault == "attention mask of ones":
            stack.enter_context(patch.object(attention, "NAME", "sdpa"))
            stack.enter_context(patch.object(batches, "packed_inputs", with_mask_of_ones))
        if fault == "round robin":
            stack.enter_context(patch.object(engine, "deepspeed_config", with_round_robin))
        if fault in ("boundary never", "boundary always"):
            micro_batch = functools.partialmethod(boundary, at_end=fault == "boundary always")
            stack.enter_context(patch.object(engine.ZeroEngine, "micro_batch", micro_batch))
        yield


def with_mask_of_ones(lengths: list[int], device: torch.device) -> dict[str, Any]:
    mask = torch.ones(1, sum(lengths), dtype=torch.int64)
    return attention.packed_inputs(lengths, device) | {"attention_mask": mask}


complete = engine.deepspeed_config


def with_round_robin(*arguments: Any) -> dict[str, Any]:
    config = complete(*arguments)
    config["zero_optimization"]["round_robin_gradients"] = True
    return config


@contextlib.contextmanager
def boundary(self: engine.ZeroEngine, *, last: bool, at_end: bool) -> Iterator[None]:
    self.deepspeed.set_gradient_accumulation_boundary(at_end)
    yield


def main() -> None:
    job = SimpleNamespace(**json.loads(Path(sys.argv[1]).read_text()))
    results = []
    for cell in job.cells:
        began = time.perf_counter()
        with own_state(), broken(cell["fault"]):
            try:
                result = train_cell(job, SimpleNamespace(**cell))
            except Exception:
                if cell["fault"] is None:
                    raise
                result = {"error": traceback.format_exc()}
        results.append(result | {"seconds": time.perf_counter() - began})
        print(cell, f"{results[-1]['seconds']:.1f} s", flush=True)
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
