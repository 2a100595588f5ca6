"""All randomness of training: a pure function of (seed, purpose, step, position in the global batch).

A counter-based generator (Philox 4×64, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") is keyed by seed
and purpose and started at (step, position). There is no state to save, so a resumed, split or distributed run draws what
the plain run draws.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a number is drawn for; each has a stream of its own. Values are part of the results: never renumber."""

    ORDER = 1
    NOISE = 2
    TIMESTEP = 3
    POSTERIOR = 4
    FLIP = 5
    CAPTION_DROPOUT = 6
    EVALUATION = 7
    CAPTION_VARIANT = 8
    NOISE_OFFSET = 101
    PYRAMID_NOISE = 102
    PERTURBATION = 103


def draw(seed: int, purpose: Purpose, step: int = 0, position: int = 0) -> np.random.Generator:
    """The generator of one sample's draws; cheap to make (some microseconds)."""
    # as a list, a position of 64 bits would be rounded to a float's 53
    counter = np.array([0, 0, step, position], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=[seed, int(purpose)], counter=counter))


def torch_seed(seed: int, step: int = 0) -> int:
    """A seed for torch's own generator, for what only torch draws (initial weights, dropout inside layers)."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)
