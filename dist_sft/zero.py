"""The DeepSpeed file: sharding strategy only. Everything else belongs to the recipe."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Elements = Annotated[int, Field(ge=1)]

# What DeepSpeed would also read from its file, and where dist_sft has it. One place per setting:
# two places that disagree are how gradients get clipped or batches resized without a word.
BELONGS_TO_RECIPE = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.tokens_per_micro_batch",
    "gradient_accumulation_steps": "train.tokens_per_micro_batch (accumulation follows from it)",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "fp16": "model.dtype: float16",
    "bf16": "model.dtype: bfloat16",
    "torch_autocast": "model.dtype",
    "amp": "model.dtype",
    "activation_checkpointing": "model.gradient_checkpointing",
    "steps_per_print": "nothing: dist_sft prints its own metrics",
    "wall_clock_breakdown": "nothing: metrics.jsonl has the time of every phase",
    "tensorboard": "trackers",
    "wandb": "trackers",
    "comet": "trackers",
    "csv_monitor": "nothing: metrics.jsonl is always written",
    "checkpoint": "checkpoint",
    "dataloader_drop_last": "nothing: every row is seen",
    "data_efficiency": "data",
    "seed": "seed",
}


class _Json(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Offload(_Json):
    """Keep the optimizer state or the parameters in the node's memory."""

    device: Literal["cpu", "none"]
    pin_memory: bool = False

    @model_validator(mode="before")
    @classmethod
    def _no_nvme(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("device") == "nvme":
            raise ValueError("offload to nvme is not supported; allowed: cpu, none")
        return value


class ZeroOptimization(_Json):
    """DeepSpeed's `zero_optimization`, with sizes in elements and none of them "auto"."""

    stage: Literal[1, 2, 3]
    reduce_bucket_size: Elements = 200_000_000
    allgather_bucket_size: Elements = 200_000_000
    overlap_comm: bool | None = None
    reduce_scatter: bool = True
    contiguous_gradients: bool = True
    allgather_partitions: bool = True
    round_robin_gradients: bool = False
    sub_group_size: Elements = 1_000_000_000
    stage3_prefetch_bucket_size: Annotated[int, Field(ge=0)] = 50_000_000
    stage3_param_persistence_threshold: Annotated[int, Field(ge=0)] = 100_000
    stage3_max_live_parameters: Elements = 1_000_000_000
    stage3_max_reuse_distance: Elements = 1_000_000_000
    offload_optimizer: Offload | None = None
    offload_param: Offload | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_auto(cls, value: Any) -> Any:
        if isinstance(value, dict):
            auto = [key for key, item in value.items() if item == "auto"]
            if auto:
                raise ValueError(
                    f"{', '.join(auto)}: 'auto' becomes hidden_size squared, which means hundreds "
                    "of tiny messages for a small model; give a number (50000000 to 500000000)"
                )
            if value.get("stage") == 0:
                raise ValueError("stage 0 is no sharding: write deepspeed: null in the recipe")
        return value

    @model_validator(mode="after")
    def _params_only_in_stage_3(self) -> Self:
        if self.offload_param and self.offload_param.device == "cpu" and self.stage < 3:
            raise ValueError(f"offload_param needs stage 3, got stage {self.stage}")
        return self

    @model_validator(mode="after")
    def _what_deepspeed_can_do(self) -> Self:
        if self.round_robin_gradients and self.stage < 3:
            raise ValueError(
                "round_robin_gradients: true is not supported, as DeepSpeed 0.19 then gives its "
                "master weights to the wrong parameters whenever they are read, and checkpoints "
                "and models would be scrambled; allowed: false"
            )
        if self.allgather_bucket_size % 2 and self.stage < 3:
            raise ValueError(
                f"allgather_bucket_size: got {self.allgather_bucket_size}; allowed: even numbers"
            )
        return self

    @property
    def offloads_optimizer(self) -> bool:
        """Tell whether the optimizer state lives in CPU memory."""
        return self.offload_optimizer is not None and self.offload_optimizer.device == "cpu"


class DeepSpeed(_Json):
    """The sharding strategy of a run."""

    zero_optimization: ZeroOptimization


def shipped() -> dict[str, Path]:
    """Return the sharding strategies that come with dist_sft, by name."""
    here = Path(__file__).parent
    # The wheel carries the folder inside the package; a checkout has it at its top.
    folder = next(p for p in (here / "deepspeed_configs", here.parent / "deepspeed_configs")
                  if p.is_dir())  # fmt: skip
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def load_deepspeed(value: Any) -> Any:
    """Replace a strategy's name or file by its content, so that config.json stands alone.

    Raises ValueError for what cannot be read, and for keys that have their place in the recipe:
    here it is still known which file they are in.
    """
    content = _read(value) if isinstance(value, str) else value
    if isinstance(content, dict):
        keys = sorted(str(key) for key in content.keys() - {"zero_optimization"})
        mistakes = [_misplaced(key) for key in keys]
        if mistakes:
            raise ValueError(f"only zero_optimization is allowed here: {'; '.join(mistakes)}")
    return content


def _read(name: str) -> Any:
    names = shipped()
    path = names.get(name, Path(os.path.expanduser(name)))
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"no file of this name; allowed: a JSON file, null, {', '.join(names)}"
                         f"{hint}") from None  # fmt: skip
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"the file is not valid JSON: {error}") from None


def _misplaced(key: str) -> str:
    place = BELONGS_TO_RECIPE.get(key)
    if place is None:
        near = difflib.get_close_matches(key, ["zero_optimization"], n=1)
        return f"unknown key {key}" + (f" (did you mean {near[0]!r}?)" if near else "")
    if place.startswith("nothing: "):
        return f"{key} can go, {place.removeprefix('nothing: ')}"
    return f"{key} belongs in the recipe as {place}"
