"""Pieces that several families share: a `AutoencoderKL`, CLIP text encoders, a conditional UNet, a DDPM schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.diffusion import Ddpm
from pipeline.errors import UserError
from pipeline.families.base import Posterior
from pipeline.model_source import LocalModel
from pipeline.quiet import quiet_libraries


@dataclass(frozen=True)
class ClipEncoder:
    """A CLIP text encoder with its tokenizer."""

    tokenizer: Any
    encoder: nn.Module


def load_vae(model: LocalModel, device: torch.device) -> nn.Module:
    """The base's `AutoencoderKL`, float32, frozen."""
    quiet_libraries()
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(
        model.path, subfolder="vae", variant=model.variant, dtype=torch.float32, use_safetensors=True
    )
    frozen: nn.Module = vae.requires_grad_(False).eval().to(device)
    return frozen


def encode_with_vae(vae: Any, pixels: Tensor) -> Posterior:
    """(B, 3, H, W) in [-1, 1] -> posterior with the VAE's shift and scale applied."""
    posterior = vae.encode(pixels).latent_dist
    shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
    return Posterior((posterior.mean - shift) * scale, posterior.std * scale)


def load_unet(model: LocalModel, dtype: torch.dtype) -> nn.Module:
    """The base's `UNet2DConditionModel`, frozen, on the CPU."""
    quiet_libraries()
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(
        model.path, subfolder="unet", variant=model.variant, dtype=dtype, use_safetensors=True
    )
    frozen: nn.Module = unet.requires_grad_(False)
    return frozen


def load_clip(model: LocalModel, device: torch.device, tokenizer: str, encoder: str, kind: Any) -> ClipEncoder:
    """A tokenizer and a text encoder of class `kind` from their sub-folders, in float32 and frozen."""
    quiet_libraries()
    from transformers import CLIPTokenizer

    weights = kind.from_pretrained(
        model.path / encoder, variant=model.variant, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    return ClipEncoder(
        CLIPTokenizer.from_pretrained(model.path / tokenizer, local_files_only=True),
        weights.requires_grad_(False).eval().to(device),
    )


def tokenise(encoders: ClipEncoder, captions: Sequence[str]) -> Tensor:
    """Token ids padded to the encoder's length, on its device: (B, L)."""
    tokenizer = encoders.tokenizer
    ids = tokenizer(
        list(captions), padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids
    device = next(encoders.encoder.parameters()).device
    return torch.as_tensor(ids).to(device)


def count_tokens(encoders: ClipEncoder, captions: Sequence[str]) -> list[int]:
    """Tokens of each caption with its start and end marks, untruncated."""
    return [len(ids) for ids in encoders.tokenizer(list(captions), verbose=False).input_ids]


def ddpm_of(model: LocalModel) -> Ddpm:
    """The noise schedule and prediction type that the base's scheduler config states."""
    quiet_libraries()
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    # Configs of DDIM, PNDM and Euler share the keys that settle ᾱ; DDPM reads them all.
    scheduler = DDPMScheduler.from_pretrained(model.path, subfolder="scheduler")
    prediction = scheduler.config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise UserError(f"{model.path}/scheduler: prediction_type {prediction!r}: epsilon or v_prediction can be trained")
    return Ddpm(scheduler.alphas_cumprod.float(), prediction)
