"""Encodings -> training batches. Order and every draw are pure functions of (seed, step, position)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.encodings import EncodedSample, Encodings, Entry
from pipeline.randomness import Purpose, draw


@dataclass(frozen=True)
class Batch:
    """What one (micro-)batch trains on. All on the CPU, float32 but for `text` in its stored type."""

    ids: tuple[str, ...]
    x_0: Tensor  # (B, C, h, w), a fresh draw from each posterior
    noise: Tensor  # (B, C, h, w)
    u: Tensor  # (B,), uniform on [0, 1), float64: the timestep before the objective maps it
    text: Entry  # named embeddings, each (B, …)
    geometry: Tensor  # (B, 6)


class Batches:
    """The training batches of all steps.

    An epoch shows every sample once. Samples of one size share batches; the last batch of a size holds what is left and
    may be smaller, nothing is dropped.
    """

    def __init__(self, encodings: Encodings, batch_size: int, seed: int, caption_dropout: float = 0.0) -> None:
        self.encodings = encodings
        self.samples = encodings.samples("train")
        self.batch_size, self.seed, self.caption_dropout = batch_size, seed, caption_dropout
        self._empty = encodings.read(encodings.index.empty_text)
        self._by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, sample in enumerate(self.samples):
            self._by_size[sample.size].append(i)
        self.steps_per_epoch = sum(-(-len(members) // batch_size) for members in self._by_size.values())
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def members(self, step: int) -> list[EncodedSample]:
        """The samples of a step's global batch, in order."""
        epoch, at = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, plan_epoch(list(self._by_size.values()), self.batch_size, self.seed, epoch))
        return [self.samples[i] for i in self._epoch[1][at]]

    def batch(self, step: int, start: int, stop: int) -> Batch:
        """Positions [start, stop) of a step's global batch."""
        members = self.members(step)[start:stop]
        positions = range(start, start + len(members))
        latents = self.encodings.read_many([self._side(s, step, p) for s, p in zip(members, positions, strict=True)])
        texts = [self._text(s, step, p) for s, p in zip(members, positions, strict=True)]
        shape = tuple(latents[0]["mean"].shape)
        posterior = _normal(self.seed, Purpose.POSTERIOR, step, positions, shape)
        mean, std = (torch.stack([entry[part].float() for entry in latents]) for part in ("mean", "std"))
        return Batch(
            ids=tuple(s.id for s in members),
            x_0=mean + std * posterior,
            noise=_normal(self.seed, Purpose.NOISE, step, positions, shape),
            u=torch.tensor([draw(self.seed, Purpose.TIMESTEP, step, p).random() for p in positions], dtype=torch.float64),
            text={part: torch.stack([t[part] for t in texts]) for part in texts[0]},
            geometry=torch.stack([entry["geometry"] for entry in latents]),
        )

    def _side(self, sample: EncodedSample, step: int, position: int) -> str:
        """The key of the picture or of its mirror image."""
        if len(sample.latents) == 1:
            return sample.latents[0]
        return sample.latents[draw(self.seed, Purpose.FLIP, step, position).integers(len(sample.latents))]

    def _text(self, sample: EncodedSample, step: int, position: int) -> Entry:
        if self.caption_dropout and draw(self.seed, Purpose.CAPTION_DROPOUT, step, position).random() < self.caption_dropout:
            return self._empty
        return self.encodings.read(sample.text)


def plan_epoch(groups: Sequence[Sequence[int]], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Cut every group into batches after a shuffle, and shuffle the batches. Every member stands in exactly one batch."""
    rng = draw(seed, Purpose.ORDER, epoch)
    batches = []
    for members in groups:
        shuffled = [members[i] for i in rng.permutation(len(members))]
        batches += [shuffled[i : i + batch_size] for i in range(0, len(shuffled), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def _normal(seed: int, purpose: Purpose, step: int, positions: range, shape: tuple[int, ...]) -> Tensor:
    rows = [draw(seed, purpose, step, p).standard_normal(shape, dtype=np.float32) for p in positions]
    return torch.from_numpy(np.stack(rows))
