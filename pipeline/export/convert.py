"""One adapter file out of others: another format, another dtype, another rank, several in one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from pipeline.errors import UserError
from pipeline.export.adapter import Adapter, combined, resized
from pipeline.export.adapter_file import AdapterFile, read_adapter
from pipeline.export.diffusers_format import write_diffusers
from pipeline.export.kohya_format import kohya_tensors
from pipeline.export.metadata import tensor_hash
from pipeline.families import family
from pipeline.families.base import KohyaNames
from pipeline.safetensors_file import write_safetensors

Target = Literal["diffusers", "kohya"]
_FORMAT_OWN = {"format", "lora_adapter_metadata", "reprolora_alpha"}
_OF_TENSORS = {"sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"}


def convert(
    source: Path, target: Path, to: Target, dtype: str | None = None, rank: int | None = None, family_name: str | None = None
) -> None:
    """Write the adapter of `source` to `target`. Metadata goes along; α stays what it was.

    Args:
        dtype: of the factors; None: as they are.
        rank: resize to at most this, by singular values.
        family_name: sd or sdxl; None: told from the file.

    Raises:
        UserError: the file cannot be read, or the format cannot hold it.
    """
    file = read_adapter(source)
    adapter = file.adapter if rank is None else resized(file.adapter, rank)
    metadata = dict(file.metadata)
    if rank is not None and "ss_network_dim" in metadata:
        metadata["ss_network_dim"] = str(rank)
        metadata["ss_network_alpha"] = f"{max(layer.alpha for layer in adapter.layers.values()):g}"
    _write(adapter, target, to, dtype or _dtype(file), metadata, family_name)


def combine(
    parts: Sequence[tuple[Path, float]],
    target: Path,
    to: Target,
    dtype: str | None,
    rank: int | None,
    family_name: str | None = None,
) -> None:
    """Write the weighted sum of several adapters as one; its header tells of what it is made."""
    files = [(read_adapter(path), weight) for path, weight in parts]
    adapter = combined([(file.adapter, weight) for file, weight in files], rank)
    merged_from = ", ".join(f"{path.name} × {weight:g}" for path, weight in parts)
    kept: dict[str, str] = {
        key: files[0][0].metadata[key]
        for key in ("ss_base_model_version", "ss_v2", "ss_sd_model_name", "modelspec.architecture")
        if len({file.metadata.get(key) for file, _ in files}) == 1 and key in files[0][0].metadata
    }
    _write(adapter, target, to, dtype or _dtype(files[0][0]), {**kept, "modelspec.merged_from": merged_from}, family_name)


def parse_weighted(text: str) -> tuple[Path, float]:
    """`FILE:0.5` -> (FILE, 0.5); without a weight, 1."""
    name, colon, weight = text.rpartition(":")
    if not colon or weight.endswith(".safetensors"):
        return Path(text), 1.0
    try:
        return Path(name), float(weight)
    except ValueError:
        raise UserError(f"{text}: expected FILE:WEIGHT with a number, as in style.safetensors:0.5") from None


def names_for(adapter: Adapter, family_name: str | None = None) -> KohyaNames:
    """The naming of the family that the adapter's layers tell.

    Raises:
        UserError: they do not tell.
    """
    if family_name is None and "transformer" in adapter.components:
        family_name = "sd3"
    if family_name is None:
        widths = {
            layer.parts["lora_down.weight"].shape[1]
            for name, layer in adapter.layers.items()
            if name.endswith("attn2.to_k") and "lora_down.weight" in layer.parts
        }
        if "text_encoder_2" in adapter.components or 2048 in widths:
            family_name = "sdxl"
        elif widths & {768, 1024}:
            family_name = "sd"
        else:
            raise UserError("the file does not tell for which family of models it is: give --family sd or --family sdxl")
    names = family(family_name).kohya
    if names is None:
        raise UserError(f"adapters of family {family_name} are not written in the kohya format: its layers are others there")
    return names


def _write(adapter: Adapter, target: Path, to: Target, dtype: str, metadata: dict[str, str], family_name: str | None) -> None:
    if target.suffix != ".safetensors":
        raise UserError(f"{target}: the name of an adapter file ends in .safetensors")
    kept = {key: value for key, value in metadata.items() if key not in _FORMAT_OWN | _OF_TENSORS}
    kind = getattr(torch, dtype)
    if to == "diffusers":
        write_diffusers(target, adapter, kind, kept)
    else:
        stated = metadata.get("ss_base_model_version", "")
        guessed = family_name or next((name for name in ("sdxl", "sd3", "sd") if stated.startswith(name)), None)
        tensors = kohya_tensors(adapter, names_for(adapter, guessed), dtype=kind)
        write_safetensors(target, tensors, {"format": "pt", **kept, "sshs_model_hash": tensor_hash(tensors)})


def _dtype(file: AdapterFile) -> str:
    layer = next(iter(file.adapter.layers.values()))
    return str(next(iter(layer.parts.values())).dtype).removeprefix("torch.")
