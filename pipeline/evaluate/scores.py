"""The metrics of samples and of the pictures that they should be like, from embeddings and perceptual hashes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from pipeline.dataset.duplicates import are_near, likeness
from pipeline.evaluate.clip import Clip, clip_score, style_shift
from pipeline.evaluate.similarity import Match, cmmd, diversity, mean_similarity, nearest, paired_distance


class Embedder(Protocol):
    """A model of pictures."""

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit embeddings, (N, D)."""


@dataclass(frozen=True)
class Gallery:
    """All pictures that are compared. Samples of base and adapter correspond: the same prompts and seeds in the same order."""

    prompts: Sequence[str]  # of the samples, one each
    base: Sequence[Image.Image]
    adapted: Sequence[Image.Image]
    train: Sequence[Image.Image]  # pictures that were trained on
    held_out: Sequence[Image.Image]
    plain_base: Sequence[Image.Image] = ()  # samples of prompts without the trigger
    plain_adapted: Sequence[Image.Image] = ()


def clip_metrics(clip: Clip, gallery: Gallery) -> tuple[dict[str, float], list[Match]]:
    """All that CLIP's embeddings tell, and each sample's nearest training picture."""
    texts, train = clip.texts(gallery.prompts), clip.images(gallery.train)
    held_out = clip.images(gallery.held_out) if gallery.held_out else train[:0]
    data = torch.cat([train, held_out])
    sides = {"base_": clip.images(gallery.base), "": clip.images(gallery.adapted)}
    metrics: dict[str, float] = {}
    matches: list[Match] = []
    for prefix, samples in sides.items():
        metrics[f"{prefix}clip_score"] = clip_score(samples, texts)
        if len(held_out):
            metrics[f"{prefix}clip_similarity"] = mean_similarity(samples, held_out)
        if len(samples) > 1 and len(data) > 1:
            distance = cmmd(samples, data)
            metrics[f"{prefix}cmmd"] = distance.value
            if not prefix:
                metrics |= {"cmmd_low": distance.low, "cmmd_high": distance.high}
        groups = [
            samples[[i for i, p in enumerate(gallery.prompts) if p == prompt]] for prompt in dict.fromkeys(gallery.prompts)
        ]
        if any(len(group) > 1 for group in groups):
            metrics[f"{prefix}diversity"] = diversity(groups)
        matches = nearest(samples, train)
        metrics[f"{prefix}nearest_similarity"] = sum(m.cosine for m in matches) / len(matches)
    metrics["style_shift"] = style_shift(sides["base_"], sides[""], train)
    if gallery.plain_base:
        plain_base, plain = clip.images(gallery.plain_base), clip.images(gallery.plain_adapted)
        metrics |= {"drift": paired_distance(plain_base, plain), "leak": style_shift(plain_base, plain, train)}
    return metrics, matches


def dino_metrics(dino: Embedder, gallery: Gallery) -> dict[str, float]:
    """How much samples look like the pictures held out; empty where none are."""
    if not gallery.held_out:
        return {}
    held_out = dino.images(gallery.held_out)
    return {
        "base_dino_similarity": mean_similarity(dino.images(gallery.base), held_out),
        "dino_similarity": mean_similarity(dino.images(gallery.adapted), held_out),
    }


def copies(samples: Sequence[Image.Image], pictures: Sequence[Image.Image]) -> list[tuple[int, int]]:
    """(sample, picture) where the sample is a near-duplicate of the picture, by the dataset's own measure of them."""
    known = [likeness(picture) for picture in pictures]
    found = []
    for i, sample in enumerate(samples):
        mine = likeness(sample)
        found += [(i, j) for j, theirs in enumerate(known) if are_near(mine, theirs)][:1]
    return found
