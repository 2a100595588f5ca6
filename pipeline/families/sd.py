"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet that predicts ε or v."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.diffusion import Objective
from pipeline.families.base import Posterior
from pipeline.families.parts import (
    ClipEncoder,
    count_tokens,
    ddpm_of,
    encode_with_vae,
    load_clip,
    load_unet,
    load_vae,
    tokenise,
)
from pipeline.model_source import LocalModel
from pipeline.quiet import quiet_libraries


class StableDiffusion:
    """See `pipeline.families.base.Family`."""

    name = "sd"
    stride = 8
    vae_folders: tuple[str, ...] = ("vae",)
    text_folders: tuple[str, ...] = ("text_encoder", "tokenizer")
    denoiser_key = "unet"

    def load_vae(self, model: LocalModel, device: torch.device) -> nn.Module:
        return load_vae(model, device)

    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> Posterior:
        return encode_with_vae(vae, pixels)

    def load_text_encoders(self, model: LocalModel, device: torch.device) -> ClipEncoder:
        from transformers import CLIPTextModel

        return load_clip(model, device, "tokenizer", "text_encoder", CLIPTextModel)

    def encode_captions(self, encoders: ClipEncoder, captions: Sequence[str]) -> dict[str, Tensor]:
        return {"hidden": encoders.encoder(tokenise(encoders, captions)).last_hidden_state}

    def token_counts(self, encoders: ClipEncoder, captions: Sequence[str]) -> tuple[list[int], int]:
        return count_tokens(encoders, captions), encoders.tokenizer.model_max_length

    def load_denoiser(self, model: LocalModel, dtype: torch.dtype) -> nn.Module:
        return load_unet(model, dtype)

    def objective(self, model: LocalModel) -> Objective:
        return ddpm_of(model)

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, text: dict[str, Tensor], geometry: Tensor) -> Tensor:
        predicted: Tensor = denoiser(x_t, t, encoder_hidden_states=text["hidden"]).sample
        return predicted

    def load_pipeline(self, model: LocalModel, device: torch.device, dtype: torch.dtype) -> Any:
        quiet_libraries()
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline.from_pretrained(
            model.path,
            variant=model.variant,
            dtype=dtype,
            use_safetensors=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            local_files_only=True,
        )
        return pipeline.to(device)


FAMILY = StableDiffusion()
