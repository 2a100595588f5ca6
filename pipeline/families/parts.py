"""Pieces that several families share: a `AutoencoderKL`, CLIP text encoders, a conditional UNet, a DDPM schedule."""

from __future__ import annotations

import json
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

UNET_TARGETS = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "feed-forward": ("ff.net.0.proj", "ff.net.2"),
    "conv": ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
}


@dataclass(frozen=True)
class ClipEncoder:
    """A CLIP text encoder with its tokenizer."""

    tokenizer: Any
    encoder: nn.Module


def load_vae(model: LocalModel, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The base's `AutoencoderKL`, or the one that was put in its place, frozen."""
    quiet_libraries()
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    source, folder = (model, "vae") if model.vae is None else (model.vae, None)
    vae = AutoencoderKL.from_pretrained(
        source.path, subfolder=folder, variant=source.variant, dtype=dtype, use_safetensors=True, local_files_only=True
    )
    if vae.config.get("latents_mean") is not None or vae.config.get("latents_std") is not None:
        raise UserError(
            f"the VAE in {source.path} shifts each channel of its latents on its own (latents_mean, latents_std), as Playground 2.5's does, "
            "which is not done here: take another base, or another VAE with model.vae"
        )
    frozen: nn.Module = vae.requires_grad_(False).eval().to(device)
    return frozen


def given_parts(model: LocalModel, device: torch.device, loaded: dict[str, nn.Module | None]) -> dict[str, nn.Module]:
    """What a pipeline is to take instead of the base's own: a VAE of the user's, and what is loaded already."""
    parts = {name: module for name, module in loaded.items() if module is not None}
    return parts if model.vae is None else {**parts, "vae": load_vae(model, device, torch.float32)}


def encode_with_vae(vae: Any, pixels: Tensor) -> Posterior:
    """(B, 3, H, W) in [-1, 1] -> posterior with the VAE's shift and scale applied, in float32."""
    posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
    shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
    return Posterior((posterior.mean.float() - shift) * scale, posterior.std.float() * scale)


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


def clips_of(pipeline: Any) -> tuple[ClipEncoder, ClipEncoder]:
    """Both CLIP text encoders of a pipeline."""
    return (
        ClipEncoder(pipeline.tokenizer, pipeline.text_encoder),
        ClipEncoder(pipeline.tokenizer_2, pipeline.text_encoder_2),
    )


def tokenise(encoders: ClipEncoder, captions: Sequence[str], chunks: int = 1) -> Tensor:
    """Token ids, every chunk with its marks and padded to the encoder's length L, on its device: (B · chunks, L)."""
    tokenizer = encoders.tokenizer
    if chunks == 1:
        ids = tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
        ).input_ids
    else:
        inner = tokenizer.model_max_length - 2
        rows = []
        for tokens in tokenizer(list(captions), add_special_tokens=False, verbose=False).input_ids:
            for i in range(chunks):
                row = [tokenizer.bos_token_id, *tokens[i * inner : (i + 1) * inner], tokenizer.eos_token_id]
                rows.append(row + [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(row)))
        ids = torch.tensor(rows)
    device = next(encoders.encoder.parameters()).device
    return torch.as_tensor(ids).to(device)


def join_chunks(hidden: Tensor, chunks: int) -> Tensor:
    """(B · chunks, L, D) -> (B, chunks · L, D)."""
    return hidden.reshape(-1, chunks * hidden.shape[1], hidden.shape[2])


def count_tokens(encoders: ClipEncoder, captions: Sequence[str], chunks: int) -> tuple[list[int], int]:
    """Tokens of each caption without its marks, untruncated, and how many are read."""
    counts = [len(ids) for ids in encoders.tokenizer(list(captions), add_special_tokens=False, verbose=False).input_ids]
    return counts, chunks * (encoders.tokenizer.model_max_length - 2)


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


def config_of(model: LocalModel, component: str, file: str = "config.json") -> dict[str, Any]:
    """A component's config as its JSON file states it."""
    config: dict[str, Any] = json.loads((model.path / component / file).read_text(encoding="utf-8"))
    return config


def prediction_of(model: LocalModel) -> str:
    """`epsilon` or `v`, as the base's scheduler config states."""
    stated = config_of(model, "scheduler", "scheduler_config.json").get("prediction_type", "epsilon")
    return "v" if stated == "v_prediction" else str(stated)
