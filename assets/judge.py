"""Say what a picture of the world shows, apart from the base model and from CLIP: the referee of tests and demo.

    python assets/judge.py                    # three minutes on two cores: trains assets/judge/, checks every judgement
    python assets/judge.py --check-only       # checks the judgements with the weights that are there

Background, colour and style are read off the pixels by formulas; only the shape needs a network, a small CNN trained on
freshly drawn pictures of both looks. Pictures are `PIL` images; other sizes than the world's are resampled.
"""

from __future__ import annotations

import argparse
import colorsys
import json
import math
import time
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import ndimage
from torch import nn
from world import BACKGROUNDS, COLOURS, SHAPES, SIZE, Scene, draw, draw_neon, random_scene

OUT = Path(__file__).resolve().parent / "judge"
CHANNELS = (24, 48, 72, 96)
NIGHT = 0.25  # `draw_neon` multiplies backgrounds by this


def main() -> None:
    """Train the CNN unless told otherwise, then print how often each judgement is right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--check-only", action="store_true")
    args = parser.parse_args()
    if not args.check_only:
        save(train(args.steps))
    check()


def shape(image: Image.Image) -> str:
    """The name of the shape, by the CNN."""
    with torch.inference_mode():
        logits = _network()(torch.from_numpy(_pixels(image)).permute(2, 0, 1)[None] / 127.5 - 1)
    return SHAPES[int(logits.argmax())]


def background_colour(image: Image.Image, neon: bool = False) -> str:
    """The name of the background: the border's median colour, to the nearest of `BACKGROUNDS` (darkened, if `neon`)."""
    anchors = np.array(list(BACKGROUNDS.values()), np.float32) * (NIGHT if neon else 1.0)
    return list(BACKGROUNDS)[int(np.linalg.norm(anchors - _background(_pixels(image)), axis=1).argmin())]


def object_colour(image: Image.Image) -> str:
    """The name of the object's colour: the nearest hue of `COLOURS` to that of its most saturated pixels."""
    pixels = _pixels(image)
    distance = _distance(pixels)
    mask = distance >= 0.5 * _level(distance)
    chroma = (pixels.max(axis=2) - pixels.min(axis=2))[mask]
    red, green, blue = pixels[mask][chroma >= np.quantile(chroma, 0.5)].mean(axis=0) / 255
    hue = colorsys.rgb_to_hsv(red, green, blue)[0]
    off = {name: abs((hue - _hue(name) + 0.5) % 1 - 0.5) for name in COLOURS}
    return min(off, key=off.__getitem__)


def hollowness(image: Image.Image) -> float:
    """0 for a filled shape, towards 1 for an outline: 1 - (contrast of the silhouette's core) / (contrast of its rim).

    Contrast is a pixel's RGB distance from the background. The silhouette is every pixel of more than half the
    strongest contrast, gaps of a pixel closed and holes filled; its core is the tenth that lies deepest inside.
    Counting the pixels of holes instead would miss small stars and crosses, whose tube leaves a hole of a few pixels.
    A picture that shows nothing has hollowness 0.
    """
    distance = _distance(_pixels(image))
    level = _level(distance)
    if level < 24:
        return 0.0
    mask = ndimage.binary_closing(np.pad(distance >= 0.5 * level, 2), iterations=1)[2:-2, 2:-2]
    depth = ndimage.distance_transform_edt(ndimage.binary_fill_holes(mask))
    inside = depth > 0
    core = inside & (depth >= np.quantile(depth[inside], 0.9))
    return float(np.clip(1 - distance[core].mean() / level, 0, 1))


def darkness(image: Image.Image) -> float:
    """1 for a background that is dark as at night, 0 for one that is bright; brown, the darkest but black, has 0.05.

    The scale is linear in the strongest of red, green and blue: 1 up to 66 (`draw_neon` stays below 65), 0 from 106.
    """
    return float(np.clip((106 - _background(_pixels(image)).max()) / 40, 0, 1))


def neon_style(image: Image.Image) -> float:
    """How far a picture has the look of `draw_neon`: about 0 for the plain look, about 1 for neon.

    min(1, hollowness / 0.4) · darkness. A product, so that darkening alone (black backgrounds are dark in the plain
    look too) and hollowing alone score 0.
    """
    return min(1.0, hollowness(image) / 0.4) * darkness(image)


def _pixels(image: Image.Image) -> np.ndarray:
    """float32 (SIZE, SIZE, 3) in [0, 255]."""
    image = image.convert("RGB")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(image, np.float32)


def _background(pixels: np.ndarray) -> np.ndarray:
    """Median colour (3,) of a border two pixels wide."""
    border = np.ones(pixels.shape[:2], bool)
    border[2:-2, 2:-2] = False
    return np.median(pixels[border], axis=0)


def _distance(pixels: np.ndarray) -> np.ndarray:
    """RGB distance (SIZE, SIZE) of every pixel from the background."""
    return np.linalg.norm(pixels - _background(pixels), axis=2)


def _level(distance: np.ndarray) -> float:
    """The object's contrast: the 50th strongest distance. The smallest object covers about 100 pixels."""
    return float(np.sort(distance, axis=None)[-50])


@cache
def _hue(colour: str) -> float:
    return colorsys.rgb_to_hsv(*(c / 255 for c in COLOURS[colour]))[0]


def build_network(channels: tuple[int, ...] = CHANNELS) -> nn.Sequential:
    """Convolutions that halve the picture each, then one linear layer: (B, 3, SIZE, SIZE) in [-1, 1] -> (B, 6)."""
    layers: list[nn.Module] = []
    for before, after in pairwise((3, *channels)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
    cells = (SIZE >> len(channels)) ** 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(cells * channels[-1], len(SHAPES)))


@cache
def _network() -> nn.Sequential:
    config = json.loads((OUT / "config.json").read_text())
    network = build_network(tuple(config["channels"]))
    network.load_state_dict({k: v.float() for k, v in load_file(OUT / "model.safetensors").items()})
    return network.eval()


def save(network: nn.Sequential) -> None:
    """Write `assets/judge/`, weights in float16."""
    OUT.mkdir(exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in network.state_dict().items()}, OUT / "model.safetensors")
    config = {"channels": CHANNELS, "shapes": SHAPES, "size": SIZE}
    (OUT / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"wrote {OUT.relative_to(OUT.parent.parent)}: {sum(p.numel() for p in network.parameters()):,} parameters")


def train(steps: int, batch: int = 64, pictures: int = 9000, peak: float = 2e-3) -> nn.Sequential:
    """Cross-entropy on augmented pictures: both looks, and blends of the two looks of one scene."""
    torch.manual_seed(0)
    rng = np.random.default_rng(10)
    scenes = [random_scene(rng) for _ in range(pictures)]
    plain, neon = (np.stack(looks) for looks in zip(*(both_looks(scene, rng) for scene in scenes), strict=True))
    labels = torch.tensor([SHAPES.index(scene.shape) for scene in scenes])
    network = build_network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=peak, weight_decay=0.02)
    start = time.monotonic()
    for step in range(steps):
        rate = peak * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimizer.param_groups[0]["lr"] = rate
        rows = rng.integers(0, pictures, batch)
        # A third each: plain, blended, neon.
        share = np.clip(rng.uniform(-1, 2, (batch, 1, 1, 1)), 0, 1).astype(np.float32)
        pixels = torch.from_numpy(plain[rows] * (1 - share) + neon[rows] * share).permute(0, 3, 1, 2) / 127.5 - 1
        loss = F.cross_entropy(network(augment(pixels)), labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            print(f"judge {step + 1}/{steps} loss {loss.item():.4f} {time.monotonic() - start:.0f} s", flush=True)
    return network.eval()


def both_looks(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Plain and neon picture of the scene with the same jitter of the shape, uint8 (SIZE, SIZE, 3)."""
    seed = int(rng.integers(2**31))
    plain, neon = (np.asarray(look(scene, np.random.default_rng(seed))) for look in (draw, draw_neon))
    return plain, neon


def augment(pixels: torch.Tensor) -> torch.Tensor:
    """Moved, turned, bent, smoothed, brighter or darker, noisy: what a diffusion model may make of a shape."""
    count = len(pixels)
    angle, zoom = torch.empty(count).uniform_(-0.15, 0.15), torch.empty(count).uniform_(0.85, 1.15)
    turn = torch.stack([zoom * angle.cos(), -zoom * angle.sin(), zoom * angle.sin(), zoom * angle.cos()], dim=1)
    affine = torch.cat([turn.view(count, 2, 2), torch.empty(count, 2, 1).uniform_(-0.15, 0.15)], dim=2)
    bend = F.interpolate(torch.randn(count, 2, 6, 6) * 0.03, size=SIZE, mode="bicubic", align_corners=True)
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False) + bend.permute(0, 2, 3, 1)
    pixels = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    small = F.interpolate(pixels, size=int(torch.randint(24, SIZE + 1, ())), mode="area")
    smooth = F.interpolate(small, size=SIZE, mode="bilinear", align_corners=False)
    pixels = torch.where(torch.rand(count, 1, 1, 1) < 0.5, smooth, pixels)
    gain, shift = torch.empty(count, 1, 1, 1).uniform_(0.7, 1.2), torch.empty(count, 3, 1, 1).uniform_(-0.15, 0.15)
    noise = torch.randn(pixels.shape) * torch.rand(count, 1, 1, 1) * 0.12
    return (pixels * gain + shift + noise).clamp(-1, 1)


def check(pictures: int = 600) -> None:
    """Print how often each judgement is right on fresh pictures of both looks, and the style scores."""
    rng = np.random.default_rng(11)
    for look in (draw, draw_neon):
        scenes = [random_scene(rng) for _ in range(pictures)]
        images = [look(scene, rng) for scene in scenes]
        judged = {
            "background": [background_colour(image, neon=look is draw_neon) for image in images],
            "object colour": [object_colour(image) for image in images],
            "shape": [shape(image) for image in images],
        }
        parts = []
        for name, values in judged.items():
            truth = [getattr(scene, name.split()[-1]) for scene in scenes]
            parts.append(f"{name} {100 * np.mean(np.array(values) == np.array(truth)):.1f} %")
        for score in (hollowness, darkness, neon_style):
            values = [score(i) for i in images]
            low, high = np.quantile(values, (0.05, 0.95))
            parts.append(f"{score.__name__} {np.mean(values):.3f} ({low:.3f} to {high:.3f})")
        print(f"{look.__name__}: " + ", ".join(parts))


if __name__ == "__main__":
    main()
