"""Measure what the demo's adapter learned, apart from the pipeline: style from pixels, shape and colour by the judge.

    python cli.py run && python assets/check_demo.py        # about a minute and a half on two cores

The exported adapter is loaded in plain diffusers. Prompts name pairs of shape and colour that no training picture shows.
*Style moved* is (adapter − base) / (training pictures − base) of `judge.neon_style`, the mean over all pictures: 0 is the
base's look, 1 the training pictures'. Fails below 0.8, or when shape or colour are right in less than 80 %.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import judge
import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from make_demo_dataset import OUT as DATASET
from make_demo_dataset import UNSEEN_PAIRS, styled_caption
from PIL import Image
from world import BACKGROUNDS, POSITIONS, Scene

HERE = Path(__file__).resolve().parent
ADAPTER = HERE.parent / "dist" / "adapter"
BATCH = 12


def main() -> None:
    """Draw with and without the adapter, judge, print, fail if too little was learned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, default=ADAPTER, help="folder of pytorch_lora_weights.safetensors")
    parser.add_argument("--guidance", type=float, default=2.5, help="as in params.yaml")
    args = parser.parse_args()
    scenes = unseen_scenes()
    pipeline = StableDiffusionPipeline.from_pretrained(HERE / "tiny-sd", torch_dtype=torch.float32)
    base = generate(pipeline, scenes, args.guidance)
    pipeline.load_lora_weights(args.adapter, weight_name="pytorch_lora_weights.safetensors")
    adapted = generate(pipeline, scenes, args.guidance)
    training = [Image.open(path).convert("RGB") for path in sorted(DATASET.glob("*.png"))]
    styles = {name: float(np.mean([judge.neon_style(i) for i in of])) for name, of in
              (("base", base), ("adapter", adapted), ("training pictures", training))}  # fmt: skip
    moved = (styles["adapter"] - styles["base"]) / (styles["training pictures"] - styles["base"])
    shape = np.mean([judge.shape(i) == s.shape for i, s in zip(adapted, scenes, strict=True)])
    colour = np.mean([judge.object_colour(i) == s.colour for i, s in zip(adapted, scenes, strict=True)])
    print("neon style: " + ", ".join(f"{name} {value:.2f}" for name, value in styles.items()))
    print(f"style moved {moved:.0%} of the way; shape right {shape:.0%}, colour right {colour:.0%} of {len(scenes)} pictures")
    sys.exit(0 if moved >= 0.8 and shape >= 0.8 and colour >= 0.8 else 1)


def unseen_scenes() -> list[Scene]:
    """Each unseen pair of shape and colour four times, over all backgrounds and positions."""
    rng = np.random.default_rng(7)
    backgrounds, positions = rng.permutation(list(BACKGROUNDS) * 8), rng.permutation(list(POSITIONS) * 10)
    return [
        Scene(shape, colour, str(backgrounds[i]), "large", str(positions[i]))
        for i, (shape, colour) in enumerate(UNSEEN_PAIRS * 4)
    ]


def generate(pipeline: StableDiffusionPipeline, scenes: list[Scene], guidance: float) -> list[Image.Image]:
    """One picture a scene, the seed its place in the list."""
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for start in range(0, len(scenes), BATCH):
        part = scenes[start : start + BATCH]
        images += pipeline(
            [styled_caption(scene) for scene in part],
            num_inference_steps=25,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(part))],
        ).images
    return images


if __name__ == "__main__":
    main()
