"""Which device to compute on."""

from __future__ import annotations

import os

import torch

from pipeline.errors import UserError


def pick_device(wanted: str) -> torch.device:
    """`auto`: CUDA, else Apple's MPS, else the CPU.

    Raises:
        UserError: the named device is not there.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(wanted)
    there = {
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }[device.type]
    if not there:
        raise UserError(f"runtime.device: {wanted} is not available here (torch {torch.__version__}): use auto or cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # Accelerate takes the current one
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    return device
