"""One rank of `test_same_mathematics.py`: train many cells of the matrix in one process group.

python mathematics.py JOB.json OUT.json: the job holds the data, the recipe's common settings and
the cells; rank 0 writes what every cell computed and how far its gradients were from the reference.
"""

import contextlib
import functools
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import load_file
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from dist_sft import attention, batches, engine, step, train
from dist_sft.config import check
from dist_sft.console import Console
from dist_sft.metrics import Clock
from dist_sft.model import DTYPES, load_model
from dist_sft.optim import learning_rate
from dist_sft.plan import Plan
from dist_sft.stopping import StopFlag

CPU = torch.device("cpu")


class Rows:
    """A data set in memory, with as much of `store.Dataset` as a Feeder uses."""

    def __init__(self, rows: list[tuple[list[int], list[bool]]]) -> None:
        self._rows = rows
        self.lengths = np.array([len(ids) for ids, _ in rows])

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        ids, learned = self._rows[index]
        return np.array(ids), np.array(learned)


def train_cell(job: SimpleNamespace, cell: SimpleNamespace) -> dict[str, Any]:
    """Train one cell with the functions that `train.train` uses, in its order."""
    run_dir = Path(job.run_dir)
    tree = {
        "run_dir": job.run_dir,
        "model": {
            "path": job.models[cell.model],
            "dtype": cell.dtype,
            "gradient_checkpointing": cell.checkpointing,
        },
        "data": {"train": [{"path": "in memory"}]},
        "train": {"batch_size": job.batch_size, "steps": cell.steps},
        "optimizer": job.optimizer,
        "deepspeed": cell.deepspeed,
    }
    recipe = check(tree, origin="the test")
    dtype = DTYPES[cell.dtype]
    accelerator = engine.make_accelerator(recipe, dtype, run_dir)
    model = load_model(
        recipe.model, recipe.model.path, dtype if recipe.deepspeed else torch.float32
    )
    sharded = engine.make_engine(accelerator, model, recipe)
    packed = train.choose_packing(sharded, "on" if cell.packed else "off", CPU, Console(None))
    rows = Rows(job.rows)
    feeder = batches.Feeder(rows, dist.get_rank(), dist.get_world_size(), cell.budget, packed, CPU)
    plan = Plan((len(rows),), (1.0,), job.seed, job.batch_size)
    stop, clock = StopFlag(run_dir), Clock(CPU)
    reference = load_file(job.references[cell.model])

    curve: dict[str, Any] = {"losses": [], "norms": [], "gradients": [], "micro_batches": []}
    for number in range(1, cell.steps + 1):
        micro_batches = feeder.micro_batches(plan.samples(number))
        supervised, _ = step.agree_on_step(micro_batches, stop, CPU)
        losses = step.run_micro_batches(sharded, micro_batches, supervised, clock)
        curve["losses"].append(step.summed(losses, CPU) / supervised)
        if number in job.gradient_steps:
            curve["gradients"].append(worst_difference(sharded, reference, number))
        rate = learning_rate(number, cell.steps, recipe.optimizer)
        engine.set_learning_rate(sharded, rate)
        curve["norms"].append(sharded.step())
        curve["micro_batches"].append(len(micro_batches))
    curve["eval_loss"] = step.evaluate(sharded, feeder, CPU)
    return curve


def worst_difference(
    sharded: engine.Engine, reference: dict[str, torch.Tensor], step: int
) -> float:
    """Return the largest relative distance of a parameter's gradient from the reference's."""
    worst = 0.0
    for name, parameter in sharded.module.named_parameters():
        ours = (
            safe_get_full_grad(parameter)
            if isinstance(sharded, engine.ZeroEngine)
            else parameter.grad
        )
        assert ours is not None, f"{name} has no gradient"
        truth = reference[f"{step}|{name}"]
        worst = max(worst, float((ours.float() - truth).norm() / truth.norm()))
    return worst


@contextlib.contextmanager
def own_state() -> Iterator[None]:
    """Give a block accelerate's and DeepSpeed's global state anew; the process group stays."""
    with patch.dict(os.environ):
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            unset_hf_deepspeed_config()  # or the next model is built partitioned
            gc.collect()


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
        if fault in ("boundary never", "boundary always"):
            micro_batch = functools.partialmethod(boundary, at_end=fault == "boundary always")
            stack.enter_context(patch.object(engine.ZeroEngine, "micro_batch", micro_batch))
        yield


def with_mask_of_ones(lengths: list[int], device: torch.device) -> dict[str, Any]:
    mask = torch.ones(1, sum(lengths), dtype=torch.int64)
    return attention.packed_inputs(lengths, device) | {"attention_mask": mask}


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
