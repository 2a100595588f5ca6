"""Optimisers by name, and learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn

from pipeline.errors import UserError

# name -> module, class, the extra of pyproject.toml that brings it
_FOREIGN = {
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit", "8bit"),
    "prodigy": ("pytorch_optimizer", "Prodigy", "optimisers"),
    "lion": ("pytorch_optimizer", "Lion", "optimisers"),
    "schedule-free-adamw": ("pytorch_optimizer", "ScheduleFreeAdamW", "optimisers"),
}


def build_optimiser(
    name: str, groups: Sequence[Sequence[nn.Parameter]], learning_rate: float, weight_decay: float, options: dict[str, Any]
) -> torch.optim.Optimizer:
    """The optimiser that `train.optimiser` names.

    Args:
        groups: parameters that share a learning rate; empty ones are left out.
        name: adamw (Loshchilov & Hutter 2019, arXiv 1711.05101), adamw8bit (its state in 8 bits: Dettmers et al. 2022,
            arXiv 2110.02861), adafactor (Shazeer & Stern 2018, arXiv 1804.04235, torch's own), prodigy (Mishchenko & Defazio
            2023, arXiv 2306.06101), lion (Chen et al. 2023, arXiv 2302.06675) or schedule-free-adamw (Defazio et al. 2024,
            arXiv 2405.15682).
        options: what the optimiser takes besides, of `betas`, `eps`, `d_coef`; what is not named stays the library's default.

    Raises:
        UserError: the library that has it is not installed.
    """
    parameters = [{"params": list(group)} for group in groups if group]
    if name == "adamw":
        return adamw(parameters, learning_rate, weight_decay, **options)
    if name == "adafactor":
        return torch.optim.Adafactor(parameters, lr=learning_rate, weight_decay=weight_decay)
    module, kind, extra = _FOREIGN[name]
    try:
        found = getattr(import_module(module), kind)
    except ImportError as error:
        raise UserError(
            f"train.optimiser: {name} needs {module.split('.')[0]}, which cannot be imported ({error}): "
            f"pip install 'reprolora[{extra}]', or set train.optimiser to adamw"
        ) from None
    optimiser: torch.optim.Optimizer = found(parameters, lr=learning_rate, weight_decay=weight_decay, **options)
    return optimiser


def adamw(
    parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]], learning_rate: float, weight_decay: float, **options: Any
) -> torch.optim.Optimizer:
    """AdamW with torch's defaults for β and ε where `options` names none; fused: one kernel a step."""
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True, **options)


def learning_rate_at(
    step: int, peak: float, schedule: str, steps: int, warmup_steps: int, cycles: int = 1, power: float = 1.0
) -> float:
    """The learning rate of a step.

    Linear warm-up to `peak` over `warmup_steps`, under every schedule; then constant, or down to zero at `steps`: linear,
    half a cosine, `cycles` half cosines that each start again from `peak` (Loshchilov & Hutter 2017, arXiv 1608.03983,
    eq. 5 with η_min = 0), or polynomial, the linear one to the `power`.

    Args:
        step: 0-based; `steps` and `warmup_steps` count optimiser steps, whatever the number of processes.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    if schedule == "linear":
        return peak * (1 - done)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "cosine-with-restarts":
        return peak * 0.5 * (1 + math.cos(math.pi * (cycles * done % 1.0)))
    if schedule == "polynomial":
        return float(peak * (1 - done) ** power)
    assert schedule == "constant", schedule
    return peak


def scaled_learning_rate(learning_rate: float, batch_size: int, rule: str) -> float:
    """The peak for a global batch, given the one for a single picture: `none`, `linear` (Goyal et al. 2017, arXiv
    1706.02677, section 2.1) or `sqrt` (Krizhevsky 2014, arXiv 1404.5997, section 5)."""
    if rule == "linear":
        return learning_rate * batch_size
    if rule == "sqrt":
        return learning_rate * math.sqrt(batch_size)
    assert rule == "none", rule
    return learning_rate
