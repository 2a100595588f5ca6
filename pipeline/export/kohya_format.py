"""The adapter as Kohya's scripts, ComfyUI, Forge and A1111 read it: `<layer>.lora_down.weight`, `.lora_up.weight`, `.alpha`, …

Every layer carries its α: a loader that finds none takes the scale for 1. α is stored in float32 whatever the factors are in, so
that it comes back exactly.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pipeline.export.adapter import Adapter, Layer, layer_of
from pipeline.export.kohya_names import kohya_name, layer_name
from pipeline.families.base import KohyaNames
from pipeline.safetensors_file import write_safetensors


def write_kohya(
    path: Path,
    adapter: Adapter,
    names: KohyaNames,
    layers_per_block: int,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> None:
    """Write the adapter to `path`.

    Args:
        metadata: the header's text entries (`pipeline.export.metadata`); must hold nothing that changes from run to run.
    """
    write_safetensors(path, kohya_tensors(adapter, names, layers_per_block, dtype), dict(metadata))


def kohya_tensors(
    adapter: Adapter, names: KohyaNames, layers_per_block: int = 2, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The file's tensors."""
    tensors: dict[str, Tensor] = {}
    common = _common_alpha(adapter)
    for name, layer in adapter.layers.items():
        start = kohya_name(name, names, layers_per_block)
        plain = _at_alpha(_with_stated_scale(layer), common)
        tensors |= {f"{start}.{part}": tensor.to(dtype) for part, tensor in plain.parts.items()}
        tensors[f"{start}.alpha"] = torch.tensor(plain.alpha, dtype=torch.float32)
    return tensors


def adapter_of_kohya(tensors: Mapping[str, Tensor], layers_per_block: int = 2) -> Adapter:
    """The adapter in a file's tensors, under diffusers' names.

    Raises:
        UserError: names of another kind of model, or half a layer.
    """
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        start, _, part = key.partition(".")
        if part == "alpha":
            alphas[start] = float(tensor)
        else:
            parts[start][part] = tensor
    return Adapter(
        {layer_name(start, layers_per_block): layer_of(found, alphas.get(start), start) for start, found in parts.items()}
    )


def _common_alpha(adapter: Adapter) -> float | None:
    """The α to state for all LoRA layers, where they have several: diffusers 0.42 reads α layer by layer from no such file, and
    would take the commonest for all. None where they agree, and where there are none."""
    alphas = [layer.alpha for layer in adapter.layers.values() if layer.kind in ("lora", "dora")]
    return Counter(alphas).most_common(1)[0][0] if len(set(alphas)) > 1 else None


def _at_alpha(layer: Layer, alpha: float | None) -> Layer:
    """The same ΔW with another α stated: the difference goes into B."""
    if alpha is None or alpha == layer.alpha or layer.kind not in ("lora", "dora"):
        return layer
    up = layer.parts["lora_up.weight"].float() * (layer.alpha / alpha)
    return Layer({**layer.parts, "lora_up.weight": up}, layer.rank, alpha)


def _with_stated_scale(layer: Layer) -> Layer:
    """Loaders ignore the α of a LoKr whose factors are both whole, for no rank is to be seen: there it goes into W1."""
    if {"lokr_w1", "lokr_w2"} <= layer.parts.keys() and layer.scale != 1:
        return Layer({**layer.parts, "lokr_w1": layer.parts["lokr_w1"].float() * layer.scale}, layer.rank, float(layer.rank))
    return layer
