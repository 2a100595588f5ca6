"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet that predicts ε or v."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.diffusion import Objective
from pipeline.families.base import BaseVersion, KohyaNames, Posterior
from pipeline.families.parts import (
    UNET_TARGETS,
    ClipEncoder,
    config_of,
    count_tokens,
    ddpm_of,
    encode_with_vae,
    given_parts,
    join_chunks,
    load_clip,
    load_unet,
    load_vae,
    prediction_of,
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
    pipeline_class = "StableDiffusionPipeline"
    kohya = KohyaNames({"unet": "lora_unet", "text_encoder": "lora_te"}, original_blocks=False)
    lora_targets = UNET_TARGETS
    text_components: tuple[str, ...] = ("text_encoder",)

    def load_vae(self, model: LocalModel, device: torch.device, dtype: torch.dtype) -> nn.Module:
        return load_vae(model, device, dtype)

    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> Posterior:
        return encode_with_vae(vae, pixels)

    def load_text_encoders(self, model: LocalModel, device: torch.device) -> ClipEncoder:
        from transformers import CLIPTextModel

        return load_clip(model, device, "tokenizer", "text_encoder", CLIPTextModel)

    def encode_captions(self, encoders: ClipEncoder, captions: Sequence[str], chunks: int, clip_skip: int) -> dict[str, Tensor]:
        tokens = tokenise(encoders, captions, chunks)
        if not clip_skip:
            return {"hidden": join_chunks(encoders.encoder(tokens).last_hidden_state, chunks)}
        encoder: Any = encoders.encoder
        states = encoder(tokens, output_hidden_states=True).hidden_states[-(clip_skip + 1)]
        return {"hidden": join_chunks(encoder.final_layer_norm(states), chunks)}

    def text_encoders_of(self, pipeline: Any) -> ClipEncoder:
        return ClipEncoder(pipeline.tokenizer, pipeline.text_encoder)

    def text_modules(self, encoders: ClipEncoder) -> dict[str, nn.Module]:
        return {"text_encoder": encoders.encoder}

    def token_counts(self, encoders: ClipEncoder, captions: Sequence[str], chunks: int) -> tuple[list[int], int]:
        return count_tokens(encoders, captions, chunks)

    def load_denoiser(self, model: LocalModel, dtype: torch.dtype) -> nn.Module:
        return load_unet(model, dtype)

    def objective(self, model: LocalModel) -> Objective:
        return ddpm_of(model)

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, text: dict[str, Tensor], geometry: Tensor) -> Tensor:
        predicted: Tensor = denoiser(x_t, t, encoder_hidden_states=text["hidden"]).sample
        return predicted

    def load_pipeline(
        self, model: LocalModel, device: torch.device, dtype: torch.dtype, denoiser: nn.Module | None = None
    ) -> Any:
        quiet_libraries()
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline.from_pretrained(
            model.path,
            variant=model.variant,
            dtype={"vae": torch.float32, "default": dtype},
            use_safetensors=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            local_files_only=True,
            **given_parts(model, device, {self.denoiser_key: denoiser}),
        )
        return pipeline.to(device)

    def base_version(self, model: LocalModel) -> BaseVersion:
        unet, prediction = config_of(model, "unet"), prediction_of(model)
        v2 = unet.get("cross_attention_dim") == 1024  # OpenCLIP's width; 1.x has 768
        architecture = "stable-diffusion-v1"
        if v2:
            architecture = "stable-diffusion-v2-768-v" if prediction == "v" else "stable-diffusion-v2-512"
        return BaseVersion(
            kohya=("sd_v2" if v2 else "sd_v1") + ("_v" if prediction == "v" else ""),
            v2=v2,
            architecture=architecture,
            implementation="diffusers",
            prediction=prediction,
            layers_per_block=unet.get("layers_per_block", 2),
        )


FAMILY = StableDiffusion()
