"""The adapter as diffusers' `load_lora_weights` reads it: `pytorch_lora_weights.safetensors`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.export.adapter import Adapter, Layer
from pipeline.export.peft_format import adapter_of_peft, peft_parts, scaled_up
from pipeline.safetensors_file import write_safetensors

FILE_NAME = "pytorch_lora_weights.safetensors"
_ALPHA = "reprolora_alpha"  # the α that was multiplied into B, so that a conversion gives it back


def write_diffusers(path: Path, adapter: Adapter, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
    """Write PEFT-named weights under `<component>.`, with the adapter's config in `lora_adapter_metadata`.

    α / r is multiplied into B and α = r is stated: a loader that does not read the config takes the scale for 1, and is right.

    Args:
        metadata: further text entries of the header; must hold nothing that changes from run to run.

    Raises:
        UserError: a LoHa or LoKr, which diffusers' loader does not know.
    """
    header = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(_config(adapter), sort_keys=True),
        _ALPHA: json.dumps({name: layer.alpha for name, layer in adapter.layers.items()}, sort_keys=True),
        **metadata,
    }
    write_safetensors(path, diffusers_tensors(adapter, dtype), header)


def diffusers_tensors(adapter: Adapter, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The file's tensors, with α / r multiplied in."""
    foreign = set(adapter.kinds) - {"lora", "dora"}
    if foreign:
        raise UserError(
            f"diffusers' loader knows no {' or '.join(sorted(foreign))}: use the Kohya format, or refactor it to a LoRA with --rank N"
        )
    return {
        f"{name}.{part}": tensor.to(dtype)
        for name, layer in adapter.layers.items()
        for part, tensor in peft_parts(scaled_up(layer), name).items()
    }


def adapter_of_diffusers(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Adapter:
    """The adapter in a file's tensors; α from the config in the header, else α = rank."""
    old = [key for key in tensors if ".lora.down." in key or "_lora.down." in key or ".lora_linear_layer." in key]
    if old:
        raise UserError(
            f"{old[0]}: names of diffusers before 0.22; load it in diffusers and save it again with save_lora_weights"
        )
    adapter = adapter_of_peft(tensors, {})
    config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    adapter = Adapter({name: replace(layer, alpha=_alpha(name, layer, config)) for name, layer in adapter.layers.items()})
    meant = json.loads(metadata.get(_ALPHA, "{}"))
    return Adapter({name: _unfolded(layer, meant.get(name)) for name, layer in adapter.layers.items()})


def _config(adapter: Adapter) -> dict[str, Any]:
    """PEFT's config for each component. α = r everywhere, so both patterns are the ranks that differ from the commonest."""
    config: dict[str, Any] = {}
    for component in adapter.components:
        layers = {name.removeprefix("text_model."): layer for name, layer in adapter.of(component).items()}
        rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
        others = {name: layer.rank for name, layer in layers.items() if layer.rank != rank}
        entries = {
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": sorted(layers),
            "use_dora": any(layer.kind == "dora" for layer in layers.values()),
            "peft_type": "LORA",
        }
        config |= {f"{component}.{key}": value for key, value in entries.items()}
    return config


def _alpha(name: str, layer: Layer, config: dict[str, Any]) -> float:
    component, _, path = name.partition(".")
    patterns = config.get(f"{component}.alpha_pattern") or {}
    found = patterns.get(path, patterns.get(path.removeprefix("text_model."), config.get(f"{component}.lora_alpha")))
    return float(layer.rank if found is None else found)


def _unfolded(layer: Layer, alpha: float | None) -> Layer:
    if alpha is None or alpha == layer.alpha or layer.alpha != layer.rank:
        return layer
    up = layer.parts["lora_up.weight"]
    original = (up.float() / (alpha / layer.rank)).to(up.dtype)
    return replace(layer, parts={**layer.parts, "lora_up.weight": original}, alpha=alpha)
