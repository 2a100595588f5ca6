"""Every metric that validate can measure: what it means, and which way is better. A table, without torch.

The base's own value of a metric, where there is one, is measured under the same name with `base_` before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Definition:
    """One metric."""

    better: Literal["lower", "higher", "neither"]
    meaning: str
    of_base: bool = False  # whether the base's own value is measured too


DEFINITIONS: dict[str, Definition] = {
    "held_out_loss": Definition("lower", "mean squared error on pictures held out, over fixed timesteps and noise", True),
    "held_out_loss_ratio": Definition("lower", "held_out_loss as a share of the base's"),
    "train_loss": Definition("lower", "the same on pictures that were trained on", True),
    "train_loss_ratio": Definition("lower", "train_loss as a share of the base's"),
    "overfitting_gap": Definition("lower", "held_out_loss_ratio − train_loss_ratio: what was learned of the pictures alone"),
    "clip_score": Definition("higher", "100 · cosine of sample and prompt in CLIP's space (Hessel et al. 2021)", True),
    "style_shift": Definition("higher", "how far samples moved from the base's to the training pictures: 0 not, 1 all the way"),
    "clip_similarity": Definition("higher", "mean cosine of samples and held-out pictures in CLIP's space (CLIP-I)", True),
    "dino_similarity": Definition("higher", "the same in DINO's space, which tells subjects apart better than CLIP's", True),
    "cmmd": Definition(
        "lower", "distance of the samples' distribution from the data's (Jayasumana et al. 2024), unbiased", True
    ),
    "cmmd_low": Definition("neither", "lower end of its 90 % bootstrap interval"),
    "cmmd_high": Definition("lower", "upper end of its 90 % bootstrap interval"),
    "diversity": Definition("higher", "1 − mean cosine of one prompt's samples under different seeds", True),
    "memorised_share": Definition("lower", "share of samples that are near-duplicates of a training picture"),
    "nearest_similarity": Definition("lower", "mean cosine of each sample and its nearest training picture", True),
    "drift": Definition("lower", "1 − mean cosine of base's and adapter's samples of prompts without the trigger"),
    "leak": Definition("lower", "style_shift on prompts without the trigger: 0 where the style waits for its word"),
}
NAMES = (*DEFINITIONS, *(f"base_{name}" for name, metric in DEFINITIONS.items() if metric.of_base))
