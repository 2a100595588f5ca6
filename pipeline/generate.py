"""Drawing with an exported adapter, outside the pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from pipeline.base_model import base_source
from pipeline.config import load_params
from pipeline.device import pick_device
from pipeline.errors import UserError
from pipeline.evaluate.sampling import Sampler, Shot, draw_shots, sampling_changes, use_scheduler
from pipeline.export.adapter_file import load_into, read_metadata
from pipeline.export.diffusers_format import FILE_NAME
from pipeline.families import family
from pipeline.model_source import resolve
from pipeline.progress import progress
from pipeline.workspace import DIST, Workspace


def generate(
    workspace: Workspace, prompt: str, adapter: Path | None, scale: float, seed: int, count: int, out: Path
) -> Iterator[Path]:
    """Draw `count` pictures into `out`, seeds counting up from `seed`; yields their paths.

    Args:
        adapter: an adapter file in any format; None for the exported one; the name `none` for the base alone.

    Raises:
        UserError: the adapter is missing or no safetensors file.
    """
    params = load_params(workspace.params)
    bare = adapter is not None and str(adapter) == "none"
    exported = [workspace.root / DIST / name for name in (FILE_NAME, f"{params.export.name}.safetensors")]
    path = adapter or next((p for p in exported if p.is_file()), exported[0])
    if not bare and not path.is_file():
        hint = "give its path, or `none` for the base alone" if adapter else "run the pipeline first, or give --adapter"
        raise UserError(f"no adapter at {path}: {hint}")
    if not bare:
        read_metadata(path)  # a pickle is refused before the base is loaded
    model, settings = params.model, params.validate_
    device = pick_device(params.runtime.device)
    kind, base = family(model.family), resolve(base_source(model), workspace.root)
    pipeline = kind.load_pipeline(base, device, getattr(torch, settings.dtype))
    use_scheduler(pipeline, settings.scheduler, sampling_changes(model.prediction, model.zero_terminal_snr))
    if not bare:
        load_into(pipeline, path, scale, kind.base_version(base).layers_per_block)
    side = params.dataset.resolution
    sampler = Sampler(
        settings.scheduler,
        settings.inference_steps,
        settings.guidance_scale,
        settings.negative_prompt,
        side,
        side,
        params.encode.clip_skip,
    )
    with progress("drawing", count, "pictures") as bar:
        shots = [Shot(prompt, seed + i, 0.0 if bare else scale) for i in range(count)]
        for shot in shots:
            (out / shot.file_name).unlink(missing_ok=True)
            draw_shots(pipeline, [shot], sampler, 1, out, lambda: None, bar)
            yield out / shot.file_name
