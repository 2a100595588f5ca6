"""What the noise may be besides white: shifted as a whole, rough on several scales, perturbed at the input.

Draws are functions of (seed, step, position), as all of training's: see `randomness.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pipeline.randomness import Purpose, draw


@dataclass(frozen=True)
class NoiseShape:
    """How the noise departs from white; zeros leave it alone."""

    offset: float = 0.0
    pyramid: float = 0.0
    perturbation: float = 0.0

    def noise(self, white: Tensor, seed: int, step: int, start: int) -> Tensor:
        """ε of positions [start, start + B) of a step, from white noise (B, C, h, w)."""
        noise = white
        if self.pyramid:
            noise = pyramid(white, _levels(white, seed, step, start), self.pyramid)
        if self.offset:
            noise = offset(
                noise, _normal(seed, Purpose.NOISE_OFFSET, step, start, (len(white), white.shape[1], 1, 1)), self.offset
            )
        return noise

    def input_noise(self, noise: Tensor, seed: int, step: int, start: int) -> Tensor:
        """The noise that the denoiser's input is made with, while ε stays the target: ε + γ ξ, ξ white.

        Ning et al. 2023, "Input Perturbation Reduces Exposure Bias" (arXiv 2301.11706), algorithm 1, line 5.
        """
        if not self.perturbation:
            return noise
        return noise + self.perturbation * _normal(seed, Purpose.PERTURBATION, step, start, tuple(noise.shape))


def offset(noise: Tensor, shifts: Tensor, strength: float) -> Tensor:
    """ε (B, C, h, w) with each channel moved as a whole: ε + strength · shifts (B, C, 1, 1).

    Guttenberg 2023, "Diffusion with Offset Noise": so very dark and very bright pictures can be learned.
    """
    return noise + strength * shifts


def pyramid(noise: Tensor, levels: list[Tensor], discount: float) -> Tensor:
    """Multi-resolution noise: ε + Σ_i discount^i · (level i, scaled up), brought back to a sample's standard deviation of 1.

    Whitaker 2023, "Multi-Resolution Noise for Diffusion Model Training"; level i (B, C, h / 2^i, w / 2^i), i from 1. The
    standard deviation is each sample's own, so that a sample does not depend on its batch.
    """
    total = noise
    for i, level in enumerate(levels, 1):
        total = total + discount**i * interpolate(level, size=noise.shape[-2:], mode="bilinear")
    return total / total.std(dim=(1, 2, 3), keepdim=True)


def _levels(like: Tensor, seed: int, step: int, start: int) -> list[Tensor]:
    """White noise at half the size, a quarter, … down to one cell on the shorter side."""
    count, channels, height, width = like.shape
    generators = [draw(seed, Purpose.PYRAMID_NOISE, step, start + i) for i in range(count)]
    levels = []
    while min(height, width) > 1:
        height, width = max(1, height // 2), max(1, width // 2)
        rows = [g.standard_normal((channels, height, width), dtype=np.float32) for g in generators]
        levels.append(torch.from_numpy(np.stack(rows)))
    return levels


def _normal(seed: int, purpose: Purpose, step: int, start: int, shape: tuple[int, ...]) -> Tensor:
    rows = [draw(seed, purpose, step, start + i).standard_normal(shape[1:], dtype=np.float32) for i in range(shape[0])]
    return torch.from_numpy(np.stack(rows))
