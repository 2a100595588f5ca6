"""Pictures from fixed prompts and seeds, with and without the adapter."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.errors import UserError
from pipeline.files import hash_json
from pipeline.progress import Bar, say

_SCHEDULERS = {
    "ddim": ("diffusers.schedulers.scheduling_ddim", "DDIMScheduler"),
    "euler": ("diffusers.schedulers.scheduling_euler_discrete", "EulerDiscreteScheduler"),
    "dpm++": ("diffusers.schedulers.scheduling_dpmsolver_multistep", "DPMSolverMultistepScheduler"),
}


@dataclass(frozen=True)
class Sampler:
    """How a picture is drawn; part of each picture's metadata."""

    scheduler: str
    steps: int
    guidance_scale: float
    negative_prompt: str
    width: int
    height: int
    clip_skip: int = 0


@dataclass(frozen=True)
class Shot:
    """One picture to draw. `scale` weighs the adapter; 0 is the base alone."""

    prompt: str
    seed: int
    scale: float

    @property
    def file_name(self) -> str:
        words = "-".join("".join(c if c.isalnum() else " " for c in self.prompt).split())[:60]
        return f"{hash_json(self.prompt)[:6]}-{words}-seed{self.seed}-scale{self.scale:g}.png"


def use_scheduler(pipeline: Any, name: str, changes: Mapping[str, Any] | None = None) -> None:
    """Swap a diffusers pipeline's scheduler, keeping its noise schedule but for `changes`; `base` keeps its kind too."""
    from importlib import import_module

    if name == "base":
        kind = type(pipeline.scheduler)
    else:
        module, class_name = _SCHEDULERS[name]
        kind = getattr(import_module(module), class_name)
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **(changes or {}))


def scheduler_class(name: str) -> str | None:
    """diffusers' class of a scheduler; None for the base's own."""
    return None if name == "base" else _SCHEDULERS[name][1]


def sampling_changes(prediction: str, zero_terminal_snr: bool) -> dict[str, Any]:
    """What `model.prediction` and `model.zero_terminal_snr` mean to a diffusers scheduler.

    From zero SNR the last timestep must be sampled too: trailing spacing (Lin et al. 2024, arXiv 2305.08891, section 3.3).
    """
    changes: dict[str, Any] = {} if prediction == "auto" else {"prediction_type": prediction}
    if zero_terminal_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return changes


def draw_shots(
    pipeline: Any,
    shots: Sequence[Shot],
    sampler: Sampler,
    batch_size: int,
    folder: Path,
    check_stop: Callable[[], None],
    bar: Bar,
) -> None:
    """Draw the shots into `folder`, each with its parameters in the PNG's metadata. Batches that are there already are
    passed over; a batch always holds the same shots, so that a resumed run gives the same bytes.

    Args:
        pipeline: a diffusers pipeline with its scheduler set and the adapter's scale applied.
    """
    pipeline.set_progress_bar_config(disable=True)
    folder.mkdir(parents=True, exist_ok=True)
    for batch in _chunks(shots, batch_size):
        if not all((folder / shot.file_name).is_file() for shot in batch):
            check_stop()
            for shot, image in zip(batch, _draw(pipeline, batch, sampler), strict=True):
                path = folder / shot.file_name
                partial = path.with_suffix(".partial")
                image.save(partial, "PNG", pnginfo=_metadata(shot, sampler))
                partial.replace(path)
        bar.advance(len(batch))


def _draw(pipeline: Any, shots: Sequence[Shot], sampler: Sampler) -> list[Image.Image]:
    # the noise comes from the CPU: the same on every device
    generators = [torch.Generator("cpu").manual_seed(shot.seed) for shot in shots]
    guided = sampler.guidance_scale > 1
    with clip_skip_can_be(pipeline.text_encoder):
        latents: torch.Tensor = pipeline(
            prompt=[shot.prompt for shot in shots],
            negative_prompt=[sampler.negative_prompt] * len(shots) if guided else None,
            num_inference_steps=sampler.steps,
            guidance_scale=sampler.guidance_scale,
            width=sampler.width,
            height=sampler.height,
            clip_skip=sampler.clip_skip or None,
            generator=generators,
            output_type="latent",
        ).images
    if not torch.isfinite(latents).all():
        if any(shot.scale for shot in shots):
            say(f"  what the adapter draws is not finite: black pictures, as of {shots[0].prompt[:60]!r}")
        else:
            raise UserError(
                f"the base draws nothing finite in {str(latents.dtype).removeprefix('torch.')}: set validate.dtype to bfloat16 or float32, or look whether the base's files are whole"
            )
    return decode_latents(pipeline, latents)


@contextmanager
def clip_skip_can_be(encoder: Any) -> Iterator[None]:
    """Give the encoder, inside the block, the name `text_model` for itself, which diffusers 0.42 looks for under clip_skip and
    transformers 5 dropped. Not for longer: diffusers' adapter loader goes by its absence."""
    if hasattr(encoder, "text_model"):
        yield
        return
    object.__setattr__(encoder, "text_model", encoder)  # past torch's registration, or the module would contain itself
    try:
        yield
    finally:
        object.__delattr__(encoder, "text_model")


def _metadata(shot: Shot, sampler: Sampler) -> PngInfo:
    info = PngInfo()
    info.add_itxt("parameters", json.dumps({**asdict(shot), **asdict(sampler)}, ensure_ascii=False, sort_keys=True))
    return info


def _chunks(shots: Sequence[Shot], size: int) -> Iterator[Sequence[Shot]]:
    for i in range(0, len(shots), size):
        yield shots[i : i + size]


@torch.inference_mode()
def decode_latents(pipeline: Any, latents: torch.Tensor) -> list[Image.Image]:
    """Normalised latents (N, C, h, w) -> pictures, through the pipeline's own VAE."""
    config = pipeline.vae.config
    pictures: list[Image.Image] = []
    for i in range(len(latents)):
        latent = latents[i : i + 1].to(pipeline.device, pipeline.vae.dtype)
        decoded = pipeline.vae.decode(latent / config.scaling_factor + (config.shift_factor or 0.0)).sample
        decoded = torch.nan_to_num(decoded, nan=-1.0)  # black
        pictures += pipeline.image_processor.postprocess(decoded, output_type="pil")
    return pictures
