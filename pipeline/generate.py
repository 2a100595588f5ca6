"""Drawing with an exported adapter, outside the pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from pipeline.config import load_params
from pipeline.device import pick_device
from pipeline.errors import UserError
from pipeline.evaluate.sampling import Sampler, Shot, draw_shots, use_scheduler
from pipeline.export.diffusers_format import FILE_NAME, load_into
from pipeline.families import family
from pipeline.model_source import ModelSource, resolve
from pipeline.progress import progress
from pipeline.workspace import DIST, Workspace


def generate(
    workspace: Workspace, prompt: str, adapter: Path | None, scale: float, seed: int, count: int, out: Path
) -> Iterator[Path]:
    """Draw `count` pictures into `out`, seeds counting up from `seed`; yields their paths.

    Args:
        adapter: a diffusers adapter file; None for the exported one; the name `none` for the base alone.

    Raises:
        UserError: the adapter is missing or no safetensors file.
    """
    params = load_params(workspace.params)
    bare = adapter is not None and str(adapter) == "none"
    path = adapter or workspace.root / DIST / FILE_NAME
    if not bare and not path.is_file():
        hint = "give its path, or `none` for the base alone" if adapter else "run the pipeline first, or give --adapter"
        raise UserError(f"no adapter at {path}: {hint}")
    if not bare and path.suffix != ".safetensors":
        raise UserError(f"{path}: only .safetensors files are loaded; a pickle can run code")
    model, settings = params.model, params.validate_
    device = pick_device(params.runtime.device)
    pipeline = family(model.family).load_pipeline(
        resolve(ModelSource(model.base, model.revision, model.variant), workspace.root), device, torch.float32
    )
    use_scheduler(pipeline, settings.scheduler)
    if not bare:
        load_into(pipeline, path, scale)
    side = params.dataset.resolution
    sampler = Sampler(
        settings.scheduler, settings.inference_steps, settings.guidance_scale, settings.negative_prompt, side, side
    )
    with progress("drawing", count, "pictures") as bar:
        shots = [Shot(prompt, seed + i, 0.0 if bare else scale) for i in range(count)]
        for shot in shots:
            (out / shot.file_name).unlink(missing_ok=True)
            draw_shots(pipeline, [shot], sampler, 1, out, lambda: None, bar)
            yield out / shot.file_name
