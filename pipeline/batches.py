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
    captions: tuple[str, ...]  # those that `text` embeds; "" where a caption was dropped
    x_0: Tensor  # (B, C, h, w), a fresh draw from each posterior
    noise: Tensor  # (B, C, h, w)
    u: Tensor  # (B,), uniform on [0, 1), float64: the timestep before the objective maps it
    text: Entry  # named embeddings, each (B, …)
    geometry: Tensor  # (B, 6)
    mask: Tensor | None  # (B, 1, h, w) in [0, 1]: where the loss counts; None: everywhere, in all of them
    weight: Tensor  # (B,): what each sample's loss counts


class Batches:
    """The training batches of all steps.

    An epoch shows every sample as often as its `repeats` say, and as many regularisation pictures as others, if there are
    any. Samples of one size share batches; the last batch of a size holds what is left and may be smaller, nothing is
    dropped.
    """

    def __init__(
        self, encodings: Encodings, batch_size: int, seed: int, caption_dropout: float = 0.0, prior_weight: float = 1.0
    ) -> None:
        self.encodings = encodings
        self.samples = encodings.samples("train")
        self.batch_size, self.seed, self.caption_dropout, self.prior_weight = batch_size, seed, caption_dropout, prior_weight
        self._shown = [i for i, s in enumerate(self.samples) for _ in range(s.repeats) if not s.regularisation]
        self._prior = [i for i, s in enumerate(self.samples) for _ in range(s.repeats) if s.regularisation]
        self.steps_per_epoch = sum(-(-len(members) // batch_size) for members in self._by_size(self._of_epoch(0)))
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def members(self, step: int) -> list[EncodedSample]:
        """The samples of a step's global batch, in order."""
        epoch, at = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, plan_epoch(self._by_size(self._of_epoch(epoch)), self.batch_size, self.seed, epoch))
        return [self.samples[i] for i in self._epoch[1][at]]

    def _of_epoch(self, epoch: int) -> list[int]:
        """Indices into `samples`. The regularisation pictures' turn goes round, size by size, so that every epoch has the
        same number of each size and in time every picture is shown."""
        if not self._prior:
            return self._shown
        chosen = []
        for members in self._by_size(self._prior):
            count = max(1, round(len(self._shown) * len(members) / len(self._prior)))
            chosen += [members[(epoch * count + k) % len(members)] for k in range(count)]
        return [*self._shown, *chosen]

    def _by_size(self, indices: Sequence[int]) -> list[list[int]]:
        """Indices into `samples`, those of one size together, sizes in the order of their first appearance."""
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i in indices:
            groups[self.samples[i].size].append(i)
        return list(groups.values())

    def batch(self, step: int, start: int, stop: int) -> Batch:
        """Positions [start, stop) of a step's global batch."""
        members = self.members(step)[start:stop]
        positions = range(start, start + len(members))
        sides = [self._side(s, step, p) for s, p in zip(members, positions, strict=True)]
        latents = self.encodings.read_many([s.latents[side] for s, side in zip(members, sides, strict=True)])
        chosen = [self._caption(s, step, p) for s, p in zip(members, positions, strict=True)]
        texts = [self.encodings.text(key) for _, key in chosen]
        shape = tuple(latents[0]["mean"].shape)
        posterior = _normal(self.seed, Purpose.POSTERIOR, step, positions, shape)
        mean, std = (torch.stack([entry[part].float() for entry in latents]) for part in ("mean", "std"))
        return Batch(
            ids=tuple(s.id for s in members),
            captions=tuple(caption for caption, _ in chosen),
            x_0=mean + std * posterior,
            noise=_normal(self.seed, Purpose.NOISE, step, positions, shape),
            u=torch.tensor([draw(self.seed, Purpose.TIMESTEP, step, p).random() for p in positions], dtype=torch.float64),
            text={part: torch.stack([t[part] for t in texts]) for part in texts[0]},
            geometry=torch.stack([entry["geometry"] for entry in latents]),
            mask=self._masks(members, sides, shape) if any(s.masks for s in members) else None,
            weight=torch.tensor([self.prior_weight if s.regularisation else 1.0 for s in members]),
        )

    def _side(self, sample: EncodedSample, step: int, position: int) -> int:
        """0 for the picture, 1 for its mirror image."""
        if len(sample.latents) == 1:
            return 0
        return int(draw(self.seed, Purpose.FLIP, step, position).integers(len(sample.latents)))

    def _masks(self, members: Sequence[EncodedSample], sides: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        everywhere = torch.ones(1, *shape[1:])
        pairs = zip(members, sides, strict=True)
        return torch.stack([self.encodings.read(s.masks[side])["mask"] if s.masks else everywhere for s, side in pairs])

    def _caption(self, sample: EncodedSample, step: int, position: int) -> tuple[str, str]:
        """A caption and its key: one of the variants, or the empty one."""
        if self.caption_dropout and draw(self.seed, Purpose.CAPTION_DROPOUT, step, position).random() < self.caption_dropout:
            return "", self.encodings.index.empty_text
        chosen = 0
        if len(sample.texts) > 1:
            chosen = int(draw(self.seed, Purpose.CAPTION_VARIANT, step, position).integers(len(sample.texts)))
        return sample.captions[chosen], sample.texts[chosen]


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
