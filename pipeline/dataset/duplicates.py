"""Pictures that show nearly the same: resaved, rescaled or slightly retouched copies.

Two pictures are near-duplicates when their perceptual hashes (64 bits of the DCT, `imagehash.phash`) differ in at most
`MAX_BITS` bits and their 16×16 thumbnails by at most `MAX_LEVELS` grey levels on average: the hash alone is blind to colour.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import groupby

import imagehash
import numpy as np
from PIL import Image

MAX_BITS = 4
MAX_LEVELS = 6.0
_BANDS = 5  # 64 bits in five bands: hashes that differ in at most four bits agree in one whole band


@dataclass(frozen=True, slots=True)
class Likeness:
    """What is compared of a picture."""

    bits: int  # 64-bit perceptual hash
    thumbnail: bytes  # 16×16 RGB


def likeness(image: Image.Image) -> Likeness:
    """Of an RGB picture."""
    bits = imagehash.phash(image).hash.ravel()
    return Likeness(
        int("".join("1" if bit else "0" for bit in bits), 2), image.resize((16, 16), Image.Resampling.BOX).tobytes()
    )


def are_near(a: Likeness, b: Likeness) -> bool:
    """Whether two pictures are near-duplicates."""
    return (a.bits ^ b.bits).bit_count() <= MAX_BITS and _levels_apart(a.thumbnail, b.thumbnail) <= MAX_LEVELS


class Shelves:
    """Finds, among the pictures put into it, the first that is nearly the same as another. Looks only at those that share a band of
    their hashes, and in their order: many that look alike are no more work than the first of them."""

    def __init__(self, likenesses: Sequence[Likeness]) -> None:
        self._likenesses = likenesses
        self._shelves: dict[tuple[int, int], list[int]] = defaultdict(list)

    def put(self, i: int) -> None:
        """Take in picture `i`; in ascending order."""
        for key in self._keys(i):
            self._shelves[key].append(i)

    def first_near(self, j: int) -> int | None:
        """The first picture in here that is nearly the same as picture `j`."""
        sharing = groupby(merge(*(self._shelves.get(key, ()) for key in self._keys(j))))
        return next((i for i, _ in sharing if are_near(self._likenesses[i], self._likenesses[j])), None)

    def _keys(self, i: int) -> list[tuple[int, int]]:
        bits, width = self._likenesses[i].bits, -(-64 // _BANDS)
        return [(band, bits >> band * width & (1 << width) - 1) for band in range(_BANDS)]


def _levels_apart(a: bytes, b: bytes) -> float:
    x, y = np.frombuffer(a, np.uint8).astype(np.int16), np.frombuffer(b, np.uint8).astype(np.int16)
    return float(np.abs(x - y).mean())
