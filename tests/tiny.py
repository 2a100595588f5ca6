"""Tiny models and pictures made from configs: real classes, random weights, milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import pre_tokenizers

WORDS = ("a", "red", "blue", "green", "circle", "square", "small", "large")


def tokenizer(max_length: int = 16):
    """A CLIP tokenizer over single bytes and a few words."""
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=max_length)


def clip_text_config(vocabulary: int, max_length: int = 16, projection: int = 16):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=max_length,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )


def vae(seed: int = 0, **extra):
    """4 latent channels, 4 pixels per latent cell."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.5,
        **extra,
    )


def unet(seed: int = 0, cross: int = 16, **extra):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=cross,
        attention_head_dim=2,
        norm_num_groups=4,
        **extra,
    )


def make_sd(folder: Path, seed: int = 0, prediction_type: str = "epsilon") -> Path:
    """A random Stable Diffusion in the diffusers layout."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    words = tokenizer()
    torch.manual_seed(seed)
    text_encoder = CLIPTextModel(clip_text_config(len(words)))
    StableDiffusionPipeline(
        vae=vae(seed),
        text_encoder=text_encoder,
        tokenizer=words,
        unet=unet(seed),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            steps_offset=1,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def make_sdxl(folder: Path, seed: int = 0) -> Path:
    """A random Stable Diffusion XL in the diffusers layout."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    words = tokenizer()
    torch.manual_seed(seed)
    one = CLIPTextModel(clip_text_config(len(words)))
    two = CLIPTextModelWithProjection(clip_text_config(len(words), projection=16))
    StableDiffusionXLPipeline(
        vae=vae(seed),
        text_encoder=one,
        tokenizer=words,
        text_encoder_2=two,
        tokenizer_2=words,
        unet=unet(
            seed,
            cross=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
        ),
    ).save_pretrained(folder)
    return folder


def t5_tokenizer():
    """A T5 tokenizer over characters and a few words."""
    from tokenizers import Tokenizer, models
    from tokenizers import pre_tokenizers as pre
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = ["<pad>", "</s>", "<unk>", "▁", *letters, *(f"▁{word}" for word in WORDS)]
    words = Tokenizer(models.Unigram([(piece, -float(i > 3)) for i, piece in enumerate(pieces)], unk_id=2))
    words.pre_tokenizer = pre.Metaspace()
    from tokenizers import processors

    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def make_sd3(folder: Path, seed: int = 0) -> Path:
    """A random Stable Diffusion 3 in the diffusers layout."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

    words, t5_words = tokenizer(), t5_tokenizer()
    torch.manual_seed(seed)
    one, two = (CLIPTextModelWithProjection(clip_text_config(len(words), projection=16)) for _ in range(2))
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_words), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
        )
    )
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(seed, shift_factor=0.1),
        text_encoder=one,
        tokenizer=words,
        text_encoder_2=two,
        tokenizer_2=words,
        text_encoder_3=t5,
        tokenizer_3=t5_words,
    ).save_pretrained(folder)
    return folder


def make_clip(folder: Path, seed: int = 0) -> Path:
    """A random CLIP with tokenizer and image processor."""
    from transformers import CLIPConfig, CLIPModel

    words = tokenizer()
    torch.manual_seed(seed)
    config = CLIPConfig(
        text_config=clip_text_config(len(words)).to_dict(),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "projection_dim": 16,
        },
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "CLIPImageProcessor",
                "size": {"shortest_edge": 32},
                "crop_size": {"height": 32, "width": 32},
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
            }
        )
    )
    return folder


def make_pictures(folder: Path, count: int = 10, size: tuple[int, int] = (32, 32), seed: int = 0) -> Path:
    """Captioned pictures: one coloured ellipse each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        image = Image.new("RGB", size, tuple(int(c) for c in rng.integers(0, 255, 3)))
        x, y = rng.integers(0, 12, 2)
        ImageDraw.Draw(image).ellipse((x, y, x + 16, y + 14), fill=tuple(int(c) for c in rng.integers(0, 255, 3)))
        image.save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"a {WORDS[1 + i % 3]} circle {i}", encoding="utf-8")
    return folder
