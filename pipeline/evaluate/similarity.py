"""What pictures' embeddings tell: likeness, spread, distance of distributions, copies. Pure functions of unit vectors.

Shapes: N samples, M pictures of the data, D dimensions; embeddings have length 1. All sums are taken in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_BANDWIDTH, _SCALE = 10.0, 1000.0  # of CMMD's kernel; Jayasumana et al. 2024 (arXiv 2401.09603), section 4
_RESAMPLES, _INTERVAL = 1000, 0.9
_SEED = 0  # of the bootstrap: the same interval every time


def mean_similarity(samples: Tensor, pictures: Tensor) -> float:
    """Mean cosine over all pairs: CLIP-I and DINO of Ruiz et al. 2023 (DreamBooth, arXiv 2208.12242), section 4.2. (N, D), (M, D)."""
    return float((samples.double() @ pictures.double().T).mean())


def paired_distance(a: Tensor, b: Tensor) -> float:
    """1 − the mean cosine of rows that belong together, (N, D) each."""
    return float(1 - (a.double() * b.double()).sum(dim=-1).mean())


def diversity(groups: Sequence[Tensor]) -> float:
    """1 − the mean cosine of different members of a group, the mean over groups of at least two; (n, D) each."""
    spreads = []
    for group in groups:
        cosines = group.double() @ group.double().T
        n = len(group)
        if n > 1:
            spreads.append(1 - (cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1)))
    return float(torch.stack(spreads).mean())


@dataclass(frozen=True)
class Interval:
    """An estimate and its bootstrap interval."""

    value: float
    low: float
    high: float


def cmmd(samples: Tensor, pictures: Tensor) -> Interval:
    """1000 · MMD² between two sets of embeddings under the kernel exp(−‖x − y‖² / 2σ²), σ = 10; Jayasumana et al. 2024, eq. 4.

    The estimator is the unbiased one (Gretton et al. 2012, eq. 3): a few dozen pictures do, and equal distributions give 0 on
    average, now and then a little less. The interval is the percentile bootstrap's over samples and pictures, of the estimator
    that leaves out pairs of a picture with its own copy.

    Args:
        samples, pictures: (N, D) and (M, D), at least two each.
    """
    x, y = samples.double(), pictures.double()
    xx, yy, xy = _kernel(x, x).numpy(), _kernel(y, y).numpy(), _kernel(x, y).numpy()
    rng = np.random.default_rng(_SEED)
    value = _mmd(xx, yy, xy, np.arange(len(x)), np.arange(len(y)))
    resampled = np.array(
        [_mmd(xx, yy, xy, rng.integers(0, len(x), len(x)), rng.integers(0, len(y), len(y))) for _ in range(_RESAMPLES)]
    )
    low, high = np.nanquantile(resampled, [(1 - _INTERVAL) / 2, (1 + _INTERVAL) / 2])
    return Interval(value, float(low), float(high))


@dataclass(frozen=True)
class Match:
    """A sample and the training picture that is most like it."""

    sample: int
    picture: int
    cosine: float


def nearest(samples: Tensor, pictures: Tensor) -> list[Match]:
    """For each sample its nearest picture, in the samples' order; (N, D), (M, D)."""
    cosines, places = (samples.double() @ pictures.double().T).max(dim=1)
    return [Match(i, int(p), float(c)) for i, (c, p) in enumerate(zip(cosines, places, strict=True))]


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return torch.exp(-torch.cdist(x, y).square() / (2 * _BANDWIDTH**2))


def _mmd(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray, i: np.ndarray, j: np.ndarray) -> float:
    """Means over pairs of different pictures; a bootstrap sample may hold one twice, which is no pair."""
    own = []
    for kernel, at in ((xx, i), (yy, j)):
        different = at[:, None] != at[None, :]
        own.append(kernel[np.ix_(at, at)][different].mean() if different.any() else np.nan)
    return float(_SCALE * (own[0] + own[1] - 2 * xy[np.ix_(i, j)].mean()))
