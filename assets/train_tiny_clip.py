"""Train the embedded CLIP `assets/tiny-clip/`: it scores how well a picture of the world fits a caption.

    python assets/train_tiny_clip.py          # a quarter of an hour on one core

Contrastive training in the manner of CLIP (Radford et al. 2021, arXiv 2103.00020) on pictures of the plain look, apart
from the base model: the two share nothing but the grammar's tokenizer. Prints at the end how often the right caption
wins for a fresh picture.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from train_tiny_sd import MAX_TOKENS, build_tokenizer
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer
from world import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZE, SIZES, Scene, draw, random_caption, random_scene

OUT = Path(__file__).resolve().parent / "tiny-clip"
ATTRIBUTES = {
    "shape": list(SHAPES),
    "colour": list(COLOURS),
    "background": list(BACKGROUNDS),
    "size": list(SIZES),
    "position": list(POSITIONS),
}


def main() -> None:
    """Train, write the folder in float16, check what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--pictures", type=int, default=12_000)
    args = parser.parse_args()
    torch.manual_seed(0)
    processor = build_processor()
    model = train(processor, args.steps, args.pictures)
    model.half().save_pretrained(OUT)
    processor.save_pretrained(OUT)
    print(f"wrote {OUT.relative_to(OUT.parent.parent)}: {sum(p.numel() for p in model.parameters()):,} parameters")
    check()


def build_processor() -> CLIPProcessor:
    """The base's tokenizer, and pictures of 64 pixels with CLIP's normalisation. The PIL class needs no torchvision."""
    sides = {"height": SIZE, "width": SIZE}
    return CLIPProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=sides),
        tokenizer=build_tokenizer(),
    )


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A text tower of 2 layers and a vision tower of 4, both 128 wide, into a common space of 64 dimensions."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "image_size": SIZE,
        "patch_size": 8,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def train(processor: CLIPProcessor, steps: int, pictures: int, batch: int = 128, peak: float = 1e-3) -> CLIPModel:
    """Symmetric InfoNCE with a learned temperature; a pair off the diagonal that fits too is left out."""
    model = build_model(processor.tokenizer)
    rng = np.random.default_rng(20)
    scenes = [random_scene(rng) for _ in range(pictures)]
    pool = np.stack([np.asarray(draw(scene, rng)) for scene in scenes])
    shown = torch.tensor([[values.index(getattr(s, name)) for name, values in ATTRIBUTES.items()] for s in scenes])
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.02, betas=(0.9, 0.98), fused=True)
    start = time.monotonic()
    for step in range(steps):
        rise, fall = min(1.0, (step + 1) / 100), 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = peak * rise * fall
        rows = rng.integers(0, pictures, batch)
        captions = [random_caption(scenes[i], rng) for i in rows]
        said = torch.tensor([named(caption, scenes[i]) for caption, i in zip(captions, rows, strict=True)])
        tokens = processor.tokenizer(captions, padding=True, return_tensors="pt")
        pixels = normalise(augment(torch.from_numpy(pool[rows])), processor)
        logits = model(pixel_values=pixels, **tokens).logits_per_image  # (picture, caption)
        fits = (~said[None] | (shown[rows][:, None] == shown[rows][None])).all(dim=2)
        logits = logits.masked_fill(fits & ~torch.eye(batch, dtype=torch.bool), -torch.inf)
        labels = torch.arange(batch)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if step % 50 == 49:
            print(f"clip {step + 1}/{steps} loss {loss.item():.4f} {time.monotonic() - start:.0f} s", flush=True)
    return model.eval()


def named(caption: str, scene: Scene) -> list[bool]:
    """Which of `ATTRIBUTES` the caption of this scene mentions."""
    return [getattr(scene, name) in caption for name in ATTRIBUTES]


def augment(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float (B, H, W, 3) in [0, 1]: a little brighter or darker, smoother and noisier."""
    count = len(pixels)
    gain, shift = torch.empty(count, 1, 1, 1).uniform_(0.85, 1.1), torch.empty(count, 1, 1, 1).uniform_(-0.04, 0.04)
    pixels = pixels.float() / 255 * gain + shift
    planes = pixels.permute(0, 3, 1, 2)
    smooth = F.avg_pool2d(F.pad(planes, (1, 1, 1, 1), mode="replicate"), 3, stride=1).permute(0, 2, 3, 1)
    pixels = torch.lerp(pixels, smooth, torch.rand(count, 1, 1, 1))
    return (pixels + torch.randn(pixels.shape) * torch.rand(count, 1, 1, 1) * 0.05).clamp(0, 1)


def normalise(pixels: torch.Tensor, processor: CLIPProcessor) -> torch.Tensor:
    """(B, H, W, 3) in [0, 1] -> (B, 3, H, W) as the image processor makes it."""
    mean, std = (torch.tensor(v) for v in (processor.image_processor.image_mean, processor.image_processor.image_std))
    return ((pixels - mean) / std).permute(0, 3, 1, 2)


@torch.inference_mode()
def check(pictures: int = 640, choices: int = 32) -> None:
    """On fresh pictures: how often the right caption wins, against random full captions and against those that differ
    from it in one attribute alone; and the mean cosines of matching and mismatching pairs."""
    model, processor = CLIPModel.from_pretrained(OUT, dtype=torch.float32).eval(), CLIPProcessor.from_pretrained(OUT)
    rng = np.random.default_rng(21)
    every = [Scene(*values) for values in product(*ATTRIBUTES.values())]
    tokens = processor.tokenizer([scene.caption() for scene in every], padding=True, return_tensors="pt")
    texts = F.normalize(model.get_text_features(**tokens).pooler_output, dim=1)
    rows = rng.integers(0, len(every), pictures)
    images = [draw(every[row], rng) for row in rows]
    pixels = processor.image_processor(images, return_tensors="pt").pixel_values
    cosines = F.normalize(model.get_image_features(pixels).pooler_output, dim=1) @ texts.T  # (picture, caption)
    matching = cosines[torch.arange(pictures), torch.from_numpy(rows)]
    others = np.stack([rng.choice(np.delete(np.arange(len(every)), row), choices - 1, replace=False) for row in rows])
    wins = matching > cosines.gather(1, torch.from_numpy(others)).amax(dim=1)
    print(f"right among {choices} random full captions: {100 * float(wins.float().mean()):.1f} % of {pictures}")
    for name, values in ATTRIBUTES.items():
        variants = [[every.index(replace(every[row], **{name: v})) for v in values] for row in rows]
        best = cosines.gather(1, torch.tensor(variants)).amax(dim=1)
        print(f"right {name} among {len(values)}: {100 * float((matching >= best).float().mean()):.1f} %")
    mismatching = (cosines.sum() - matching.sum()) / (cosines.numel() - pictures)
    print(f"mean cosine: matching {float(matching.mean()):.3f}, mismatching {float(mismatching):.3f}")


if __name__ == "__main__":
    main()
