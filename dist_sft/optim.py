"""The optimizer: parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from dist_sft.config import Optimizer


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split the trainable parameters: matrices decay, biases and norms do not."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            # ZeRO-3 leaves a flat piece in place of the parameter; ds_shape is the real one.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            groups[len(shape) >= 2].append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
        for decays, parameters in groups.items()
        if parameters
    ]


def build_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    """Return AdamW over the model's trainable parameters."""
    return torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay),
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def learning_rate(step: int, total_steps: int, settings: Optimizer) -> float:
    """Return the learning rate of a step; steps count from 1.

    Linear warm-up to `lr`, which the last warm-up step reaches; then constant, linear or cosine
    (Loshchilov and Hutter, 2017, arXiv:1608.03983, equation 5, one cycle) towards
    `lr * min_lr_ratio`, which the step after the last would reach, so that no step has a rate of 0.
    """
    warmup = settings.warmup_steps
    if warmup is None:
        warmup = math.ceil(settings.warmup_ratio * total_steps)
    if step <= warmup:
        return settings.lr * step / warmup
    if settings.schedule == "constant":
        return settings.lr
    peak = max(1, warmup)
    progress = (step - peak) / (total_steps - peak + 1)
    if settings.schedule == "linear":
        remaining = 1.0 - progress
    else:
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    floor = settings.min_lr_ratio
    return settings.lr * (floor + (1.0 - floor) * remaining)
