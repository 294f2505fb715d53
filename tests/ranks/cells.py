"""What the rank programs of the tests share: one cell of a matrix, run by the product's functions.

A job is plain JSON: `run_dir`, `rows`, `models` (name -> folder), `seed`, `batch_size`, the
recipe's `optimizer` and `shardings` of the tests' own by name. A cell has `model`, `dtype`,
`deepspeed`, `packed`, `budget`, `checkpointing`, `freeze` and `steps`.
"""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from deepspeed.accelerator import get_accelerator
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from dist_sft import engine, shards, step, train
from dist_sft.batches import Feeder
from dist_sft.config import Recipe, check
from dist_sft.console import Console
from dist_sft.export import persistent_buffers, write_model_files
from dist_sft.metrics import Clock
from dist_sft.model import DTYPES, freeze, load_model
from dist_sft.optim import learning_rate
from dist_sft.plan import Plan

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    # DeepSpeed refuses float16 on most CPUs, as it is slow there; torch computes it all the same.
    type(get_accelerator()).is_fp16_supported = lambda self: True


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


class Run:
    """A run without the loop around it: the functions that `train.train` calls, in its order."""

    def __init__(self, job: SimpleNamespace, cell: SimpleNamespace) -> None:
        self.recipe = _recipe(job, cell)
        run_dir, folder, dtype = Path(job.run_dir), job.models[cell.model], DTYPES[cell.dtype]
        accelerator = engine.make_accelerator(self.recipe, dtype, run_dir)
        loaded_in = dtype if self.recipe.deepspeed else torch.float32
        model = load_model(self.recipe.model, folder, loaded_in)
        freeze(model, self.recipe.model.freeze)
        self.engine = engine.make_engine(accelerator, model, self.recipe)
        shards.check(self.engine)
        self.stock = model.config._attn_implementation
        packing = "on" if cell.packed else "off"
        packed = train.choose_packing(self.engine, packing, DEVICE, dtype, Console(None))
        rows, rank, world = Rows(job.rows), dist.get_rank(), dist.get_world_size()
        self.feeder = Feeder(rows, rank, world, cell.budget, packed, DEVICE)
        self.plan = Plan((len(rows),), (1.0,), job.seed, job.batch_size)
        self._agree, self._clock = partial(step.agree_on_step, device=DEVICE), Clock(DEVICE)

    def gradient(self, number: int) -> tuple[float, int]:
        """Compute a step's gradient; return its loss, and the micro-batches of each rank."""
        batches = self.feeder.micro_batches(self.plan.samples(number))
        supervised = self._agree(batches).supervised
        losses = step.run_micro_batches(self.engine, batches, supervised, self._clock)
        return step.summed(losses, DEVICE) / supervised, len(batches)

    def update(self, number: int) -> float:
        """Finish a step; return its gradient's norm."""
        assert self.recipe.train.steps is not None
        rate = learning_rate(number, self.recipe.train.steps, self.recipe.optimizer)
        engine.set_learning_rate(self.engine, rate)
        return self.engine.step()

    def evaluate(self) -> float:
        value = step.evaluate(self.engine, self.feeder, self._agree, DEVICE)
        assert value is not None
        return value


def write_model(engine: engine.Engine) -> Callable[[Path], None]:
    """Return what a checkpoint wants for the files of a model: here it has no tokenizer."""
    return partial(
        write_model_files,
        model=engine.module,
        tokenizer=SimpleNamespace(save_pretrained=lambda folder: None),
        stop_ids=[3],
        chat_template=None,
        buffers=persistent_buffers(engine.module),
    )


def _recipe(job: SimpleNamespace, cell: SimpleNamespace) -> Recipe:
    tree = {
        "run_dir": job.run_dir,
        "model": {
            "path": job.models[cell.model],
            "dtype": cell.dtype,
            "gradient_checkpointing": cell.checkpointing,
            "freeze": cell.freeze,
        },
        "data": {"train": [{"path": "in memory"}]},
        "train": {"batch_size": job.batch_size, "steps": cell.steps},
        "optimizer": job.optimizer,
        "deepspeed": job.shardings.get(cell.deepspeed, cell.deepspeed),
    }
    return check(tree, origin="the test")


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
