"""The weights that leave the training: as they stand, or averaged over the steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def update_average(average: Sequence[Tensor], parameters: Sequence[nn.Parameter], decay: float, step: int) -> None:
    """Exponential moving average, in place: ā ← d ā + (1 − d) w with d = min(decay, (1 + n) / (10 + n)).

    The growing d is what the average begins with, so that it forgets the start (as in TensorFlow's and diffusers' EMA).

    Args:
        step: optimiser steps done before this one.
    """
    d = min(decay, (1 + step) / (10 + step))
    for mean, weight in zip(average, parameters, strict=True):
        mean.lerp_(weight.detach(), 1 - d)


@contextmanager
def final_weights(parameters: Sequence[nn.Parameter], average: Sequence[Tensor] | None, optimiser: Any) -> Iterator[None]:
    """Inside the block the parameters are what would leave the training now; after it, bit for bit what they were.

    That is the moving average where there is one, and the averaged iterate of a schedule-free optimiser, which trains at
    another point than the one to be used.
    """
    switches = [group for group in optimiser.param_groups if "train_mode" in group]
    if average is None and not switches:
        yield
        return
    kept = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            if average is not None:
                for p, mean in zip(parameters, average, strict=True):
                    p.copy_(mean)
        if switches:
            optimiser.eval()
        yield
    finally:
        # copied back: undoing the optimiser's interpolation would round
        with torch.no_grad():
            for p, old in zip(parameters, kept, strict=True):
                p.copy_(old)
        for group in switches:
            group["train_mode"] = True
