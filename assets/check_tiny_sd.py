"""Measure how well the embedded base `assets/tiny-sd/` obeys its captions, and fail if it does so too rarely.

    python assets/check_tiny_sd.py                            # about three minutes on one core
    python assets/check_tiny_sd.py --sheet assets/tiny-sd/samples.png

Captions are drawn from the grammar with a fixed seed: half of them name a combination of shape, colour and background
that the base was trained on, half one that it never saw. `judge.py` says what the pictures show.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import judge
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from world import SIZE, Scene, is_held_out, random_caption, random_scene

BASE = Path(__file__).resolve().parent / "tiny-sd"
# Attribute: its judge and the least accuracy over all captions.
JUDGES: dict[str, tuple[Callable[[Image.Image], str], float]] = {
    "background": (judge.background_colour, 0.95),
    "colour": (judge.object_colour, 0.95),
    "shape": (judge.shape, 0.85),
}


def main() -> None:
    """Generate, judge, print the table, write the sheet if asked; exit status 1 if an accuracy is too low."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--captions", type=int, default=160)
    parser.add_argument("--steps", type=int, default=25, help="DDIM steps")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--sheet", type=Path, help="write a PNG of the first 24 pictures here")
    args = parser.parse_args()
    scenes, captions = draw_captions(args.captions)
    start = time.monotonic()
    images = generate(args.base, captions, args.steps, args.guidance)
    print(f"{len(images)} pictures, {args.steps} steps, guidance {args.guidance:g}: {time.monotonic() - start:.0f} s")
    if args.sheet:
        contact_sheet(images[:24]).save(args.sheet, optimize=True)
    sys.exit(0 if report(scenes, images) else 1)


def draw_captions(count: int, seed: int = 30) -> tuple[list[Scene], list[str]]:
    """Scenes and captions, alternately of seen and held-out combinations."""
    rng = np.random.default_rng(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        if is_held_out(scene := random_scene(rng)) == bool(len(scenes) % 2):
            scenes.append(scene)
    return scenes, [random_caption(scene, rng) for scene in scenes]


def generate(base: Path, captions: list[str], steps: int, guidance: float, batch: int = 20) -> list[Image.Image]:
    """One picture a caption; caption i starts from the noise of seed i, whatever the batch."""
    pipeline = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for i in range(0, len(captions), batch):
        part = captions[i : i + batch]
        generators = [torch.Generator().manual_seed(i + j) for j in range(len(part))]
        images += pipeline(part, num_inference_steps=steps, guidance_scale=guidance, generator=generators).images
    return images


def report(scenes: list[Scene], images: list[Image.Image]) -> bool:
    """Print accuracies of seen, held-out and all captions; whether all of them are high enough."""
    held_out = np.array([is_held_out(scene) for scene in scenes])
    groups = {"seen": ~held_out, "held out": held_out, "all": np.ones(len(scenes), bool)}
    print(f"{'':12}" + "".join(f"{f'{name} ({rows.sum()})':>16}" for name, rows in groups.items()) + "    at least")
    good = True
    everything = np.ones(len(scenes), bool)
    for attribute, (says, least) in JUDGES.items():
        right = np.array([says(image) == getattr(s, attribute) for image, s in zip(images, scenes, strict=True)])
        print(row(attribute, right, groups) + f"{least:>12.0%}")
        everything &= right
        good &= bool(right.mean() >= least)
    print(row("all three", everything, groups))
    return good


def row(name: str, right: np.ndarray, groups: dict[str, np.ndarray]) -> str:
    """A line of the table."""
    return f"{name:12}" + "".join(f"{right[rows].mean():>16.1%}" for rows in groups.values())


def contact_sheet(images: list[Image.Image], columns: int = 8, gap: int = 2) -> Image.Image:
    """The pictures in rows, on white."""
    step = SIZE + gap
    lines = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * step - gap, lines * step - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * step, i // columns * step))
    return sheet


if __name__ == "__main__":
    main()
