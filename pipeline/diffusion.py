"""The diffusion objective: timesteps, noising, target, weight. torch only; nothing here knows a model.

Notation of Ho et al. 2020 (DDPM, arXiv 2006.11239): x_0 the clean latent, ε the noise, ᾱ_t the cumulative product of
1 − β_t, x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε (eq. 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor


class Objective(Protocol):
    """What a loop needs of a training objective."""

    def timesteps(self, u: Tensor) -> Tensor:
        """Uniform draws u in [0, 1), (B,) -> timesteps as the denoiser takes them, (B,)."""

    def noised(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, (B, C, h, w), from x_0 and noise of the same shape and t of shape (B,)."""

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the denoiser should predict, (B, C, h, w)."""


@dataclass(frozen=True)
class Ddpm:
    """Discrete-time diffusion with the noise schedule of the base's scheduler."""

    alphas_cumprod: Tensor  # ᾱ, (T,), float32 on the CPU
    prediction: Literal["epsilon", "v_prediction"]

    def timesteps(self, u: Tensor) -> Tensor:
        """t uniform on {0, …, T − 1}, int64."""
        steps = len(self.alphas_cumprod)
        return (u * steps).long().clamp(max=steps - 1)

    def noised(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε; Ho et al. 2020, eq. 4."""
        signal, sigma = self._coefficients(x_0, t)
        return signal * x_0 + sigma * noise

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """ε, or v = √ᾱ_t ε − √(1 − ᾱ_t) x_0; Salimans & Ho 2022 (arXiv 2202.00512), section 4."""
        if self.prediction == "epsilon":
            return noise
        signal, sigma = self._coefficients(x_0, t)
        return signal * noise - sigma * x_0

    def _coefficients(self, like: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1 − ᾱ_t), each (B, 1, 1, 1)."""
        alpha = self.alphas_cumprod.to(like.device)[t].to(like.dtype).reshape(-1, 1, 1, 1)
        return alpha.sqrt(), (1 - alpha).sqrt()


def mse_per_sample(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, in float32: (B, C, h, w) twice -> (B,)."""
    return (predicted.float() - target.float()).square().mean(dim=(1, 2, 3))


def stratified(count: int, device: torch.device | None = None) -> Tensor:
    """Midpoints of `count` equal parts of [0, 1): timesteps for a loss that is measured, not trained on. (count,)"""
    return (torch.arange(count, dtype=torch.float64, device=device) + 0.5) / count
