"""The objectives: timesteps, noising, target, signal-to-noise ratio. torch only; nothing here knows a model.

Notation of Ho et al. 2020 (DDPM, arXiv 2006.11239): x_0 the clean latent, ε the noise, ᾱ_t the cumulative product of
1 − β_t, x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε (eq. 4).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from pipeline.errors import UserError

Prediction = Literal["epsilon", "v_prediction", "flow"]


class Objective(Protocol):
    """What a loop needs of a training objective."""

    @property
    def prediction(self) -> Prediction:
        """What the denoiser predicts."""

    def timesteps(self, u: Tensor) -> Tensor:
        """u in [0, 1), (B,), 1 the most noise -> timesteps as the denoiser takes them, (B,)."""

    def noised(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, (B, C, h, w), from x_0 and noise of the same shape and t of shape (B,)."""

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the denoiser should predict, (B, C, h, w)."""

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio of x_t: the square of signal's over noise's coefficient, (B,), float32."""

    def progress(self, t: Tensor) -> Tensor:
        """t as a share of the schedule's length, (B,), float32: 0 clean, 1 noise."""


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

    def snr(self, t: Tensor) -> Tensor:
        """ᾱ_t / (1 − ᾱ_t); Kingma et al. 2021 (arXiv 2107.00630), eq. 2."""
        alpha = self.alphas_cumprod.to(t.device)[t]
        return alpha / (1 - alpha)

    def progress(self, t: Tensor) -> Tensor:
        """t / T."""
        return t.float() / len(self.alphas_cumprod)

    def _coefficients(self, like: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1 − ᾱ_t), each (B, 1, 1, 1)."""
        alpha = self.alphas_cumprod.to(like.device)[t].to(like.dtype).reshape(-1, 1, 1, 1)
        return alpha.sqrt(), (1 - alpha).sqrt()


@dataclass(frozen=True)
class Flow:
    """Rectified flow: straight paths from data to noise; Esser et al. 2024 (SD3, arXiv 2403.03206), section 2 and eq. 13."""

    shift: float = 1.0  # above 1 spends more of the schedule on noise, which large pictures need
    steps: int = 1000  # the denoiser is told σ as σ · steps
    prediction: Literal["flow"] = "flow"

    def timesteps(self, u: Tensor) -> Tensor:
        """t = 1000 σ, float32, with σ = s u / (1 + (s − 1) u); eq. 23 with s = √(m / n)."""
        sigma = self.shift * u / (1 + (self.shift - 1) * u)
        return (sigma * self.steps).float()

    def noised(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = (1 − σ) x_0 + σ ε; eq. 13."""
        sigma = self._sigma(x_0, t)
        return (1 - sigma) * x_0 + sigma * noise

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The velocity dx_t / dσ = ε − x_0."""
        return noise - x_0

    def snr(self, t: Tensor) -> Tensor:
        """((1 − σ) / σ)²."""
        sigma = (t.float() / self.steps).clamp(min=1e-6)  # at 0 the ratio would be infinite
        return ((1 - sigma) / sigma).square()

    def progress(self, t: Tensor) -> Tensor:
        """σ."""
        return t.float() / self.steps

    def _sigma(self, like: Tensor, t: Tensor) -> Tensor:
        return (t.to(like.dtype) / self.steps).reshape(-1, 1, 1, 1)


def on_device(objective: Objective, device: torch.device) -> Objective:
    """The same objective with its table on the device, so that looking something up waits for no copy."""
    return replace(objective, alphas_cumprod=objective.alphas_cumprod.to(device)) if isinstance(objective, Ddpm) else objective


def overridden(objective: Objective, prediction: str, zero_terminal_snr: bool) -> Objective:
    """The base's objective with what `model.prediction` (`auto` keeps the base's) and `model.zero_terminal_snr` change.

    Raises:
        UserError: the objective is a flow, or ε is to be predicted at zero SNR, where x_T tells nothing of x_0.
    """
    if prediction == "auto" and not zero_terminal_snr:
        return objective
    if not isinstance(objective, Ddpm):
        raise UserError(
            f"model.prediction: {prediction}, model.zero_terminal_snr: {str(zero_terminal_snr).lower()}: this base is trained by flow "
            "matching and has neither: set them to auto and false"
        )
    if prediction != "auto":
        assert prediction in ("epsilon", "v_prediction"), prediction
        objective = replace(objective, prediction=prediction)  # type: ignore[arg-type]
    if zero_terminal_snr:
        if objective.prediction == "epsilon":
            raise UserError(
                "model.zero_terminal_snr: true with ε-prediction: at zero SNR x_t is the noise itself and nothing is to be "
                "learned: set model.prediction to v_prediction, or zero_terminal_snr to false"
            )
        objective = replace(objective, alphas_cumprod=rescale_zero_terminal_snr(objective.alphas_cumprod))
    return objective


def rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """ᾱ (T,) shifted and scaled in √ᾱ so that ᾱ_T = 0 and ᾱ_1 stays; Lin et al. 2024 (arXiv 2305.08891), algorithm 1."""
    root = alphas_cumprod.double().sqrt()
    first, last = root[0], root[-1]
    rescaled = (root - last) * first / (first - last)
    return rescaled.square().to(alphas_cumprod.dtype)


def logit_normal(u: Tensor, mean: float, std: float) -> Tensor:
    """Uniform u (B,) -> logit-normal on (0, 1), by the inverse of its distribution: sigmoid(m + s Φ⁻¹(u)).

    Esser et al. 2024 (arXiv 2403.03206), eq. 19. A mean above 0 prefers noise.
    """
    # the ends of [0, 1) would become exactly 0 and 1
    inside = u.double().clamp(2.0**-40, 1 - 2.0**-40)
    return torch.sigmoid(mean + std * torch.special.ndtri(inside)).to(u.dtype)


def power(u: Tensor, k: float) -> Tensor:
    """Uniform u (B,) -> density (1/k) u^(1/k − 1): u^k. k below 1 prefers noise, above 1 detail."""
    return u**k


def within(u: Tensor, low: float, high: float) -> Tensor:
    """Uniform u (B,) -> uniform on [low, high): a part of the schedule."""
    return low + (high - low) * u


def stratified(count: int, device: torch.device | None = None) -> Tensor:
    """Midpoints of `count` equal parts of [0, 1): timesteps for a loss that is measured, not trained on. (count,)"""
    return (torch.arange(count, dtype=torch.float64, device=device) + 0.5) / count
