"""What the training loop costs beside the bare step, and beside a loop that caches nothing.

    make bench                       # three minutes on two cores; needs `python cli.py run` to have encoded the demo
    python bench/train.py --full sd15 --steps 10      # one network of full size, random weights, bf16: minutes a step on a CPU
    python bench/train.py --full sdxl --steps 10
    python bench/train.py --full sdxl --steps 100 --device cuda

*In any order* is `runtime.deterministic: false`, which matters on a GPU alone; the bare step there is so too.
*Bare* is the denoiser's forward and backward and the optimiser on tensors at hand: nothing could be faster on this hardware.
*Uncached* is the loop of the usual example script at the same settings: it decodes the picture and runs the VAE and the text
encoder in every step. They take turns, block by block, so that a drift of the machine's speed falls on all of them alike; each
block's first step is left out. On a GPU a block is timed as a whole: steps are asked for faster than they are done.
Written to `bench/results/train*.json`; compare ratios, not milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from pipeline import lora  # noqa: E402
from pipeline.batches import Batches  # noqa: E402
from pipeline.config import Train, load_params  # noqa: E402
from pipeline.device import pick_device  # noqa: E402
from pipeline.encodings import EncodedSample, Encodings, Index  # noqa: E402
from pipeline.families import family  # noqa: E402
from pipeline.files import write_json  # noqa: E402
from pipeline.model_source import LocalModel  # noqa: E402
from pipeline.optim import adamw  # noqa: E402
from pipeline.safetensors_file import write_safetensors  # noqa: E402
from pipeline.train import Hardware, train  # noqa: E402

CPU = torch.device("cpu")
BLOCKS = 5
# block_out_channels and the rest as the published configs have them
SIZES: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
LATENT = {"sd15": 64, "sdxl": 128}  # sides of a 512² and a 1024² picture


def main() -> None:
    """Print the ratios and write them to bench/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="steps of each kind, in blocks")
    parser.add_argument("--full", choices=list(SIZES))
    parser.add_argument("--device", default="cpu", help="of --full")
    parser.add_argument("--child", choices=["ours", "uncached", "start"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child)))
        return
    each = max(3, args.steps // BLOCKS)
    with TemporaryDirectory() as folder:
        if args.full:
            device = pick_device(args.device)
            network, batches = full_size(args.full, Path(folder), device)
            kinds = {
                "ours": ours(each, network, batches, args.full, device),
                "bare": bare(each, network, batches, args.full, device),
            }
            if device.type == "cuda":
                kinds["in any order"] = ours(each, network, batches, args.full, device, deterministic=False)
        else:
            kinds = {"ours": ours(each), "bare": bare(each), "uncached": uncached(each)}
        blocks: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(BLOCKS):
            for name, run in kinds.items():
                blocks[name].append(statistics.median(run()))
    result: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "milliseconds per step": {name: round(1000 * statistics.median(values), 1) for name, values in blocks.items()},
        "ours to bare": ratio(blocks["ours"], blocks["bare"]),
    }
    if args.full:
        result |= {"size": args.full, "peak MiB": round(peak_mib())}
        if device.type == "cuda":
            result["deterministic to any order"] = ratio(blocks["ours"], blocks["in any order"])
            result["machine"] = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    else:
        result |= {
            "uncached to ours": ratio(blocks["uncached"], blocks["ours"]),
            "peak MiB": {name: run_child(name)["mib"] for name in ("ours", "uncached")},
            "seconds from the command to the first step": run_child("start")["seconds"],
            "milliseconds for a batch of 8 from so many samples": batch_cost(),
        }
    print(json.dumps(result, indent=2))
    place = "" if args.device == "cpu" else f"-{args.device}"
    write_json(ROOT / "bench" / "results" / (f"train-{args.full}{place}.json" if args.full else "train.json"), result)


def ratio(a: list[float], b: list[float]) -> dict[str, float]:
    """Block by block: the median, and the least and the greatest."""
    pairs = [x / y for x, y in zip(a, b, strict=True)]
    return {"median": round(statistics.median(pairs), 3), "min": round(min(pairs), 3), "max": round(max(pairs), 3)}


def setting() -> tuple[LocalModel, torch.nn.Module, Batches]:
    """The demo's base with a fresh adapter, and its data."""
    params = load_params(ROOT / "params.yaml")
    model = LocalModel(ROOT / params.model.base, None, None)
    denoiser = family("sd").load_denoiser(model, torch.float32)
    lora.inject(denoiser, lora.LoraSpec(**params.lora.model_dump(exclude={"init_from", "text_encoder"})), 0)
    return model, denoiser.train(), Batches(Encodings(ROOT / "build" / "encoded"), params.train.batch_size, 0)


def full_size(name: str, folder: Path, device: torch.device = CPU, batch_size: int = 1) -> tuple[torch.nn.Module, Batches]:
    """A denoiser of full size with random weights in bf16, and as many random encodings as a batch needs."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device("meta"):
        empty = UNet2DConditionModel(sample_size=LATENT[name], **SIZES[name])
    network = empty.to(torch.bfloat16).to_empty(device=device).requires_grad_(False)
    for p in network.parameters():
        p.data.normal_(0, 0.02) if p.dim() > 1 else p.data.fill_(0.02)
    lora.inject(network, lora.LoraSpec(16, 16.0, 0.0, ("to_q", "to_k", "to_v", "to_out.0")), 0)
    side, width = LATENT[name], SIZES[name]["cross_attention_dim"]
    write_encodings(
        folder, 4 * batch_size, (4, side, side), {"hidden": (77, width), **({"pooled": (1280,)} if name == "sdxl" else {})}
    )
    return network.train(), Batches(Encodings(folder), batch_size, 0)


def write_encodings(folder: Path, count: int, latent: tuple[int, ...], text: dict[str, tuple[int, ...]]) -> None:
    """Random encodings of `count` samples, in shards like the real ones."""
    shapes: dict[str, tuple[int, ...]] = {"mean": latent, "std": latent, "geometry": (6,)}
    samples, size = [], latent[-1] * 8
    for start in range(0, count, 20_000):
        tensors = {}
        for i in range(start, min(count, start + 20_000)):
            tensors |= {f"{i:032x}.{part}": torch.rand(shape) for part, shape in shapes.items()}
            texts = (f"{i % 100 + 2**100:032x}",)
            samples.append(EncodedSample(f"{i:016x}", ("a",), "train", (size, size), (f"{i:032x}",), texts))
        write_safetensors(folder / f"latents-{start // 20_000:03d}.safetensors", tensors)
    keys = [f"{i + 2**100:032x}" for i in range(101)]
    write_safetensors(folder / "text-000.safetensors", {f"{k}.{p}": torch.rand(s) for k in keys for p, s in text.items()})
    index = Index("sd", "float32", 0, 1, keys[100], tuple(samples))
    write_json(folder / "index.json", index)


def ours(
    steps: int,
    denoiser: torch.nn.Module | None = None,
    batches: Batches | None = None,
    size: str | None = None,
    device: torch.device = CPU,
    **hardware: bool,
) -> Callable[[], list[float]]:
    """`pipeline.train.train` itself; it asks whether to stop once a step, which is what is timed."""
    from accelerate.state import AcceleratorState

    params = load_params(ROOT / "params.yaml")
    model = LocalModel(ROOT / params.model.base, None, None)

    def run() -> list[float]:
        AcceleratorState._reset_state(reset_partial_state=True)
        network, data = (denoiser, batches) if denoiser is not None else setting()[1:]
        assert data
        changes = {"steps": steps, "warmup_steps": 0, "batch_size": data.batch_size, "schedule": "constant"}
        settings = params.train.model_copy(update={**changes, "mixed_precision": "bf16" if size else "no"})
        times: list[float] = []

        def stop() -> bool:
            if len(times) in (1, steps - 1):
                wait_for(device)
            times.append(time.perf_counter())
            return False

        kind = family("sdxl" if size == "sdxl" else "sd")
        with TemporaryDirectory() as work:
            train(
                network,
                kind,
                family("sd").objective(model),
                data,
                Train(**settings.model_dump()),
                Hardware(device, None, 1000, 1, **hardware),
                Path(work),
                stop,
                lambda saved: None,
                lambda rows: None,
            )
        times.append(time.perf_counter())
        # the first step warms up, the last one saves
        if device.type == "cuda":
            return [(times[steps - 1] - times[1]) / (steps - 2)]
        return [times[i + 1] - times[i] for i in range(1, steps - 1)]

    return run


def bare(
    steps: int,
    denoiser: torch.nn.Module | None = None,
    batches: Batches | None = None,
    size: str | None = None,
    device: torch.device = CPU,
) -> Callable[[], list[float]]:
    """Forward, backward, optimiser; the batch is made beforehand."""
    params = load_params(ROOT / "params.yaml")
    model = LocalModel(ROOT / params.model.base, None, None)
    network, data = (denoiser, batches) if denoiser is not None and batches else setting()[1:]
    kind, objective = family("sdxl" if size == "sdxl" else "sd"), family("sd").objective(model)
    parameters = lora.trainable_parameters(network)
    optimiser = adamw(parameters, 1e-4, 0.01)
    batch, dtype = data.batch(0, 0, data.batch_size), next(network.parameters()).dtype
    t = objective.timesteps(batch.u)
    x_t, target = objective.noised(batch.x_0, batch.noise, t), objective.target(batch.x_0, batch.noise, t)
    x_t, target, t, geometry = x_t.to(device, dtype), target.to(device), t.to(device), batch.geometry.to(device)
    text = {part: values.to(device, dtype) for part, values in batch.text.items()}

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=size is not None):
            predicted = kind.predict(network, x_t, t, text, geometry)
        torch.nn.functional.mse_loss(predicted.float(), target).backward()
        optimiser.step()
        optimiser.zero_grad()

    return lambda: timed(step, steps, device)


def uncached(steps: int) -> Callable[[], list[float]]:
    """Picture, VAE and text encoder in every step, as the example scripts do."""
    model, denoiser, batches = setting()
    parameters = lora.trainable_parameters(denoiser)
    kind, objective = family("sd"), family("sd").objective(model)
    vae, text = kind.load_vae(model, CPU, torch.float32), kind.load_text_encoders(model, CPU)
    optimiser = adamw(parameters, 1e-4, 0.01)
    files = sorted((ROOT / load_params(ROOT / "params.yaml").dataset.path).glob("*.png"))
    captions = [file.with_suffix(".txt").read_text() for file in files]
    side, rng = batches.samples[0].size[0], np.random.default_rng(0)

    def step() -> None:
        chosen = rng.integers(0, len(files), batches.batch_size)
        pictures = [Image.open(files[i]).convert("RGB").resize((side, side), Image.Resampling.LANCZOS) for i in chosen]
        pixels = torch.stack([torch.from_numpy(np.asarray(p, np.float32) / 127.5 - 1).permute(2, 0, 1) for p in pictures])
        with torch.no_grad():
            posterior = kind.encode_pixels(vae, pixels)
            x_0 = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
            cond = kind.encode_captions(text, [captions[i] for i in chosen], chunks=1, clip_skip=0)
        noise, t = torch.randn_like(x_0), torch.randint(0, 1000, (len(x_0),))
        predicted = kind.predict(denoiser, objective.noised(x_0, noise, t), t, cond, torch.zeros(len(x_0), 6))
        torch.nn.functional.mse_loss(predicted, objective.target(x_0, noise, t)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return lambda: timed(step, steps)


def timed(step: Callable[[], None], count: int, device: torch.device = CPU) -> list[float]:
    """Seconds of each step but the first; on a GPU their mean."""
    times = []
    if device.type == "cuda":
        step()
        wait_for(device)
        start = time.perf_counter()
        for _ in range(count - 1):
            step()
        wait_for(device)
        return [(time.perf_counter() - start) / (count - 1)]
    for _ in range(count):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return times[1:]


def wait_for(device: torch.device) -> None:
    """For all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def batch_cost() -> dict[str, float]:
    """The data's part of a step as the dataset grows, order of the epoch included."""
    found = {}
    for count in (100, 100_000):
        with TemporaryDirectory() as folder:
            write_encodings(Path(folder), count, (4, 8, 8), {"hidden": (16, 32)})
            batches = Batches(Encodings(Path(folder)), 8, 0)
            steps = 13 * 100  # some epochs of the small one
            for step in range(20):
                batches.batch(step, 0, 8)
            start = time.perf_counter()
            for step in range(20, 20 + steps):
                batches.batch(step, 0, len(batches.members(step)))
            found[str(count)] = round(1000 * (time.perf_counter() - start) / steps, 3)
    return found


def run_child(what: str) -> dict[str, float]:
    """One measurement in a process of its own."""
    environment = {**os.environ, "BENCH_STARTED": str(time.time())}
    done = subprocess.run([sys.executable, __file__, "--child", what], check=True, stdout=subprocess.PIPE, env=environment)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def child(what: str) -> dict[str, float]:
    """Peak memory of ten steps, or the seconds until the first one."""
    if what == "start":
        ours(2)()
        return {"seconds": round(time.time() - float(os.environ["BENCH_STARTED"]), 2)}
    {"ours": ours, "uncached": uncached}[what](10)()
    return {"mib": round(peak_mib())}


def peak_mib() -> float:
    """Of this process, or of the GPU where that was used."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
