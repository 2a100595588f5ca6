"""Stable Diffusion 3 and 3.5: a transformer that predicts a flow, two CLIPs with pooled outputs and a T5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pipeline.diffusion import Flow, Objective
from pipeline.errors import UserError
from pipeline.families.base import BaseVersion, Posterior
from pipeline.families.parts import ClipEncoder, clips_of, encode_with_vae, given_parts, load_clip, load_vae, tokenise
from pipeline.model_source import LocalModel
from pipeline.quiet import quiet_libraries

_T5_LENGTH = 256  # tokens; what diffusers' pipeline reads unless told otherwise
_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    "feed-forward": ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    "conv": (),
}


@dataclass(frozen=True)
class Sd3Encoders:
    """Both CLIPs, and T5 with its tokenizer."""

    clips: tuple[ClipEncoder, ClipEncoder]
    t5: ClipEncoder


class StableDiffusion3:
    """See `pipeline.families.base.Family`. Esser et al. 2024 (arXiv 2403.03206), section 4, for the network."""

    name = "sd3"
    stride = 16
    vae_folders: tuple[str, ...] = ("vae",)
    text_folders: tuple[str, ...] = (
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
        "text_encoder_3",
        "tokenizer_3",
    )
    denoiser_key = "transformer"
    pipeline_class = "StableDiffusion3Pipeline"
    kohya = None  # their files join the projections of query, key and value in one layer: no renaming
    lora_targets = _TARGETS
    text_components: tuple[str, ...] = ("text_encoder", "text_encoder_2")  # T5 stays as it is

    def load_vae(self, model: LocalModel, device: torch.device, dtype: torch.dtype) -> nn.Module:
        return load_vae(model, device, dtype)

    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> Posterior:
        return encode_with_vae(vae, pixels)

    def load_text_encoders(self, model: LocalModel, device: torch.device) -> Sd3Encoders:
        quiet_libraries()
        from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel

        if not (model.path / "text_encoder_3").is_dir():
            raise UserError(f"{model.path} has no text_encoder_3: family sd3 needs the base with its T5")
        t5 = T5EncoderModel.from_pretrained(
            model.path / "text_encoder_3",
            variant=model.variant,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
        )
        return Sd3Encoders(
            (
                load_clip(model, device, "tokenizer", "text_encoder", CLIPTextModelWithProjection),
                load_clip(model, device, "tokenizer_2", "text_encoder_2", CLIPTextModelWithProjection),
            ),
            ClipEncoder(
                AutoTokenizer.from_pretrained(model.path / "tokenizer_3", local_files_only=True),
                t5.requires_grad_(False).eval().to(device),
            ),
        )

    def encode_captions(self, encoders: Sd3Encoders, captions: Sequence[str], chunks: int, clip_skip: int) -> dict[str, Tensor]:
        """CLIPs' last hidden layers but one, joined in width and filled up to T5's, before T5's states; both pooled outputs.

        Raises:
            UserError: `chunks` is not 1.
        """
        _one_chunk(chunks)
        outputs = [clip.encoder(tokenise(clip, captions), output_hidden_states=True) for clip in encoders.clips]
        clip = torch.cat([output.hidden_states[-(clip_skip + 2)] for output in outputs], dim=-1)
        ids = encoders.t5.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=_T5_LENGTH, return_tensors="pt"
        ).input_ids
        t5 = encoders.t5.encoder(torch.as_tensor(ids).to(clip.device))[0]
        hidden = torch.cat([pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5], dim=-2)
        return {"hidden": hidden, "pooled": torch.cat([output.text_embeds for output in outputs], dim=-1)}

    def text_encoders_of(self, pipeline: Any) -> Sd3Encoders:
        return Sd3Encoders(clips_of(pipeline), ClipEncoder(pipeline.tokenizer_3, pipeline.text_encoder_3))

    def text_modules(self, encoders: Sd3Encoders) -> dict[str, nn.Module]:
        return {"text_encoder": encoders.clips[0].encoder, "text_encoder_2": encoders.clips[1].encoder}

    def token_counts(self, encoders: Sd3Encoders, captions: Sequence[str], chunks: int) -> tuple[list[int], int]:
        """T5's: what the CLIPs cut off, it still reads."""
        _one_chunk(chunks)
        ids = encoders.t5.tokenizer(list(captions), add_special_tokens=False, verbose=False).input_ids
        return [len(tokens) for tokens in ids], _T5_LENGTH - 1  # the last one marks the end

    def load_denoiser(self, model: LocalModel, dtype: torch.dtype) -> nn.Module:
        quiet_libraries()
        from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

        transformer = SD3Transformer2DModel.from_pretrained(
            model.path, subfolder="transformer", variant=model.variant, dtype=dtype, use_safetensors=True
        )
        frozen: nn.Module = transformer.requires_grad_(False)
        return frozen

    def objective(self, model: LocalModel) -> Objective:
        quiet_libraries()
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        config = FlowMatchEulerDiscreteScheduler.load_config(model.path, subfolder="scheduler")
        if config.get("use_dynamic_shifting"):
            raise UserError(
                f"{model.path}/scheduler: use_dynamic_shifting: a shift that depends on the picture's size cannot be trained"
            )
        return Flow(shift=config["shift"], steps=config["num_train_timesteps"])

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, text: dict[str, Tensor], geometry: Tensor) -> Tensor:
        predicted: Tensor = denoiser(
            hidden_states=x_t, timestep=t, encoder_hidden_states=text["hidden"], pooled_projections=text["pooled"]
        ).sample
        return predicted

    def load_pipeline(
        self, model: LocalModel, device: torch.device, dtype: torch.dtype, denoiser: nn.Module | None = None
    ) -> Any:
        quiet_libraries()
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline

        pipeline = StableDiffusion3Pipeline.from_pretrained(
            model.path,
            variant=model.variant,
            dtype={"vae": torch.float32, "default": dtype},
            use_safetensors=True,
            local_files_only=True,
            **given_parts(model, device, {self.denoiser_key: denoiser}),
        )
        return pipeline.to(device)

    def base_version(self, model: LocalModel) -> BaseVersion:
        return BaseVersion(
            kohya="sd3",
            v2=False,
            architecture="stable-diffusion-3",
            implementation="https://github.com/Stability-AI/generative-models",
            prediction="",
            layers_per_block=0,
        )


def _one_chunk(chunks: int) -> None:
    if chunks != 1:
        raise UserError(
            f"encode.caption_chunks: {chunks} is for CLIP's 75 tokens; family sd3 reads {_T5_LENGTH - 1} with its T5: set it to 1"
        )


FAMILY = StableDiffusion3()
