"""Train the embedded base model `assets/tiny-sd/`: Stable Diffusion 1.x in miniature, on the pictures of `world.py`.

    python assets/train_tiny_sd.py            # about an hour on two cores; every phase is resumed from .work/assets/

Four phases, each seeded: a byte-pair tokenizer on the grammar; an `AutoencoderKL` on world pictures and scribbles; the
`CLIPTextModel` and `UNet2DConditionModel` together on the v-prediction loss with 10 % caption dropout; the diffusers
folder in float16. A finished phase leaves its weights in `.work/assets/` and is not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from world import SIZE, SIZES, Scene, draw, draw_anything, is_held_out, random_caption, random_scene

HERE = Path(__file__).resolve().parent
OUT = HERE / "tiny-sd"
WORK = HERE.parent / ".work" / "assets"
MAX_TOKENS = 32


@dataclass(frozen=True)
class Phase:
    """A stretch of the UNet's training; the learning rate falls as if it were `horizon` steps long."""

    steps: int
    horizon: int
    location: float | None  # of the logit-normal density of t/T; none: t is uniform
    sizes: tuple[float, float, float] = (1, 1, 1)  # how often small, medium and large shapes are shown


# All noise levels first: backgrounds and colours come within 1,200 steps, and every shape is a blob. Then mostly the middle,
# which settles shapes, and mostly large shapes, which are learned first; with `location` 0.6 most steps fall on t = 400 to
# 830, where the words tell what the noisy picture does not. Last all sizes.
PHASES = (
    Phase(1200, 2000, None),
    Phase(800, 1400, 0.0),
    Phase(400, 2000, 0.0, (1, 4, 10)),
    Phase(800, 4000, 0.6, (1, 4, 10)),
    Phase(1800, 1800, 0.3),
)


def main() -> None:
    """Run the phases that are not done yet, then write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae-steps", type=int, default=1800)
    parser.add_argument("--pictures", type=int, default=12_000)
    args = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    vae = train_vae(args.vae_steps)
    text_encoder, unet, scheduler = train_unet(vae, tokenizer, args.pictures)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(OUT, safe_serialization=True)
    print(f"wrote {OUT.relative_to(HERE.parent)}")


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer whose merges cover the grammar's words; any other text falls apart into bytes."""
    rng = np.random.default_rng(0)
    corpus = [random_caption(random_scene(rng), rng) for _ in range(4000)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=1000, end_of_word_suffix="</w>", show_progress=False))
    learned = json.loads(bpe.to_str())["model"]["merges"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(a + "</w>" for a in alphabet)]
    tokens += [a + b for a, b in learned if a + b not in tokens]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(m) for m in learned], model_max_length=MAX_TOKENS)


def train_vae(steps: int) -> AutoencoderKL:
    """An autoencoder of about 1 M parameters, 4× downsampling, 4 latent channels; `scaling_factor` is 1/std of its latents."""
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=SIZE,
    ).to(memory_format=torch.channels_last)
    done = WORK / "vae.safetensors"
    if done.is_file():
        vae.load_state_dict(load_file(done))
        vae.register_to_config(scaling_factor=json.loads((WORK / "vae.json").read_text())["scaling_factor"])
        return vae.eval()
    rng = np.random.default_rng(1)
    pool = np.stack(
        [np.asarray(draw(random_scene(rng), rng)) for _ in range(6000)] + [np.asarray(draw_anything(rng)) for _ in range(6000)]
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1.5e-3, weight_decay=0.0, betas=(0.9, 0.99))
    start = time.monotonic()
    for step in range(steps):
        set_lr(optimizer, 1.5e-3, step, steps, warmup=100)
        pixels = to_pixels(pool[rng.integers(0, len(pool), 16)])
        if step < 0.85 * steps:  # quarter-size crops cost a quarter; the last steps see whole pictures
            top, left = rng.integers(0, SIZE // 2 + 1, 2)
            pixels = pixels[:, :, top : top + SIZE // 2, left : left + SIZE // 2]
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        loss = F.l1_loss(decoded, pixels) + F.mse_loss(decoded, pixels) + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        report("vae", step, steps, loss, start)
    vae.eval()
    with torch.inference_mode():
        latents = torch.cat([vae.encode(to_pixels(pool[i : i + 64])).latent_dist.mean for i in range(0, 1024, 64)])
    scaling_factor = round(float(1 / latents.std()), 5)
    vae.register_to_config(scaling_factor=scaling_factor)
    save_file({k: v.contiguous() for k, v in vae.state_dict().items()}, done)
    (WORK / "vae.json").write_text(json.dumps({"scaling_factor": scaling_factor}))
    return vae


def train_unet(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, pictures: int
) -> tuple[CLIPTextModel, UNet2DConditionModel, DDIMScheduler]:
    """Text encoder and UNet together on ‖v − v_θ(x_t, t, c)‖²; the weights kept are an exponential moving average."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=(64, 128, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
    )
    # v-prediction, as in Stable Diffusion 2.x: with ε a network of this size has the shapes after 800 steps but neither the
    # colours nor clean backgrounds, since an error of ε at high noise is multiplied by 1/√ᾱ in the picture.
    # A steeper end than Stable Diffusion's 0.012: at 16×16 latents its schedule leaves the mean colour readable at t = T,
    # and white or black backgrounds then come out grey.
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.02,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )
    models_ = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    rng = np.random.default_rng(2)
    scenes = []
    while len(scenes) < pictures:
        if not is_held_out(scene := random_scene(rng)):
            scenes.append(scene)
    means, stds = [], []
    with torch.inference_mode():
        for i in range(0, pictures, 100):
            pixels = to_pixels(np.stack([np.asarray(draw(scene, rng)) for scene in scenes[i : i + 100]]))
            posterior = vae.encode(pixels).latent_dist
            means.append(posterior.mean * vae.config.scaling_factor)
            stds.append(posterior.std * vae.config.scaling_factor)
    mean, std = torch.cat(means), torch.cat(stds)
    for number, phase in enumerate(PHASES, start=1):
        weights = WORK / f"unet-phase{number}.safetensors"
        if not weights.is_file():
            train_phase(phase, number, models_, mean, std, scenes, tokenizer, scheduler, weights)
        models_.load_state_dict(load_file(weights))
    return text_encoder.eval(), unet.eval(), scheduler


def train_phase(
    phase: Phase,
    number: int,
    models_: torch.nn.ModuleDict,
    mean: torch.Tensor,
    std: torch.Tensor,
    scenes: list[Scene],
    tokenizer: CLIPTokenizer,
    scheduler: DDIMScheduler,
    out: Path,
) -> None:
    """Train from the weights in `models_` with a fresh optimiser; `out` gets the average. `mean`, `std`: (N, 4, 16, 16)."""
    rng, generator = np.random.default_rng(2 + number), torch.Generator().manual_seed(3 + number)
    parameters = list(models_.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    share = np.array([phase.sizes[list(SIZES).index(scene.size)] for scene in scenes])
    start = time.monotonic()
    for step in range(phase.steps):
        set_lr(optimizer, 1e-3, step, phase.horizon, warmup=100)
        rows = rng.choice(len(scenes), 32, p=share / share.sum())
        captions = ["" if rng.random() < 0.1 else random_caption(scenes[i], rng) for i in rows]
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        x0 = mean[rows] + std[rows] * torch.randn(mean[rows].shape, generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        u = torch.rand(32, generator=generator)
        if phase.location is not None:  # Esser et al. 2024, arXiv 2403.03206, section 3.1, m = location, s = 1
            u = torch.sigmoid(phase.location + torch.randn(32, generator=generator))
        t = (u * 1000).long()
        predicted = models_["unet"](
            scheduler.add_noise(x0, noise, t), t, models_["text_encoder"](tokens).last_hidden_state
        ).sample
        loss = F.mse_loss(predicted, scheduler.get_velocity(x0, noise, t))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(0.998, (step + 1) / (step + 10)))
        report(f"unet phase {number}", step, phase.steps, loss, start)
        if step % 400 == 399:
            save_average(models_, parameters, average, WORK / "unet-partial.safetensors")
    save_average(models_, parameters, average, out)


def save_average(models_: torch.nn.Module, parameters: list[torch.nn.Parameter], average: list[torch.Tensor], to: Path) -> None:
    """Write the state dict with the averaged weights in the parameters' places."""
    by_id = {id(p): a for p, a in zip(parameters, average, strict=True)}
    named = dict(models_.named_parameters())
    state = {k: (by_id[id(named[k])] if k in named else v).contiguous() for k, v in models_.state_dict().items()}
    save_file(state, to)


def to_pixels(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1]."""
    return (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1).to(memory_format=torch.channels_last)


def set_lr(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int, warmup: int) -> None:
    """Linear warm-up, then half a cosine down to 2 % of the peak."""
    rise = min(1.0, (step + 1) / warmup)
    fall = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = peak * rise * fall


def report(phase: str, step: int, steps: int, loss: torch.Tensor, start: float) -> None:
    """One line every 50 steps."""
    if step % 50 == 49 or step == 0:
        seconds = time.monotonic() - start
        left = seconds / (step + 1) * (steps - step - 1)
        print(f"{phase} {step + 1}/{steps} loss {loss.item():.4f} {seconds:.0f} s, {left:.0f} s left", flush=True)


if __name__ == "__main__":
    main()
