"""The processes that train one adapter together.

Each takes a stretch of every batch's positions, and the adapter's gradients are added up before the optimiser steps. Draws are
functions of a sample's position, so the sum is that of one process, but for the order in which floats are added.
Only gradients of the adapter travel, in one message a step: they are some megabytes, so there is nothing to overlap.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Team:
    """This process's place among those that train together."""

    rank: int = 0
    size: int = 1
    leads: bool = True  # the first on its machine: it alone writes files

    def share(self, count: int) -> tuple[int, int]:
        """The positions [start, stop) of a batch of `count` that are this process's: none, where there are too few."""
        return self.rank * count // self.size, (self.rank + 1) * count // self.size

    def add_up(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> None:
        """Replace gradients and the loss, in place, by their sums over the processes."""
        for p in parameters:  # none: where a layer's output is not used, or no sample is this process's
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([*(g.flatten() for g in gradients), loss.reshape(1)])
        torch.distributed.all_reduce(flat)
        sizes = [g.numel() for g in gradients]
        for p, g, total in zip(parameters, gradients, torch.split(flat[:-1], sizes), strict=True):
            p.grad = torch.empty_like(p).copy_(total.view_as(g))  # in the parameter's own memory layout, as fused kernels need
        loss.copy_(flat[-1])

    def any(self, flag: bool) -> bool:
        """Whether it is so in any of the processes. Goes through the CPU: no device is waited for."""
        if self.size == 1:
            return flag
        votes = torch.tensor([int(flag)])
        torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX)
        return bool(votes.item())

    def from_first(self, value: Any) -> Any:
        """What the first process gives, in all of them."""
        if self.size == 1:
            return value
        box = [value if self.rank == 0 else None]
        torch.distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]


ALONE = Team()


def join() -> Team:
    """Meet the others that torchrun or `accelerate launch` started; `ALONE` where there are none."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    # both at once: gradients over nccl, flags and checkpoints over gloo
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend)
    return Team(torch.distributed.get_rank(), size, leads=os.environ.get("LOCAL_RANK", "0") == "0")
