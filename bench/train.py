"""How much the training loop costs beside the bare step, on the embedded base.

    python bench/train.py [--steps 40]        # two minutes on two cores; needs `python cli.py run` to have encoded the demo

*Bare* is the denoiser's forward and backward and the optimiser on tensors at hand: nothing could be faster on this
hardware. *Uncached* is the loop of the usual example script at the same settings: it runs the VAE and the text encoder in
every step. The three take turns, block by block, so that a drift of the machine's speed falls on all of them alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from pipeline import lora  # noqa: E402
from pipeline.batches import Batches  # noqa: E402
from pipeline.config import load_params  # noqa: E402
from pipeline.encodings import Encodings  # noqa: E402
from pipeline.families import family  # noqa: E402
from pipeline.model_source import LocalModel  # noqa: E402
from pipeline.optim import adamw  # noqa: E402
from pipeline.train import Hardware, train  # noqa: E402

CPU = torch.device("cpu")
BLOCKS = 5


def main() -> None:
    """Print the ratios and write them to bench/results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="steps of each kind, in blocks")
    args = parser.parse_args()
    steps = max(1, args.steps // BLOCKS)
    kinds = {"ours": ours(steps), "bare": bare(steps), "uncached": uncached(steps)}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for block in range(BLOCKS + 1):  # the first block warms up
        for name, run in kinds.items():
            start = time.perf_counter()
            run()
            if block:
                seconds[name].append((time.perf_counter() - start) / steps)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "milliseconds_per_step": {name: round(1000 * value, 1) for name, value in medians.items()},
        "ours_to_bare": ratio(seconds["ours"], seconds["bare"]),
        "uncached_to_ours": ratio(seconds["uncached"], seconds["ours"]),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    print(json.dumps(result, indent=2))
    out = ROOT / "bench" / "results"
    out.mkdir(exist_ok=True)
    (out / "train.json").write_text(json.dumps(result, indent=2) + "\n")


def ratio(a: list[float], b: list[float]) -> dict[str, float]:
    """Block by block: the median, and the least and the greatest."""
    pairs = [x / y for x, y in zip(a, b, strict=True)]
    return {"median": round(statistics.median(pairs), 3), "min": round(min(pairs), 3), "max": round(max(pairs), 3)}


def setting() -> tuple[LocalModel, torch.nn.Module, Batches, list[torch.nn.Parameter]]:
    """The demo's base with a fresh adapter, and its data."""
    params = load_params(ROOT / "params.yaml")
    model = LocalModel(ROOT / params.model.base, None, None)
    denoiser = family("sd").load_denoiser(model, torch.float32)
    parameters = lora.inject(denoiser, lora.LoraSpec(**params.lora.model_dump(exclude={"init_from", "text_encoder"})), 0)
    batches = Batches(Encodings(ROOT / "build" / "encoded"), params.train.batch_size, 0, params.train.caption_dropout)
    return model, denoiser.train(), batches, parameters


def ours(steps: int) -> Callable[[], None]:
    """`pipeline.train.train` itself, start-up and last checkpoint included."""
    params = load_params(ROOT / "params.yaml")

    def run() -> None:
        model, denoiser, batches, _ = setting()
        settings = params.train.model_copy(update={"steps": steps, "warmup_steps": 0})
        with TemporaryDirectory() as work:
            train(
                denoiser,
                family("sd"),
                family("sd").objective(model),
                batches,
                settings,
                Hardware(CPU, None, 1000, 1),
                Path(work),
                lambda: False,
                lambda saved: None,
                lambda rows: None,
            )

    return run


def bare(steps: int) -> Callable[[], None]:
    """Forward, backward, optimiser; the batch is made beforehand."""
    model, denoiser, batches, parameters = setting()
    kind, objective = family("sd"), family("sd").objective(model)
    optimiser = adamw(parameters, 1e-4, 0.01)
    batch = batches.batch(0, 0, batches.batch_size)
    t = objective.timesteps(batch.u)
    x_t, target = objective.noised(batch.x_0, batch.noise, t), objective.target(batch.x_0, batch.noise, t)

    def run() -> None:
        for _ in range(steps):
            torch.nn.functional.mse_loss(kind.predict(denoiser, x_t, t, batch.text, batch.geometry), target).backward()
            optimiser.step()
            optimiser.zero_grad()

    return run


def uncached(steps: int) -> Callable[[], None]:
    """VAE and text encoder in every step, as the example scripts do."""
    model, denoiser, batches, parameters = setting()
    kind, objective = family("sd"), family("sd").objective(model)
    vae, text = kind.load_vae(model, CPU, torch.float32), kind.load_text_encoders(model, CPU)
    optimiser = adamw(parameters, 1e-4, 0.01)
    side = batches.samples[0].size
    pixels = torch.rand(batches.batch_size, 3, side[1], side[0]) * 2 - 1

    def run() -> None:
        for _ in range(steps):
            captions = [sample.captions[0] for sample in batches.members(0)]
            with torch.no_grad():
                posterior = kind.encode_pixels(vae, pixels)
                x_0 = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
                cond = kind.encode_captions(text, captions, chunks=1, clip_skip=0)
            noise, t = torch.randn_like(x_0), torch.randint(0, 1000, (len(x_0),))
            predicted = kind.predict(denoiser, objective.noised(x_0, noise, t), t, cond, torch.zeros(len(x_0), 6))
            torch.nn.functional.mse_loss(predicted, objective.target(x_0, noise, t)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            optimiser.zero_grad()

    return run


if __name__ == "__main__":
    main()
