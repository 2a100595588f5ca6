"""Pictures that show nearly the same: resaved, rescaled or slightly retouched copies.

Two pictures are near-duplicates when their perceptual hashes (64 bits of the DCT, `imagehash.phash`) differ in at most
`MAX_BITS` bits and their 8×8 thumbnails by at most `MAX_LEVELS` grey levels on average: the hash alone is blind to colour.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import groupby

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_BITS = 4
MAX_LEVELS = 6.0
_BANDS = 5  # 64 bits in five bands: hashes that differ in at most four bits agree in one whole band
_WIDTH = -(-64 // _BANDS)  # bits of a band

Keys = NDArray[np.uint16]
Places = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Likeness:
    """What is compared of a picture."""

    bits: int  # 64-bit perceptual hash
    thumbnail: bytes  # 8×8 RGB: for colour, the hash tells the rest; all pictures' are in memory at once


def likeness(image: Image.Image) -> Likeness:
    """Of an RGB picture."""
    bits = imagehash.phash(image).hash.ravel()
    return Likeness(int("".join("1" if bit else "0" for bit in bits), 2), image.resize((8, 8), Image.Resampling.BOX).tobytes())


def are_near(a: Likeness, b: Likeness) -> bool:
    """Whether two pictures are near-duplicates."""
    return (a.bits ^ b.bits).bit_count() <= MAX_BITS and _levels_apart(a.thumbnail, b.thumbnail) <= MAX_LEVELS


class Alike:
    """Finds, among some pictures, those that are nearly the same as another. Looks only at those that share a band of their hashes,
    and in their order, lazily: where many look alike the first takes no longer to find. 30 bytes a picture."""

    def __init__(self, likenesses: Sequence[Likeness], members: Sequence[int]) -> None:
        """
        Args:
            likenesses: of all pictures.
            members: the places in it of the pictures to be found, ascending.
        """
        self._likenesses = likenesses
        bits = np.array([likenesses[i].bits for i in members], np.uint64)
        self._shelves: list[tuple[Keys, Places]] = []  # for each band its values, sorted, and whose they are
        for band in range(_BANDS):
            keys = (bits >> np.uint64(band * _WIDTH) & np.uint64((1 << _WIDTH) - 1)).astype(np.uint16)
            order = np.argsort(keys, kind="stable")
            self._shelves.append((keys[order], np.asarray(members, np.int32)[order]))

    def near(self, j: int, among: NDArray[np.bool_] | None = None) -> Iterator[int]:
        """The members that are nearly the same as picture `j`, in ascending order; itself too, where it is one.

        Args:
            among: for each picture, whether it is to be looked at.
        """
        bits = self._likenesses[j].bits
        sharing: list[Iterator[int]] = []
        for band, (keys, places) in enumerate(self._shelves):
            key = np.uint16(bits >> band * _WIDTH & (1 << _WIDTH) - 1)
            shelf = places[np.searchsorted(keys, key) : np.searchsorted(keys, key, "right")]
            sharing.append(map(int, shelf if among is None else shelf[among[shelf]]))
        return (i for i, _ in groupby(merge(*sharing)) if are_near(self._likenesses[i], self._likenesses[j]))


def _levels_apart(a: bytes, b: bytes) -> float:
    x, y = np.frombuffer(a, np.uint8).astype(np.int16), np.frombuffer(b, np.uint8).astype(np.int16)
    return float(np.abs(x - y).mean())
