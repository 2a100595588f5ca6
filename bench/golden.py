"""Our training against the recipe of diffusers' own example script, by the loss on pictures that neither saw.

    python bench/golden.py --steps 300        # five minutes on two cores; needs `python cli.py run` to have encoded the demo

The recipe of `examples/text_to_image/train_text_to_image_lora.py`: rank 4 on the attention, gaussian initialisation, AdamW,
learning rate 1e-4, cosine schedule, clipping at 1, the VAE's posterior and the caption encoded anew in every step, noise and
timesteps from torch's generator. Ours is the same recipe in `params.yaml`'s terms. Both are judged by the held-out loss of
`pipeline.evaluate.losses` (fixed noise and timesteps), on three seeds; the difference in their draws is what is left.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from PIL import Image  # noqa: E402

from pipeline import lora  # noqa: E402
from pipeline.batches import Batches  # noqa: E402
from pipeline.config import Train, load_params  # noqa: E402
from pipeline.dataset.manifest import read_manifest  # noqa: E402
from pipeline.encodings import Encodings  # noqa: E402
from pipeline.evaluate.losses import Questions, mean_loss  # noqa: E402
from pipeline.families import family  # noqa: E402
from pipeline.files import write_json  # noqa: E402
from pipeline.model_source import LocalModel  # noqa: E402
from pipeline.progress import progress  # noqa: E402
from pipeline.train import Hardware, train  # noqa: E402

CPU = torch.device("cpu")
PARAMS = load_params(ROOT / "params.yaml")
MODEL, KIND = LocalModel(ROOT / PARAMS.model.base, None, None), family(PARAMS.model.family)
SPEC = lora.LoraSpec(4, 4.0, 0.0, ("to_q", "to_k", "to_v", "to_out.0"), init="gaussian")


def main() -> None:
    """Train both on every seed, print and keep the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    encodings = Encodings(ROOT / "build" / "encoded")
    rows = []
    for seed in range(args.seeds):
        row = {"seed": seed, "base": held_out(KIND.load_denoiser(MODEL, torch.float32), encodings)}
        row["example"] = held_out(example(args.steps, args.learning_rate, seed), encodings)
        row["ours"] = held_out(ours(args.steps, args.learning_rate, seed, encodings), encodings)
        rows.append(row)
        print(json.dumps(row), flush=True)
    means = {name: float(np.mean([row[name] for row in rows])) for name in ("base", "example", "ours")}
    result = {**vars(args), "runs": rows, "mean held-out loss": means, "ours to example": means["ours"] / means["example"]}
    print(json.dumps({k: v for k, v in result.items() if k != "runs"}, indent=2))
    write_json(ROOT / "bench" / "results" / "golden.json", result)


def ours(steps: int, rate: float, seed: int, encodings: Encodings) -> torch.nn.Module:
    """`pipeline.train.train`."""
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = Train(steps=steps, batch_size=PARAMS.train.batch_size, learning_rate=rate, schedule="cosine", seed=seed)
    denoiser = KIND.load_denoiser(MODEL, torch.float32)
    lora.inject(denoiser, SPEC, seed)
    batches = Batches(encodings, settings.batch_size, seed)
    with TemporaryDirectory() as work:
        train(
            denoiser,
            KIND,
            KIND.objective(MODEL),
            batches,
            settings,
            Hardware(CPU, None, 10_000, 1),
            Path(work),
            lambda: False,
            lambda saved: None,
            lambda rows: None,
        )
    return denoiser


def example(steps: int, rate: float, seed: int) -> torch.nn.Module:
    """The example script's loop, written from its description."""
    manifest = read_manifest(ROOT / "build" / "dataset")
    training = [s for s in manifest.samples if s.split == "train"]
    side = training[0].geometry.size[0]
    pictures = [Image.open(manifest.file(ROOT, s)).convert("RGB").resize((side, side)) for s in training]
    pixels = torch.stack([torch.from_numpy(np.asarray(p, np.float32) / 127.5 - 1).permute(2, 0, 1) for p in pictures])
    vae, text = KIND.load_vae(MODEL, CPU, torch.float32), KIND.load_text_encoders(MODEL, CPU)
    denoiser, objective = KIND.load_denoiser(MODEL, torch.float32), KIND.objective(MODEL)
    torch.manual_seed(seed)
    parameters = lora.inject(denoiser, SPEC, seed)
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-2)
    denoiser.train()
    size, order = PARAMS.train.batch_size, []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        if len(order) < size:
            order += torch.randperm(len(training)).tolist()
        chosen, order = order[:size], order[size:]
        with torch.no_grad():
            posterior = KIND.encode_pixels(vae, pixels[chosen])
            x_0 = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
            cond = KIND.encode_captions(text, [training[i].captions[0] for i in chosen], 1, 0)
        noise, t = torch.randn_like(x_0), torch.randint(0, 1000, (size,))
        predicted = KIND.predict(denoiser, objective.noised(x_0, noise, t), t, cond, torch.zeros(size, 6))
        torch.nn.functional.mse_loss(predicted, objective.target(x_0, noise, t)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
    return denoiser


def held_out(denoiser: torch.nn.Module, encodings: Encodings) -> float:
    """The loss on the pictures held out."""
    questions = Questions(encodings.samples("held-out"), 16)
    with progress("", 0, "") as bar:
        return mean_loss(denoiser.eval(), KIND, KIND.objective(MODEL), encodings, questions, 24, CPU, lambda: None, bar)


if __name__ == "__main__":
    main()
