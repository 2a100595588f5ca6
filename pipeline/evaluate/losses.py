"""The loss over fixed timesteps and fixed noise: base and adapter are asked exactly the same questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.diffusion import Objective, on_device, stratified
from pipeline.encodings import EncodedSample, Encodings
from pipeline.families.base import Family
from pipeline.losses import mse_per_sample
from pipeline.progress import Bar
from pipeline.randomness import Purpose, draw

_SEED = 0  # frozen: the same noise for every adapter that is ever measured


@dataclass(frozen=True)
class Questions:
    """Which samples are noised how: every sample at every timestep."""

    samples: Sequence[EncodedSample]
    timesteps: int  # how many, spread evenly over the schedule


@torch.inference_mode()
def mean_loss(
    denoiser: nn.Module,
    family: Family,
    objective: Objective,
    encodings: Encodings,
    questions: Questions,
    batch_size: int,
    device: torch.device,
    check_stop: Callable[[], None],
    bar: Bar,
    encode: Callable[[Sequence[str]], dict[str, Tensor]] | None = None,
) -> float:
    """Mean squared error of the prediction, over samples × stratified timesteps.

    Noise is drawn for (sample's content, timestep), so that a sample's noise does not depend on which others are measured.
    The posterior's mean stands for x_0. The sum is taken in float64.

    Args:
        encode: captions -> embeddings, where text encoders carry an adapter; by default the stored embeddings are read.
    """
    u = stratified(questions.timesteps)
    pairs = sorted(
        ((s, i) for s in questions.samples for i in range(questions.timesteps)), key=lambda p: (p[0].size, p[0].id, p[1])
    )
    objective, total = on_device(objective, device), 0.0
    for start in range(0, len(pairs), batch_size):
        check_stop()
        chunk = list(pairs[start : start + batch_size])
        for group in _by_size(chunk):
            x_0 = torch.stack([encodings.read(s.latents[0])["mean"].float() for s, _ in group]).to(device)
            noise = torch.stack([_noise(s, i, tuple(x_0.shape[1:])) for s, i in group]).to(device)
            t = objective.timesteps(torch.stack([u[i] for _, i in group])).to(device)
            dtype = next(denoiser.parameters()).dtype
            if encode:
                text = encode([s.captions[0] for s, _ in group])
            else:
                texts = [encodings.text(s.texts[0]) for s, _ in group]
                text = {part: torch.stack([entry[part] for entry in texts]) for part in texts[0]}
            text = {part: values.to(device, dtype) for part, values in text.items()}
            geometry = torch.stack([encodings.read(s.latents[0])["geometry"] for s, _ in group]).to(device)
            predicted = family.predict(denoiser, objective.noised(x_0, noise, t).to(dtype), t, text, geometry)
            total += mse_per_sample(predicted, objective.target(x_0, noise, t)).cpu().double().sum().item()
        bar.advance(len(chunk))
    return total / len(pairs)


def spread(samples: list[EncodedSample], most: int) -> list[EncodedSample]:
    """At most `most` samples, spread evenly over the list, which is sorted by a content hash: an unbiased choice."""
    if len(samples) <= most:
        return samples
    return [samples[i * len(samples) // most] for i in range(most)]


def _noise(sample: EncodedSample, timestep: int, shape: tuple[int, ...]) -> Tensor:
    generator = draw(_SEED, Purpose.EVALUATION, timestep, int(sample.id, 16))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


def _by_size(pairs: Sequence[tuple[EncodedSample, int]]) -> list[list[tuple[EncodedSample, int]]]:
    sizes = sorted({s.size for s, _ in pairs})
    return [[p for p in pairs if p[0].size == size] for size in sizes]
