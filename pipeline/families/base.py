"""What a model family must know: how to translate between its models and the rest of the library, nothing else.

A family never chooses timesteps, noise, targets or weights: those are `diffusion.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.diffusion import Objective
from pipeline.model_source import LocalModel


@dataclass(frozen=True)
class Posterior:
    """Normalised latents of a batch: the denoiser's own scale and shift are applied. Both (B, C, h, w)."""

    mean: Tensor
    std: Tensor


class Family(Protocol):
    """One family of base models."""

    name: str
    stride: int  # pixels per latent cell that the denoiser can take, as a divisor of every side
    vae_folders: tuple[str, ...]  # the sub-folders whose files settle the latents
    text_folders: tuple[str, ...]  # ... and the text embeddings
    denoiser_key: str  # the denoiser's name in diffusers' pipelines and adapter files

    def load_vae(self, model: LocalModel, device: torch.device) -> nn.Module:
        """The image encoder, in float32, in evaluation mode."""

    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> Posterior:
        """(B, 3, H, W) in [-1, 1] -> the normalised posterior."""

    def load_text_encoders(self, model: LocalModel, device: torch.device) -> Any:
        """Tokenizers and text encoders, in float32; what `encode_captions` takes."""

    def encode_captions(self, encoders: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        """Named embeddings, each (B, …)."""

    def token_counts(self, encoders: Any, captions: Sequence[str]) -> tuple[list[int], int]:
        """Tokens of each caption with its marks, untruncated, and the most that the encoder takes."""

    def load_denoiser(self, model: LocalModel, dtype: torch.dtype) -> nn.Module:
        """The network that the adapter is made for, frozen, on the CPU."""

    def objective(self, model: LocalModel) -> Objective:
        """The base's own objective, from its scheduler's config."""

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, text: dict[str, Tensor], geometry: Tensor) -> Tensor:
        """The denoiser's output for x_t (B, C, h, w), t (B,), named embeddings (B, …) and geometry (B, 6) in float32:
        original height and width, crop top and left, target height and width, in pixels."""

    def load_pipeline(self, model: LocalModel, device: torch.device, dtype: torch.dtype) -> Any:
        """The whole base as a diffusers pipeline, for sampling."""
