"""Checkpoints: written whole or not at all, verified when read, the last few kept."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
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
    groups: tuple[dict[str, Any], ...] = ()  # ... and the numbers and tensors that some optimisers keep in the groups
    average: dict[str, Tensor] | None = None  # moving average of the adapter
    scaler: dict[str, float] | None = None  # loss scale of float16


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> None:
    """Write `folder/step-…/` atomically, then delete all but the newest `keep`."""
    target = folder / f"{_PREFIX}{checkpoint.step:08d}"
    if target.exists():
        return  # the folder's fingerprint and the step settle the content
    with atomic_directory(target) as partial:
        tensors, numbers = _split({**checkpoint.optimiser, **{f"group{i}": g for i, g in enumerate(checkpoint.groups)}})
        write_safetensors(partial / "adapter.safetensors", checkpoint.adapter)
        write_safetensors(partial / "optimiser.safetensors", tensors)
        if checkpoint.average is not None:
            write_safetensors(partial / "average.safetensors", checkpoint.average)
        sums = {p.name: hash_file(p) for p in sorted(partial.iterdir())}
        state = {"step": checkpoint.step, "optimiser": numbers, "scaler": checkpoint.scaler, "sha256": sums}
        write_json(partial / "state.json", state)
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old)


def checkpoint_folders(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints that are there, oldest first, with their steps; none of them verified."""
    return [(int(path.name.removeprefix(_PREFIX)), path) for path in _all(folder)]


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


def save_best(path: Path, adapter: dict[str, Tensor], step: int, loss: float) -> None:
    """Keep the adapter with the lowest held-out loss so far, atomically."""
    write_safetensors(path, adapter, {"step": str(step), "held_out_loss": repr(loss)})


def best_so_far(path: Path) -> tuple[int, float] | None:
    """Step and held-out loss of the kept best; None where there is none."""
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    return int(header["step"]), float(header["held_out_loss"])


def _load(path: Path) -> Checkpoint:
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    for name, expected in state["sha256"].items():
        if hash_file(path / name) != expected:
            raise ValueError(f"{name} is not what was written")
    optimiser: dict[str, Any] = {}
    for key, tensor in read_safetensors(path / "optimiser.safetensors").items():
        index, _, part = key.partition(".")
        _put(optimiser.setdefault(index, {}), part, tensor)
    for index, numbers in state["optimiser"].items():
        for part, number in numbers.items():
            _put(optimiser.setdefault(index, {}), part, number)
    groups = tuple(
        optimiser.pop(name) for name in sorted((n for n in optimiser if n.startswith("group")), key=lambda n: int(n[5:]))
    )
    average = path / "average.safetensors"
    return Checkpoint(
        state["step"],
        read_safetensors(path / "adapter.safetensors"),
        {int(k): v for k, v in optimiser.items()},
        groups,
        read_safetensors(average) if average.name in state["sha256"] else None,
        state["scaler"],
    )


def _split(optimiser: dict[Any, Any]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Tensors under `<parameter>.<name>` or `group<i>.<name>`, and plain numbers apart. bitsandbytes nests its own: `<name>/<part>`, and
    shares its tables between parameters, which a file of tensors cannot: each has a copy."""
    tensors: dict[str, Tensor] = {}
    held: set[int] = set()
    numbers: dict[str, dict[str, Any]] = {}
    for index, values in optimiser.items():
        nested = {f"{n}/{part}": v for n, inner in values.items() if isinstance(inner, dict) for part, v in inner.items()}
        for name, value in {**{n: v for n, v in values.items() if not isinstance(v, dict)}, **nested}.items():
            if isinstance(value, torch.Tensor):
                shared = value.untyped_storage().data_ptr() in held
                held.add(value.untyped_storage().data_ptr())
                tensors[f"{index}.{name}"] = value.clone() if shared else value
            else:
                numbers.setdefault(str(index), {})[name] = value
    return tensors, numbers


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    outer, nested, inner = name.partition("/")
    if nested:
        values.setdefault(outer, {})[inner] = value
    else:
        values[name] = value


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_PREFIX}*"))
