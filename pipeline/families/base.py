"""What a model family must know: how to translate between its models and the rest of the library, nothing else.

A family never chooses timesteps, noise, targets or weights: those are `diffusion.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True)
class KohyaNames:
    """How the files of Kohya's scripts, ComfyUI and A1111 name a family's layers."""

    prefixes: dict[str, str]  # component of diffusers' pipeline -> what its layers' names start with
    original_blocks: bool  # the denoiser's blocks go by the original checkpoint's names, not by diffusers'


@dataclass(frozen=True)
class BaseVersion:
    """What other programs call a base; they sort adapters by it."""

    kohya: str  # `ss_base_model_version`
    v2: bool  # `ss_v2`
    architecture: str  # `modelspec.architecture`
    implementation: str  # `modelspec.implementation`
    prediction: str  # `modelspec.prediction_type`: epsilon or v; "" for what it has no word for
    layers_per_block: int  # of a UNet: the original layout's block numbers count them; 0 for other networks


class Family(Protocol):
    """One family of base models."""

    name: str
    stride: int  # pixels: the denoiser takes sides that are multiples of it
    vae_folders: tuple[str, ...]  # the sub-folders whose files settle the latents
    text_folders: tuple[str, ...]  # ... and the text embeddings
    denoiser_key: str  # the denoiser's name in diffusers' pipelines and adapter files
    pipeline_class: str  # diffusers' class, for a model card
    kohya: KohyaNames | None  # None: those files are no renaming of diffusers' layers, and are not written
    lora_targets: Mapping[str, tuple[str, ...]]  # what `attention`, `feed-forward` and `conv` of lora.targets stand for
    text_components: tuple[str, ...]  # the text encoders, by their names in diffusers' pipelines, that can carry an adapter

    def load_vae(self, model: LocalModel, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The image encoder, in evaluation mode."""

    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> Posterior:
        """(B, 3, H, W) in [-1, 1] -> the normalised posterior."""

    def load_text_encoders(self, model: LocalModel, device: torch.device) -> Any:
        """Tokenizers and text encoders, in float32; what `encode_captions` takes."""

    def encode_captions(self, encoders: Any, captions: Sequence[str], chunks: int, clip_skip: int) -> dict[str, Tensor]:
        """Named embeddings, each (B, …).

        Args:
            encoders: from `load_text_encoders`.
            captions: B texts; what does not fit is cut off.
            chunks: stretches of the encoder's length that a caption may fill, their states joined.
            clip_skip: layers left out at the encoder's end, in diffusers' count; 0 is the family's own choice.
        """

    def text_encoders_of(self, pipeline: Any) -> Any:
        """A pipeline's own tokenizers and text encoders, as `encode_captions` takes them."""

    def text_modules(self, encoders: Any) -> dict[str, nn.Module]:
        """The encoders of `text_components`, by name."""

    def token_counts(self, encoders: Any, captions: Sequence[str], chunks: int) -> tuple[list[int], int]:
        """Tokens of each caption without its marks, untruncated, and the most that is read."""

    def load_denoiser(self, model: LocalModel, dtype: torch.dtype) -> nn.Module:
        """The network that the adapter is made for, frozen, on the CPU."""

    def objective(self, model: LocalModel) -> Objective:
        """The base's own objective, from its scheduler's config."""

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, text: dict[str, Tensor], geometry: Tensor) -> Tensor:
        """The denoiser's output for x_t (B, C, h, w), t (B,), named embeddings (B, …) and geometry (B, 6) in float32:
        original height and width, crop top and left, target height and width, in pixels."""

    def load_pipeline(
        self, model: LocalModel, device: torch.device, dtype: torch.dtype, denoiser: nn.Module | None = None
    ) -> Any:
        """The whole base as a diffusers pipeline, for sampling; around a denoiser that is loaded already, if given. In `dtype`, but
        the VAE in float32: SDXL's is not finite in float16, and latents are decoded apart from the pipeline's own call."""

    def base_version(self, model: LocalModel) -> BaseVersion:
        """What other programs call this base, from its configs."""
