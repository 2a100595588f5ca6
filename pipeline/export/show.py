"""The facts of any adapter file, ours or foreign."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from pipeline.export.adapter import Adapter
from pipeline.export.adapter_file import read_adapter
from pipeline.files import hash_file

_BY_CROSS_WIDTH = {768: "sd (Stable Diffusion 1.x)", 1024: "sd (Stable Diffusion 2.x)", 2048: "sdxl"}
_LONG = 300  # characters of a metadata value that are shown


def facts(path: Path) -> dict[str, Any]:
    """What a file tells, for a person or a program.

    Raises:
        UserError: no such file, a pickle, damaged, or no adapter that is known here.
    """
    file = read_adapter(path)
    adapter, metadata = file.adapter, file.metadata
    tensors = [tensor for layer in adapter.layers.values() for tensor in layer.parts.values()]
    ours = _json(metadata.get("reprolora"))
    return {
        "file": path.name,
        "sha256": hash_file(path),
        "format": file.format,
        "family": _family(adapter, metadata),
        "kind": ", ".join(adapter.kinds),
        "layers": {component: len(adapter.of(component)) for component in adapter.components},
        "rank": _range([layer.rank for layer in adapter.layers.values()]),
        "alpha": _range([layer.alpha for layer in adapter.layers.values()]),
        "dtype": ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})),
        "parameters": sum(tensor.numel() for tensor in tensors),
        "trigger": ours.get("trigger") or metadata.get("modelspec.trigger_phrase") or None,
        "lineage": ours.get("lineage"),
        "metadata": {key: value for key, value in sorted(metadata.items()) if key != "reprolora"},
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The facts as lines for the screen. Text from the file is made printable and cut."""
    shown = []
    for key, value in found.items():
        if value is None:
            continue
        if key == "layers":
            value = ", ".join(f"{count} in {component}" for component, count in value.items())
        if key == "parameters":
            value = f"{value:,}"
        if isinstance(value, dict):
            shown.append(f"{key}" if value else f"{key:<12}none")
            shown += [f"  {name}: {_printable(item)}" for name, item in value.items()]
        else:
            shown.append(f"{key:<12}{_printable(value)}")
    return shown


def _family(adapter: Adapter, metadata: dict[str, str]) -> str:
    """A guess: what the header says, else the width of the text that the denoiser takes, which differs between the families."""
    stated = metadata.get("ss_base_model_version", "") or metadata.get("modelspec.architecture", "")
    if stated:
        marks = {"sdxl": ("xl",), "sd3": ("sd3", "diffusion-3"), "sd": ("sd_v", "sd_v1", "diffusion-v1", "diffusion-v2")}
        known = next((family for family, parts in marks.items() if any(part in stated for part in parts)), "unknown")
        return f"{known} (the header says {stated})"
    for name, layer in adapter.layers.items():
        if name.endswith("attn2.to_k") and "lora_down.weight" in layer.parts:
            width = layer.parts["lora_down.weight"].shape[1]
            return _BY_CROSS_WIDTH.get(width, f"unknown: its cross-attention takes text of width {width}")
    if "text_encoder_2" in adapter.components:
        return "sdxl"
    return "unknown"


def _range(values: list[float]) -> str:
    counted = Counter(values)
    if len(counted) == 1:
        return f"{values[0]:g}"
    return ", ".join(f"{value:g} in {count} layers" for value, count in sorted(counted.items()))


def _json(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _printable(value: object) -> str:
    text = "".join(c if c.isprintable() else " " for c in str(value))
    return text if len(text) <= _LONG else f"{text[:_LONG]}… ({len(text)} characters)"
