"""Which piece of which parameter this rank holds: the training state by name and element range.

DeepSpeed keeps the state in flat buffers whose layout depends on stage, ranks and groups. Here
every layout is seen as the same thing: fragments of flattened parameters. What is saved from one
layout can therefore be read into any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from torch import Tensor

from dist_sft import world
from dist_sft.engine import DataParallelEngine, Engine, ZeroEngine
from dist_sft.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What DeepSpeed's dynamic loss scaler changes as it goes; the rest are settings."""


class Fragment(NamedTuple):
    """A contiguous piece of one flattened parameter, as views of this rank's memory."""

    name: str
    start: int
    tensors: dict[str, Tensor]
    """fp32 (the master weights), exp_avg and exp_avg_sq, each [n] float32; of a frozen parameter
    only fp32, and where it is held in what the model computes in, as there is no other copy."""


def check(engine: Engine) -> None:
    """Raise UserError on every rank where the state is not what its names say; call at the start.

    Master weights begin as copies of the weights that the model computes with. Where they differ,
    this is a layout that DeepSpeed itself, or this file, reads wrongly: better now than in a save.
    """
    wrong = world.gather(list(_misread(engine)))
    if wrong:
        raise UserError(
            f"deepspeed: {wrong[0]}, so a checkpoint would be wrong; try a sharding without "
            "settings of its own, such as zero2"
        )


def _misread(engine: Engine) -> Iterator[str]:
    """Say what is wrong with this rank's fragments, before the first step."""
    parameters = dict(engine.module.named_parameters())
    for name, start, tensors in held(engine):
        parameter: Any = parameters[name]
        masters = tensors["fp32"]
        if _is_stage_3(engine):
            weights = parameter.ds_tensor.data[: len(masters)]
        else:
            weights = parameter.data.view(-1)[start : start + len(masters)]
        if parameter.requires_grad:
            for key in sorted(k for k, t in tensors.items() if t.dtype != torch.float32):
                yield f"{key} of {name} is {tensors[key].dtype} and not float32"
        if not torch.equal(weights, masters.to(weights)):
            yield f"the master weights of {name} are not those that the model computes with"


def parameter_shapes(engine: Engine) -> dict[str, list[int]]:
    """Return the shape of every parameter; a tied one appears once."""
    return {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in engine.module.named_parameters()
    }


def frozen(engine: Engine) -> list[str]:
    """Return the names of the parameters that are not trained, in the order of the shapes."""
    return [name for name, p in engine.module.named_parameters() if not p.requires_grad]


def owned(engine: Engine) -> Iterator[Fragment]:
    """Yield this rank's share; all ranks together own every element once."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for whole in _replicated(engine):
        size = -(-len(whole.tensors["fp32"]) // ranks)
        pieces = {k: t[rank * size :][:size] for k, t in whole.tensors.items()}
        if len(pieces["fp32"]):
            yield Fragment(whole.name, rank * size, pieces)
    yield from _divided(engine)


def held(engine: Engine) -> Iterator[Fragment]:
    """Yield everything this rank keeps; in plain data parallel that is the whole state."""
    yield from _replicated(engine)
    yield from _divided(engine)


def _replicated(engine: Engine) -> Iterator[Fragment]:
    """Yield what every rank has as a whole: all in plain data parallel, frozen in ZeRO 1 and 2."""
    if _is_stage_3(engine):
        return
    plain = isinstance(engine, DataParallelEngine)
    for name, parameter in engine.module.named_parameters():
        tensors = {"fp32": parameter.data.view(-1)}
        if plain and parameter.requires_grad:
            # accelerate's wrapper hides the state's keys
            moments = _moments(engine.optimizer.optimizer, parameter)
            tensors |= {key: moment.view(-1) for key, moment in moments.items()}
        if plain or not parameter.requires_grad:
            yield Fragment(name, 0, tensors)


def _divided(engine: Engine) -> Iterator[Fragment]:
    """Yield the pieces that are on this rank only."""
    if isinstance(engine, DataParallelEngine):
        return
    names = {id(p): name for name, p in engine.module.named_parameters()}
    if _is_stage_3(engine):
        yield from _stage_3(engine.optimizer, names)
        yield from _frozen_in_stage_3(engine)
    else:
        yield from _stage_1_and_2(engine.optimizer, names)


def _is_stage_3(engine: Engine) -> bool:
    if not isinstance(engine, ZeroEngine):
        return False
    return bool(engine.deepspeed.zero_optimization_partition_weights())


def _stage_1_and_2(zero: Any, names: dict[int, str]) -> Iterator[Fragment]:
    # ZeRO-1 in bfloat16 has an optimizer class of its own with the same mapping inside.
    groups = zero.bf16_groups if hasattr(zero, "bf16_groups") else zero.bit16_groups
    for group, settings in zip(groups, zero.optimizer.param_groups, strict=True):
        (flat,) = settings["params"]
        moments = _moments(zero.optimizer, flat)
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is None:  # no element of it lives on this rank
                continue
            place = mapping.hp_fragment_address
            pieces = {k: t.narrow(0, place.start, place.numel) for k, t in moments.items()}
            tensors = {"fp32": mapping.hp_fragment.data.view(-1), **pieces}
            yield Fragment(names[id(parameter)], mapping.lp_fragment_address.start, tensors)


def _stage_3(zero: Any, names: dict[int, str]) -> Iterator[Fragment]:
    # Rank r holds elements [r * c, (r + 1) * c) of a parameter, c = ceil(n / ranks), padded.
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        moments = _moments(zero.optimizer, flat)
        offset = 0
        for parameter in group:
            share = -(-parameter.ds_numel // ranks)
            real = min(share, parameter.ds_numel - rank * share)
            if real > 0:
                tensors = {"fp32": flat.data, **moments}
                pieces = {k: t.narrow(0, offset, real) for k, t in tensors.items()}
                yield Fragment(names[id(parameter)], rank * share, pieces)
            offset += share


def _frozen_in_stage_3(engine: Engine) -> Iterator[Fragment]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            share = -(-parameter.ds_numel // ranks)
            real = min(share, parameter.ds_numel - rank * share)
            if real > 0:
                piece = parameter.ds_tensor.data.narrow(0, 0, real)
                yield Fragment(name, rank * share, {"fp32": piece})


def _moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return AdamW's moments of one tensor; before the first step they are made, as zeros."""
    state = optimizer.state[parameter]
    for key in MOMENTS:
        if key not in state:
            state[key] = torch.zeros_like(parameter.data)
    if "step" not in state:
        # Fused AdamW wants its counter beside the data.
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {key: state[key] for key in MOMENTS}


def optimizer_steps(engine: Engine) -> int:
    """Return how many updates AdamW has counted."""
    states = list(_inner(engine).state.values())
    return int(states[0]["step"]) if states and "step" in states[0] else 0


def set_optimizer_steps(engine: Engine, steps: int) -> None:
    """Set AdamW's counter, a tensor of its own for every parameter group."""
    for state in _inner(engine).state.values():
        state["step"].fill_(steps)


def loss_scale(engine: Engine) -> dict[str, float] | None:
    """Return the state of float16's loss scaler; None where nothing is scaled."""
    scaler = _loss_scaler(engine)
    return {key: getattr(scaler, key) for key in SCALER} if scaler else None


def set_loss_scale(engine: Engine, saved: dict[str, float] | None) -> None:
    """Set float16's loss scaler; nothing happens where either side has none."""
    scaler = _loss_scaler(engine)
    if scaler and saved:
        for key in SCALER:
            setattr(scaler, key, saved[key])


def _loss_scaler(engine: Engine) -> Any:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if isinstance(scaler, DynamicLossScaler) else None  # others never change


def _inner(engine: Engine) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = engine.optimizer.optimizer
    return optimizer


def publish(engine: Engine) -> None:
    """Carry restored master weights over to the weights that the model computes with."""
    if isinstance(engine, DataParallelEngine):
        return  # they are the same memory
    assert isinstance(engine, ZeroEngine)
    zero: Any = engine.optimizer
    if not _is_stage_3(engine):
        zero.update_lp_params()
        return
    for i, master in enumerate(zero.fp32_partitioned_groups_flat):
        flat = zero.fp16_partitioned_groups_flat[i]
        flat.data.copy_(master.data)
        pieces = zero.unflatten(flat, zero.fp16_partitioned_groups[i])
        for partition, piece in zip(zero.fp16_partitioned_groups[i], pieces, strict=True):
            partition.data = piece
    # Small parameters stay gathered on every rank and would keep their old values.
    if zero.persistent_parameters:
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
