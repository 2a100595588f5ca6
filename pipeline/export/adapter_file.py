"""Any adapter file, ours or foreign: told apart by its names, read, and put into a pipeline. Pickles are refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from pipeline.errors import UserError
from pipeline.export.adapter import Adapter
from pipeline.export.diffusers_format import adapter_of_diffusers, diffusers_tensors
from pipeline.export.kohya_format import adapter_of_kohya
from pipeline.export.peft_format import adapter_of_peft, attach
from pipeline.safetensors_file import read_safetensors

Format = Literal["diffusers", "kohya", "peft"]
_NAME = "reprolora"


@dataclass(frozen=True)
class AdapterFile:
    """What a file holds."""

    format: Format
    adapter: Adapter
    metadata: dict[str, str]


def read_adapter(path: Path, layers_per_block: int = 2) -> AdapterFile:
    """Read an adapter.

    Args:
        layers_per_block: of the base's UNet, for SDXL files; 2 in all released ones.

    Raises:
        UserError: no such file, a pickle, damaged, or no adapter that is known here.
    """
    metadata = read_metadata(path)
    tensors = read_safetensors(path)
    kind = format_of(list(tensors), path)
    try:
        if kind == "kohya":
            adapter = adapter_of_kohya(tensors, layers_per_block)
        elif kind == "diffusers":
            adapter = adapter_of_diffusers(tensors, metadata)
        else:
            adapter = adapter_of_peft({f"unet.{key.removeprefix('base_model.model.')}": t for key, t in tensors.items()}, {})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:  # names and headers are anybody's
        raise UserError(f"{path}: no adapter that can be understood: {error}") from error
    return AdapterFile(kind, adapter, metadata)


def read_metadata(path: Path) -> dict[str, str]:
    """The text entries of a safetensors header; empty where there are none."""
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: only .safetensors files are loaded; a pickle can run code")
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}") from None


def format_of(keys: list[str], where: object) -> Format:
    """Which of the formats a file's names are in."""
    if any(key.startswith(("lora_unet_", "lora_te")) for key in keys):
        return "kohya"
    if any(key.startswith(("unet.", "transformer.", "text_encoder.", "text_encoder_2.")) for key in keys):
        return "diffusers"
    if any(".lora_A." in key or ".hada_w1_a" in key or ".lokr_w1" in key for key in keys):
        return "peft"
    shown = ", ".join(sorted(keys)[:3]) or "nothing"
    raise UserError(f"{where}: no adapter for Stable Diffusion in a format that is known here: it holds {shown} …")


def load_into(pipeline: Any, path: Path, scale: float = 1.0, layers_per_block: int = 2, name: str = _NAME) -> str:
    """Load an adapter file into a diffusers pipeline and weigh it.

    Returns:
        By whom it was loaded: diffusers' own loader wherever that can; it drops a Kohya file's DoRA scales, and knows no LoHa or
        LoKr, which go in through PEFT.
    """
    file = read_adapter(path, layers_per_block)
    kinds = set(file.adapter.kinds)
    if kinds & {"loha", "lokr"}:
        if kinds & {"lora", "dora"}:
            raise UserError(f"{path}: layers of several kinds ({', '.join(sorted(kinds))}) in one file cannot be loaded")
        for component in file.adapter.components:
            attach(getattr(pipeline, component), file.adapter.of(component), name, scale)
        return "PEFT"
    if "dora" in kinds and file.format == "kohya":
        # PEFT's config is made from the names alone here, with α = rank: what the tensors are scaled to
        pipeline.load_lora_weights(diffusers_tensors(file.adapter), adapter_name=name)
        pipeline.set_adapters(name, scale)
        return "diffusers, the DoRA scales renamed"
    pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name, local_files_only=True)
    pipeline.set_adapters(name, scale)
    return "diffusers"
