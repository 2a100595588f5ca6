"""Optimisers by name, and learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn


def adamw(parameters: Sequence[nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with torch's defaults for β and ε; fused: one kernel a step."""
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)


def learning_rate_at(step: int, peak: float, schedule: str, steps: int, warmup_steps: int) -> float:
    """The learning rate of a step.

    Linear warm-up to `peak` over `warmup_steps`, under every schedule; then constant, or linear or half a cosine down to
    zero at `steps`.

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
    assert schedule == "constant", schedule
    return peak
