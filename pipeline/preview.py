"""Pictures of an adapter in the making, to look at while it trains. No result depends on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from pipeline.config import Params
from pipeline.encodings import Encodings
from pipeline.evaluate.sampling import Sampler, Shot, draw_shots, sampling_changes, use_scheduler
from pipeline.families.base import Family
from pipeline.model_source import LocalModel
from pipeline.pictures import labelled_grid
from pipeline.progress import progress, say
from pipeline.workspace import PREVIEWS

_MOST = 6  # pictures a grid


@dataclass(frozen=True)
class Previews:
    """Draws validate's first prompts. VAE and text encoders are loaded for each grid and let go after it."""

    params: Params
    family: Family
    model: LocalModel
    encodings: Encodings
    work: Path
    device: torch.device

    def draw(self, step: int, denoiser: nn.Module, text: Mapping[str, nn.Module]) -> None:
        """Draw with the denoiser, and the text encoders that learn too, as they are now."""
        settings, index = self.params.validate_, self.encodings.index
        pipeline = self.family.load_pipeline(self.model, self.device, next(denoiser.parameters()).dtype, denoiser)
        for component, module in text.items():
            setattr(pipeline, component, module)
        changes = sampling_changes(self.params.model.prediction, self.params.model.zero_terminal_snr)
        use_scheduler(pipeline, settings.scheduler, changes)
        width, height = Counter(s.size for s in index.samples).most_common(1)[0][0]
        sampler = Sampler(
            settings.scheduler,
            settings.inference_steps,
            settings.guidance_scale,
            settings.negative_prompt,
            width,
            height,
            index.clip_skip,
        )
        shots = [Shot(prompt, settings.seeds[0], 1.0) for prompt in settings.prompts[:_MOST]]
        folder = self.work / PREVIEWS / f"step-{step:08d}"
        with progress("", 0, "") as silent:
            draw_shots(pipeline, shots, sampler, settings.batch_size, folder, lambda: None, silent)
        row = [Image.open(folder / shot.file_name).convert("RGB") for shot in shots]
        grid = self.work / PREVIEWS / f"step-{step:08d}.png"
        labelled_grid([row], captions=[[shot.prompt for shot in shots]]).save(grid)
        say(f"  step {step}: {grid}")
