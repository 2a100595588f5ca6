"""What a run will take, told by `check` before anything runs, and how each figure was come by."""

from __future__ import annotations

import json
import math
from pathlib import Path

from pipeline.config import Params
from pipeline.model_source import pixels_per_cell
from pipeline.workspace import Workspace

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# What a step takes beside the frozen weights, by family: weights of the network that was measured, then MiB a megapixel of the pictures
# in a forward pass, without and with gradient checkpointing, in half precision. Measured by bench/memory.py.
_STEP = {"sd": (860e6, 4400, 1100), "sdxl": (2567e6, 7300, 830)}
_FROZEN = {"bf16": 2.0, "fp16": 2.0, "no": 4.0}  # bytes of a weight of the frozen base in training
_QUANTISED = {"int8": 1.0, "nf4": 0.5}  # the same of a linear layer's


def steps_line(params: Params, pictures: int) -> str:
    """`450 steps of 8: each of 43 pictures some 84 times`. Repeats are not counted: captions are not read yet."""
    steps, learnt = _length(params, pictures)
    shown = steps * params.train.batch_size / learnt
    return (
        f"{steps:,} steps of {params.train.batch_size}: each of some {learnt} pictures to train on is shown {shown:.0f} times"
    )


def time_line(workspace: Workspace, params: Params, pictures: int) -> str:
    """By the pace of the last training here, scaled by pictures and their area."""
    if not workspace.pace.is_file():
        return "not known before a first training here; the bar tells after its first steps"
    told = json.loads(workspace.pace.read_text(encoding="utf-8"))
    area = (params.dataset.resolution / told["resolution"]) ** 2
    seconds = told["seconds_per_picture"] * _length(params, pictures)[0] * params.train.batch_size * area
    span = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
    return f"some {span} of training, by {told['seconds_per_picture']:.3g} s a picture in the last one here" + (
        ", scaled by the pictures' area" if area != 1 else ""
    )


def memory_line(params: Params, denoiser: Path) -> str:
    """What training takes on a GPU: the frozen denoiser's weights, counted from the headers of its files, and what a forward pass
    leaves on the way to the gradient, by measurement. The adapter, small beside these, and CUDA's own half a gigabyte come on top."""
    count, linear = weights_in(denoiser)
    if not count:
        return "not known: the base is not one folder of safetensors"
    train, runtime = params.train, params.runtime
    each_weight = _FROZEN[train.mixed_precision]
    weights = (linear * _QUANTISED.get(train.quantise_base or "", each_weight) + (count - linear) * each_weight) / 2**30
    rest = "float32" if train.mixed_precision == "no" else train.mixed_precision
    how = f"{rest}, the linear ones in {train.quantise_base}" if train.quantise_base else rest
    told = f"{_size(weights)} for the denoiser's {count / 1e6:,.0f} million weights in {how}"
    if params.model.family not in _STEP:
        return f"{told}; what a step needs comes on top"
    measured, plain, checkpointed = _STEP[params.model.family]
    share = math.ceil(train.batch_size / (runtime.processes * runtime.machines))
    pictures = min(runtime.micro_batch or share, share)
    megapixels = pictures * params.dataset.resolution**2 / 1e6
    # a smaller network of the kind is narrower; in float32 all is twice as wide
    each = math.sqrt(count / measured) * megapixels * (2 if train.mixed_precision == "no" else 1) / 1024
    step = each * (checkpointed if runtime.gradient_checkpointing else plain)
    less = "" if runtime.gradient_checkpointing else f", or {_size(each * checkpointed)} with runtime.gradient_checkpointing"
    many = f"{pictures} picture{'s' * (pictures > 1)} at once"
    beside = "; previews come on top" if runtime.sample_every else ""
    if params.lora.text_encoder:
        beside = "; the text encoders that learn come on top" + ("; so do previews" if runtime.sample_every else "")
    return f"about {_size(weights + step)} to train in on a GPU: {told}, {_size(step)} for {many}{less}{beside}"


def disk_line(params: Params, vae_config: Path, pictures: int) -> str:
    """Latents (mean and deviation) of all pictures, from the VAE's own geometry; captions come on top."""
    if not vae_config.is_file():
        return "not known: the base has no vae/config.json"
    vae = json.loads(vae_config.read_text(encoding="utf-8"))
    side = params.dataset.resolution / pixels_per_cell(vae)
    each = 2 * vae["latent_channels"] * side**2 * _BYTES[params.encode.dtype] * (2 if params.encode.flip else 1)
    total = each * pictures / 2**20
    return (
        f"{total:,.1f} MiB of latents for {pictures} pictures, twice: in .work/store and in DVC's cache; captions come on top"
    )


def _length(params: Params, pictures: int) -> tuple[int, int]:
    """Steps, and pictures that are not held out."""
    learnt = max(1, round(pictures * (1 - params.dataset.held_out_fraction)))
    return params.train.steps or (params.train.epochs or 0) * math.ceil(learnt / params.train.batch_size), learnt


def _size(gib: float) -> str:
    return f"{gib:.1f} GiB" if gib >= 0.95 else f"{gib * 1024:.0f} MiB"


def weights_in(folder: Path) -> tuple[int, int]:
    """Numbers in the tensors of a folder's files, all of them and those of linear layers, by each file's header alone; a tensor of
    several variants counts once."""
    found: dict[str, tuple[int, bool]] = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                found[name] = math.prod(entry["shape"]), len(entry["shape"]) == 2 and name.endswith(".weight")
    return sum(count for count, _ in found.values()), sum(count for count, linear in found.values() if linear)
