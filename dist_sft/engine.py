"""One face for sharded (DeepSpeed ZeRO) and plain data-parallel training.

Both engines take the sum of token losses over the supervised tokens of the *whole global batch*,
accumulate over any number of micro-batches and step once. What each library would do to that loss
on its own (average over ranks, divide by the accumulation count, keep only the last gradient,
clip at 1.0) is dealt with here and nowhere else.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    # DeepSpeed chooses its accelerator when it is imported, and guesses wrong without a GPU.
    os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
from deepspeed.ops import __compatible_ops__ as deepspeed_ops
from torch import Tensor, nn
from transformers import PreTrainedModel

from dist_sft.config import Recipe
from dist_sft.optim import build_optimizer
from dist_sft.sections import Watchdog
from dist_sft.zero import DeepSpeed

PRECISION = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}
MARGIN = timedelta(minutes=10)
FOREVER = timedelta(days=365)
# Any number above 1 makes ZeRO 1 and 2 accumulate; where a step ends, micro_batch() says.
ACCUMULATION = 2


class Engine(Protocol):
    """What the training loop needs of a model that is spread over the ranks."""

    module: PreTrainedModel
    optimizer: Any

    def __call__(self, **inputs: Any) -> Any:
        """Run the model."""

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Surround one micro-batch's forward and backward; `last` ends the optimizer step."""

    def backward(self, loss_sum: Tensor, supervised_tokens: int) -> None:
        """Add one micro-batch's gradient.

        `loss_sum` is the sum of its token losses, `supervised_tokens` the number of targets in the
        global batch over all ranks.
        """

    @property
    def overflowed(self) -> bool:
        """Tell whether float16's loss scale was too high for the last step."""

    def step(self) -> float:
        """Clip, update the weights, clear the gradient; return the gradient's norm before it.

        Weights and moments stay as they are where the norm is not finite.
        """

    def close(self) -> None:
        """Let go of the process group; call this before it is destroyed."""


class ZeroEngine:
    """Drive a DeepSpeed engine by hand."""

    def __init__(self, engine: Any) -> None:
        self.deepspeed = engine
        self.module: PreTrainedModel = engine.module
        self.optimizer = engine.optimizer

    def __call__(self, **inputs: Any) -> Any:
        return self.deepspeed(**inputs)

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        # ZeRO 1 and 2 keep only the last gradient unless they are told where a step ends.
        self.deepspeed.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss_sum: Tensor, supervised_tokens: int) -> None:
        # DeepSpeed averages over ranks, hence the factor; scale_wrt_gas would divide once more.
        loss = loss_sum * (dist.get_world_size() / supervised_tokens)
        self.deepspeed.backward(loss, scale_wrt_gas=False)

    def step(self) -> float:
        self.deepspeed.step()
        if self.optimizer.overflow and hasattr(self.optimizer, "averaged_gradients"):
            # With an offloaded optimizer, ZeRO 1 and 2 would add the next gradient to this one.
            for group in self.optimizer.averaged_gradients:
                self.optimizer.averaged_gradients[group] = None
        return float(self.deepspeed.get_global_grad_norm())

    def close(self) -> None:
        pass

    @property
    def overflowed(self) -> bool:
        # DeepSpeed calls it overflow in every dtype; only with a loss scale does it pass by itself.
        return bool(self.deepspeed.fp16_enabled() and self.optimizer.overflow)


class DataParallelEngine:
    """Keep a whole copy of the model on every rank."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Any, clip: float | None
    ) -> None:
        self._accelerator, self._model = accelerator, model
        self._clip = float("inf") if clip is None else clip
        self.module: PreTrainedModel = accelerator.unwrap_model(model)
        self.optimizer = optimizer

    def __call__(self, **inputs: Any) -> Any:
        return self._model(**inputs)

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        local_only = contextlib.nullcontext() if last else self._accelerator.no_sync(self._model)
        with local_only:
            yield

    def backward(self, loss_sum: Tensor, supervised_tokens: int) -> None:
        # DistributedDataParallel averages over ranks, too.
        (loss_sum * (self._accelerator.num_processes / supervised_tokens)).backward()

    def step(self) -> float:
        norm: Tensor = self._accelerator.clip_grad_norm_(self._model.parameters(), self._clip)
        # Every rank computes it; copies of the model would part if they did not judge alike.
        finite = norm.isfinite().int()
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm) if finite or not norm.isfinite() else math.nan

    def close(self) -> None:
        # As the last to hold the process group, DistributedDataParallel would end gloo's threads
        # without letting them have Python's lock, which they may wait for: a rank that never ends.
        del self._model
        self._accelerator.free_memory()

    @property
    def overflowed(self) -> bool:
        return False


def set_learning_rate(engine: Engine, value: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = value


def make_accelerator(recipe: Recipe, dtype: torch.dtype, project_dir: Path) -> Accelerator:
    """Join the ranks that torchrun or Ray started; make this before any model is built.

    With ZeRO-3, transformers then builds and loads models already partitioned.
    """
    on_gpu = torch.cuda.is_available()
    # accelerate splits CPU ranks into worlds of one unless it is given the backend.
    group = InitProcessGroupKwargs("nccl" if on_gpu else "gloo", timeout=patience(recipe.watchdog))
    common: dict[str, Any] = {
        "mixed_precision": PRECISION[dtype],
        "kwargs_handlers": [group],
        "project_dir": project_dir,
    }
    if recipe.deepspeed is None:
        return Accelerator(cpu=not on_gpu, **common)
    # An op that DeepSpeed would compile for a minute at almost every start, for nothing here.
    deepspeed_ops["deepspeed_shm_comm"] = False
    config = deepspeed_config(recipe.deepspeed, dtype, recipe.optimizer.clip)
    plugin = DeepSpeedPlugin(hf_ds_config=config)
    return Accelerator(gradient_accumulation_steps=ACCUMULATION, deepspeed_plugin=plugin, **common)


def patience(watchdog: Watchdog) -> timedelta:
    """Return how long a collective may wait: until after the watchdog has named who is late.

    Its own timeout would blame the ranks that wait, and end a save that may take so long.
    """
    limits = (watchdog.seconds, watchdog.slow_seconds)
    return max(timedelta(seconds=x) + MARGIN if x else FOREVER for x in limits)


def deepspeed_config(sharding: DeepSpeed, dtype: torch.dtype, clip: float | None) -> dict[str, Any]:
    """Complete the sharding strategy with what the recipe decides."""
    config = sharding.model_dump(exclude_none=True)
    config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": clip or 0.0,  # left out, it would be 1.0
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW needs no compiler
        "steps_per_print": 2**31,
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    if dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True}
    if dtype == torch.float16:
        config["fp16"] = {"enabled": True}
    return config


def make_engine(accelerator: Accelerator, model: PreTrainedModel, recipe: Recipe) -> Engine:
    """Shard the model and its optimizer over the ranks."""
    optimizer = build_optimizer(model, recipe.optimizer)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    if recipe.deepspeed is None:
        return DataParallelEngine(accelerator, prepared, optimizer, recipe.optimizer.clip)
    assert isinstance(prepared, deepspeed.DeepSpeedEngine)
    return ZeroEngine(prepared)
