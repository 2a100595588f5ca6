"""The loss of a prediction: element by element, averaged over each sample, weighted. torch only, pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.diffusion import Objective, Prediction


@dataclass(frozen=True)
class Huber:
    """Pseudo-Huber with c scheduled over the timesteps; Khrapov et al. 2024 (arXiv 2403.16728)."""

    c: float  # where the loss turns from square to linear, in the target's unit; at the noisy end of a falling schedule
    schedule: Literal["constant", "exponential", "snr"]
    scale: Literal["huber", "smooth-l1"]  # near zero like c·d², or like d² as MSE


@dataclass(frozen=True)
class Loss:
    """Which loss. Defaults: the plain mean square."""

    huber: Huber | None = None
    min_snr_gamma: float | None = None
    debiased: bool = False


def sample_losses(
    loss: Loss, objective: Objective, predicted: Tensor, target: Tensor, t: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The loss of each sample, in float32 at least: (B,).

    Args:
        predicted: (B, C, h, w), as `target`.
        t: (B,).
        mask: (B, 1, h, w) in [0, 1]; what counts. None: everything.
    """
    if loss.huber:
        errors = pseudo_huber(predicted, target, huber_c(loss.huber, objective, t), loss.huber.scale)
    else:
        errors = (_wide(predicted) - _wide(target)).square()
    losses = mean_per_sample(errors, mask)
    if loss.min_snr_gamma is not None:
        losses = losses * min_snr(objective.snr(t), loss.min_snr_gamma, objective.prediction).to(losses)
    if loss.debiased:
        losses = losses * debiased(objective.snr(t), objective.prediction).to(losses)
    return losses


def mse_per_sample(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, in float32 at least: (B, C, h, w) twice -> (B,)."""
    return (_wide(predicted) - _wide(target)).square().mean(dim=(1, 2, 3))


def pseudo_huber(predicted: Tensor, target: Tensor, c: Tensor, scale: Literal["huber", "smooth-l1"]) -> Tensor:
    """2 c (√(d² + c²) − c) element by element, or that over c: (B, C, h, w), float32 at least.

    Khrapov et al. 2024 (arXiv 2403.16728), with sd-scripts' factors, under which `smooth-l1` tends to d² for small d, and
    `huber` to c d².

    Args:
        c: (B,), above 0.
    """
    c = c.reshape(-1, 1, 1, 1)
    d2 = (_wide(predicted) - _wide(target)).square()
    # √(d² + c²) − c as a quotient: the difference cancels where d is small
    rise = 2 * d2 / ((d2 + c.square()).sqrt() + c)
    return rise * c if scale == "huber" else rise


def huber_c(huber: Huber, objective: Objective, t: Tensor) -> Tensor:
    """c at each sample's timestep, (B,): constant; exponential from 1 at t = 0 to c at t = T, c^(t/T), as Khrapov
    et al. 2024 have it; or `snr`, (1 − c) / (1 + σ)² + c with σ = SNR^(−1/2), as sd-scripts has it."""
    if huber.schedule == "exponential":
        return torch.as_tensor(huber.c, device=t.device) ** objective.progress(t)
    if huber.schedule == "snr":
        sigma = objective.snr(t).rsqrt()
        return (1 - huber.c) / (1 + sigma).square() + huber.c
    return torch.full_like(t, huber.c, dtype=torch.float32)


def mean_per_sample(errors: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of (B, C, h, w) over each sample, each place weighed by its mask (B, 1, h, w) in [0, 1]: (B,).

    What is masked out lowers a sample's loss and does not raise the rest: a small subject does not outweigh other pictures.
    """
    return (errors if mask is None else errors * mask.to(errors)).mean(dim=(1, 2, 3))


def min_snr(snr: Tensor, gamma: float, prediction: Prediction) -> Tensor:
    """Min-SNR-γ weight of each sample: min(SNR, γ) on the error of x_0; Hang et al. 2023 (arXiv 2303.09556), section 3.4.

    For ε that is min(SNR, γ) / SNR, for v min(SNR, γ) / (SNR + 1). (B,) -> (B,)
    """
    return snr.clamp(max=gamma) * x_0_error(snr, prediction)


def debiased(snr: Tensor, prediction: Prediction) -> Tensor:
    """Weight 1/√SNR of ε's square error; Yu et al. 2024 (arXiv 2310.08442). (B,) -> (B,)

    That is √SNR on the error of x_0, hence √SNR / (SNR + 1) for v.
    """
    return snr.sqrt() * x_0_error(snr, prediction)


def x_0_error(snr: Tensor, prediction: Prediction) -> Tensor:
    """Square error of x_0 per square error of what is predicted, (B,).

    x_0 = (x_t − √(1−ᾱ) ε) / √ᾱ gives 1 / SNR; x_0 = √ᾱ x_t − √(1−ᾱ) v gives 1 − ᾱ = 1 / (SNR + 1); x_0 = x_t − σ v of a
    flow gives σ² = 1 / (1 + √SNR)².
    """
    if prediction == "epsilon":
        return 1 / snr
    if prediction == "v_prediction":
        return 1 / (snr + 1)
    return 1 / (1 + snr.sqrt()).square()


def _wide(values: Tensor) -> Tensor:
    """In float32, or float64 as it comes."""
    return values if values.dtype == torch.float64 else values.float()
