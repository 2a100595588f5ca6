"""Stable Diffusion XL: two text encoders with a pooled output, and the picture's geometry as a condition."""

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
    clips_of,
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


class StableDiffusionXL:
    """See `pipeline.families.base.Family`. Podell et al. 2023 (arXiv 2307.01952), section 2.2, for the conditions."""

    name = "sdxl"
    stride = 8
    vae_folders: tuple[str, ...] = ("vae",)
    text_folders: tuple[str, ...] = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    denoiser_key = "unet"
    pipeline_class = "StableDiffusionXLPipeline"
    kohya = KohyaNames({"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}, original_blocks=True)
    lora_targets = UNET_TARGETS
    text_components: tuple[str, ...] = ("text_encoder", "text_encoder_2")

    def load_vae(self, model: LocalModel, device: torch.device, dtype: torch.dtype) -> nn.Module:
        return load_vae(model, device, dtype)

    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> Posterior:
        return encode_with_vae(vae, pixels)

    def load_text_encoders(self, model: LocalModel, device: torch.device) -> tuple[ClipEncoder, ClipEncoder]:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        return (
            load_clip(model, device, "tokenizer", "text_encoder", CLIPTextModel),
            load_clip(model, device, "tokenizer_2", "text_encoder_2", CLIPTextModelWithProjection),
        )

    def encode_captions(
        self, encoders: tuple[ClipEncoder, ClipEncoder], captions: Sequence[str], chunks: int, clip_skip: int
    ) -> dict[str, Tensor]:
        """The last hidden layer but one of both encoders, joined, and the second one's pooled projection of the first chunk."""
        outputs = [clip.encoder(tokenise(clip, captions, chunks), output_hidden_states=True) for clip in encoders]
        hidden = [join_chunks(output.hidden_states[-(clip_skip + 2)], chunks) for output in outputs]
        return {"hidden": torch.cat(hidden, dim=-1), "pooled": outputs[1].text_embeds[::chunks]}

    def text_encoders_of(self, pipeline: Any) -> tuple[ClipEncoder, ClipEncoder]:
        return clips_of(pipeline)

    def text_modules(self, encoders: tuple[ClipEncoder, ClipEncoder]) -> dict[str, nn.Module]:
        return {"text_encoder": encoders[0].encoder, "text_encoder_2": encoders[1].encoder}

    def token_counts(
        self, encoders: tuple[ClipEncoder, ClipEncoder], captions: Sequence[str], chunks: int
    ) -> tuple[list[int], int]:
        return count_tokens(encoders[0], captions, chunks)

    def load_denoiser(self, model: LocalModel, dtype: torch.dtype) -> nn.Module:
        return load_unet(model, dtype)

    def objective(self, model: LocalModel) -> Objective:
        return ddpm_of(model)

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, text: dict[str, Tensor], geometry: Tensor) -> Tensor:
        # geometry stays float32: bf16 rounds 1333 to 1336
        conditions = {"text_embeds": text["pooled"], "time_ids": geometry}
        predicted: Tensor = denoiser(x_t, t, encoder_hidden_states=text["hidden"], added_cond_kwargs=conditions).sample
        return predicted

    def load_pipeline(
        self, model: LocalModel, device: torch.device, dtype: torch.dtype, denoiser: nn.Module | None = None
    ) -> Any:
        quiet_libraries()
        from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

        pipeline = StableDiffusionXLPipeline.from_pretrained(
            model.path,
            variant=model.variant,
            dtype={"vae": torch.float32, "default": dtype},
            use_safetensors=True,
            add_watermarker=False,
            local_files_only=True,
            **given_parts(model, device, {self.denoiser_key: denoiser}),
        )
        return pipeline.to(device)

    def base_version(self, model: LocalModel) -> BaseVersion:
        return BaseVersion(
            kohya="sdxl_base_v1-0",
            v2=False,
            architecture="stable-diffusion-xl-v1-base",
            implementation="https://github.com/Stability-AI/generative-models",
            prediction=prediction_of(model),
            layers_per_block=config_of(model, "unet").get("layers_per_block", 2),
        )


FAMILY = StableDiffusionXL()
