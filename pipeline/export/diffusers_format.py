"""The adapter as diffusers' `load_lora_weights` reads it: `pytorch_lora_weights.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.safetensors_file import write_safetensors

FILE_NAME = "pytorch_lora_weights.safetensors"


def write_diffusers(
    folder: Path,
    weights: dict[str, Tensor],
    denoiser_key: str,
    rank: int,
    alpha: float,
    targets: tuple[str, ...],
    dtype: torch.dtype,
    metadata: dict[str, str],
) -> Path:
    """Write PEFT-named weights under `<denoiser_key>.`, with the adapter's config in `lora_adapter_metadata`.

    α / r is multiplied into B and α = r is stated: a loader that does not read the config takes the scale for 1, and is right.

    Args:
        metadata: further text entries of the header; must hold nothing that changes from run to run.
    """
    config = {"r": rank, "lora_alpha": rank, "target_modules": sorted(targets), "peft_type": "LORA"}
    header = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps({f"{denoiser_key}.{k}": v for k, v in config.items()}, sort_keys=True),
        **metadata,
    }
    scaled = {
        f"{denoiser_key}.{name}": (tensor * (alpha / rank) if ".lora_B." in name else tensor).to(dtype)
        for name, tensor in weights.items()
    }
    path = folder / FILE_NAME
    write_safetensors(path, scaled, header)
    return path


def load_into(pipeline: Any, path: Path, scale: float = 1.0) -> None:
    """Load an exported file into a diffusers pipeline and weigh it."""
    pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name="reprolora", local_files_only=True)
    pipeline.set_adapters("reprolora", scale)
