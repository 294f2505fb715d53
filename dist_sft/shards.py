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
from torch import Tensor

from dist_sft.engine import DataParallelEngine, Engine, ZeroEngine

MOMENTS = ("exp_avg", "exp_avg_sq")


class Fragment(NamedTuple):
    """A contiguous piece of one flattened parameter, as views of this rank's memory."""

    name: str
    start: int
    tensors: dict[str, Tensor]
    """fp32 (the master weights), exp_avg and exp_avg_sq, each [n] float32."""


def parameter_shapes(engine: Engine) -> dict[str, list[int]]:
    """Return the shape of every trained parameter; a tied one appears once."""
    return {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }


def owned(engine: Engine) -> Iterator[Fragment]:
    """Yield this rank's share of the state; all ranks together hold every element once."""
    if isinstance(engine, DataParallelEngine):
        rank, world = dist.get_rank(), dist.get_world_size()
        for whole in held(engine):
            size = -(-len(whole.tensors["fp32"]) // world)
            pieces = {key: tensor[rank * size :][:size] for key, tensor in whole.tensors.items()}
            if len(pieces["fp32"]):
                yield Fragment(whole.name, rank * size, pieces)
    else:
        yield from held(engine)


def held(engine: Engine) -> Iterator[Fragment]:
    """Yield everything this rank keeps; in plain data parallel that is the whole state."""
    if isinstance(engine, DataParallelEngine):
        optimizer = engine.optimizer.optimizer  # accelerate's wrapper hides the state's keys
        for name, parameter in engine.module.named_parameters():
            if parameter.requires_grad:
                moments = _moments(optimizer, parameter)
                tensors = {"fp32": parameter.data, **moments}
                yield Fragment(name, 0, {k: t.view(-1) for k, t in tensors.items()})
    else:
        assert isinstance(engine, ZeroEngine)
        names = {id(p): name for name, p in engine.module.named_parameters()}
        if engine.deepspeed.zero_optimization_partition_weights():
            yield from _stage_3(engine.optimizer, names)
        else:
            yield from _stage_1_and_2(engine.optimizer, names)


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
    # Rank r holds elements [r * c, (r + 1) * c) of a parameter, c = ceil(n / world), padded.
    rank, world = dist.get_rank(), dist.get_world_size()
    for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        moments = _moments(zero.optimizer, flat)
        offset = 0
        for parameter in group:
            share = -(-parameter.ds_numel // world)
            real = min(share, parameter.ds_numel - rank * share)
            if real > 0:
                tensors = {"fp32": flat.data, **moments}
                pieces = {k: t.narrow(0, offset, real) for k, t in tensors.items()}
                yield Fragment(names[id(parameter)], rank * share, pieces)
            offset += share


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


def _inner(engine: Engine) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = engine.optimizer.optimizer
    return optimizer


def publish(engine: Engine) -> None:
    """Carry restored master weights over to the weights that the model computes with."""
    if isinstance(engine, DataParallelEngine):
        return  # they are the same memory
    assert isinstance(engine, ZeroEngine)
    zero: Any = engine.optimizer
    if not engine.deepspeed.zero_optimization_partition_weights():
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
