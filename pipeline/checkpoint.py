"""Checkpoints: written whole or not at all, verified when read, the last few kept."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.files import atomic_directory, hash_file, write_json
from pipeline.progress import say
from pipeline.safetensors_file import read_safetensors, write_safetensors

_PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on: nothing of its randomness, which has no state."""

    step: int  # optimiser steps done
    adapter: dict[str, Tensor]
    optimiser: dict[int, Any]  # torch's state dict, without parameter groups


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> None:
    """Write `folder/step-…/` atomically, then delete all but the newest `keep`."""
    target = folder / f"{_PREFIX}{checkpoint.step:08d}"
    if target.exists():
        return  # the folder's fingerprint and the step settle the content
    with atomic_directory(target) as partial:
        tensors, numbers = _split(checkpoint.optimiser)
        write_safetensors(partial / "adapter.safetensors", checkpoint.adapter)
        write_safetensors(partial / "optimiser.safetensors", tensors)
        sums = {p.name: hash_file(p) for p in sorted(partial.iterdir())}
        write_json(partial / "state.json", {"step": checkpoint.step, "optimiser": numbers, "sha256": sums})
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old)


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; a damaged one is named, set aside and passed over."""
    for path in reversed(_all(folder)):
        try:
            return _load(path)
        except Exception as error:  # whatever a damaged file makes a parser raise
            say(f"  checkpoint {path.name} is damaged ({error}): going back to the one before")
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    return None


def _load(path: Path) -> Checkpoint:
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    for name, expected in state["sha256"].items():
        if hash_file(path / name) != expected:
            raise ValueError(f"{name} is not what was written")
    optimiser: dict[str, Any] = {}
    for key, tensor in read_safetensors(path / "optimiser.safetensors").items():
        index, _, part = key.partition(".")
        optimiser.setdefault(index, {})[part] = tensor
    for index, numbers in state["optimiser"].items():
        optimiser.setdefault(index, {}).update(numbers)
    return Checkpoint(state["step"], read_safetensors(path / "adapter.safetensors"), {int(k): v for k, v in optimiser.items()})


def _split(optimiser: dict[int, Any]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Tensors under `<parameter>.<name>`, and plain numbers apart."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for index, values in optimiser.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                numbers.setdefault(str(index), {})[name] = value
    return tensors, numbers


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_PREFIX}*"))
