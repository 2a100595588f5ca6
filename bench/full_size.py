"""The whole pipeline on a base of full size with random weights: seconds and GPU memory of each stage.

    python bench/full_size.py sd15                 # 512², on a GPU; half a minute to make the base, 2.1 GB on disk
    python bench/full_size.py sdxl                 # 1024², 7 GB on disk
    python bench/full_size.py tiny --device cpu    # the same on the embedded base, to try the script

The weights are noise, so the pictures are too: what is shown is that it runs, how long it takes and what it takes up. GPU memory is
what the driver reports of the whole card, asked ten times a second. Written to `bench/results/full-size-*.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "bench")]

import torch  # noqa: E402
from data import draw  # noqa: E402
from project import Project, copy_of_what_is_tracked  # noqa: E402
from train import SIZES  # noqa: E402

from stages import STAGES  # noqa: E402

PICTURES = 24
RESOLUTION = {"tiny": 64, "sd15": 512, "sdxl": 1024}


def main() -> None:
    """Make the base, run the stages one by one, print and keep what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=list(RESOLUTION))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="bf16")
    parser.add_argument("--quantise", choices=("int8", "nf4"))
    parser.add_argument("--validate-dtype", choices=("float32", "float16", "bfloat16"), default="float16")
    args = parser.parse_args()
    with TemporaryDirectory() as temporary:
        project = lay_out(Path(temporary) / "project", args)
        stages: dict[str, dict[str, float]] = {}
        for stage in STAGES:
            with Card(args.device) as card:
                start = time.perf_counter()
                done = project.dvc("repro", "-s", stage)
            if done.returncode:
                sys.exit(done.stdout + done.stderr)
            stages[stage] = {"seconds": round(time.perf_counter() - start, 1), "GPU MiB": card.most}
            print(stage, stages[stage], flush=True)
            print("\n".join(line for line in done.stdout.splitlines() if "steps/s" in line or "pictures/s" in line), flush=True)
        metrics = json.loads(project.path("reports/validate/metrics.json").read_text())
    result: dict[str, Any] = {
        "machine": torch.cuda.get_device_name() if args.device != "cpu" else f"{os.cpu_count()} cores",
        "torch": torch.__version__,
        "size": args.size,
        "precision": args.precision,
        "quantised": args.quantise,
        "steps": args.steps,
        "pictures": PICTURES,
        "stages": stages,
        "held-out loss, base and adapter": [metrics["base_held_out_loss"], metrics["held_out_loss"]],
    }
    print(json.dumps(result, indent=2))
    out = ROOT / "bench" / "results" / f"full-size-{args.size}.json"
    out.write_text(json.dumps(result, indent=2) + "\n")


def lay_out(root: Path, args: argparse.Namespace) -> Project:
    """A project with a base of full size."""
    copy_of_what_is_tracked(root)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    project, side = Project(root), RESOLUTION[args.size]
    draw(root / "data", PICTURES, side=side)
    # in a process of its own, which leaves nothing on the card
    code = f"import full_size; full_size.make_base(full_size.Path({str(root / 'base')!r}), {args.size!r}, {args.device!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "bench", check=True)
    project.set("dataset", path="data", resolution=side)
    project.set("model", family="sdxl" if args.size == "sdxl" else "sd", base="base", revision=None)
    project.set("lora", rank=16, alpha=16.0)
    train = {"steps": args.steps, "batch_size": 1, "learning_rate": 1e-4, "warmup_steps": 0, "mixed_precision": args.precision}
    project.set("train", **train, quantise_base=args.quantise)
    sampling = {"inference_steps": 20, "guidance_scale": 5.0, "batch_size": 1, "loss_samples": 4, "scales": [1.0]}
    project.set(
        "validate", **sampling, dtype=args.validate_dtype, prompts=["noise number 1", "noise number 2"], untriggered_prompts=[]
    )
    project.set("runtime", device=args.device)
    project.set("tracking", enabled=False)
    project.write(project.params() | {"gate": {}})
    return project


def make_base(folder: Path, size: str, device: str) -> None:
    """A base in the diffusers layout, in float16."""
    if size == "tiny":
        shutil.copytree(ROOT / "assets" / "tiny-sd", folder)
        return
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
    from tiny import clip_text_config, tokenizer
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    words = tokenizer(77)
    large = {"max_position_embeddings": 77, "vocab_size": 49408}
    first = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    second = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
    }
    blocks = (128, 256, 512, 512)

    def text(kind: Any, sizes: dict[str, int]) -> Any:
        config = clip_text_config(len(words))
        config.update({**large, **sizes})
        return kind(config)

    torch.manual_seed(0)
    with torch.device(device):
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel(sample_size=RESOLUTION[size] // 8, **SIZES[size]),
            "vae": AutoencoderKL(
                block_out_channels=blocks,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=4,
                sample_size=RESOLUTION[size],
                scaling_factor=0.13025 if size == "sdxl" else 0.18215,
            ),
            "text_encoder": text(CLIPTextModel, first),
        }
        if size == "sdxl":
            parts["text_encoder_2"] = text(CLIPTextModelWithProjection, second)
    parts = {name: part.to(torch.float16) for name, part in parts.items()}
    schedule = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "steps_offset": 1,
    }
    parts |= {"tokenizer": words, "scheduler": DDIMScheduler(**schedule)}
    if size == "sdxl":
        pipeline: Any = StableDiffusionXLPipeline(**parts, tokenizer_2=words)
    else:
        pipeline = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.save_pretrained(folder)


class Card(threading.Thread):
    """The most memory that was taken on the card, in MiB, while the block ran."""

    def __init__(self, device: str) -> None:
        super().__init__(daemon=True)
        self.most, self.device, self.ended = 0, device, threading.Event()

    def __enter__(self) -> Card:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()

    def run(self) -> None:
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while self.device != "cpu" and not self.ended.wait(0.1):
            told = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
            self.most = max(self.most, int(told[0]) if told else 0)


if __name__ == "__main__":
    main()
