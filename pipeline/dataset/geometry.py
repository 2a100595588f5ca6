"""The geometry that cuts a picture to a training size: square, or the bucket nearest to its aspect ratio."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

from PIL import Image

from pipeline.dataset.images import BadImage

Size = tuple[int, int]  # width, height in pixels

_LARGEST = 2**28  # pixels of a whole picture after resizing


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a picture becomes a training picture: resize to `resized`, then cut `crop` out. All in pixels."""

    original: Size  # as decoded and turned upright
    resized: Size
    crop: tuple[int, int, int, int]  # left, top, right, bottom within `resized`

    @property
    def size(self) -> Size:
        """Width and height of the training picture."""
        left, top, right, bottom = self.crop
        return right - left, bottom - top


@lru_cache(maxsize=4096)
def shared(geometry: Geometry) -> Geometry:
    """The first that is equal: of very many pictures most have one of a few geometries, and half a kilobyte goes into each."""
    return geometry


Place = Callable[[int, int], tuple[int, int]]
"""Given how many pixels are to spare in width and in height, how many of them go left and on top."""


def centre(spare_width: int, spare_height: int) -> tuple[int, int]:
    """The middle is kept."""
    return spare_width // 2, spare_height // 2


def fit(original: Size, target: Size, place: Place = centre) -> Geometry:
    """Scale a picture until it covers `target`, keeping its aspect ratio, and cut what sticks out."""
    scale = max(target[0] / original[0], target[1] / original[1])
    resized = max(target[0], round(original[0] * scale)), max(target[1], round(original[1] * scale))
    left, top = place(resized[0] - target[0], resized[1] - target[1])
    return Geometry(original, resized, (left, top, left + target[0], top + target[1]))


def square(original: Size, resolution: int, allow_upscaling: bool) -> Size:
    """The square of `resolution` pixels.

    Raises:
        BadImage: the picture is smaller; enlarging it would invent detail.
    """
    if min(original) < resolution and not allow_upscaling:
        raise BadImage(
            f"is {original[0]}×{original[1]} pixels, smaller than dataset.resolution {resolution}: use a larger picture, or set "
            "dataset.allow_upscaling or dataset.buckets"
        )
    return resolution, resolution


def bucket(original: Size, resolution: int, step: int, min_side: int, max_side: int, allow_upscaling: bool) -> Size:
    """The bucket that a picture lands in: of those with at most `resolution`² pixels the one nearest to its aspect ratio.

    Without upscaling a picture that is smaller than its bucket gets one of its own: its sides rounded down to `step`.

    Raises:
        BadImage: a side would be shorter than `min_side`.
    """
    ratio = math.log(original[0] / original[1])
    nearest = min(
        buckets(resolution, step, min_side, max_side),
        key=lambda wh: (round(abs(math.log(wh[0] / wh[1]) - ratio), 9), -wh[0] * wh[1], wh),
    )
    if allow_upscaling or (original[0] >= nearest[0] and original[1] >= nearest[1]):
        return nearest
    width, height = (min(a, b) // step * step for a, b in zip(original, nearest, strict=True))
    if min(width, height) < min_side:
        raise BadImage(
            f"is {original[0]}×{original[1]} pixels: without dataset.allow_upscaling its bucket would be {width}×{height}, and "
            f"dataset.buckets.min_side is {min_side}"
        )
    return width, height


@cache
def buckets(resolution: int, step: int, min_side: int, max_side: int) -> tuple[Size, ...]:
    """All full-size buckets: for every width the tallest height that keeps within `resolution`² pixels, and the converse."""
    sizes = set()
    for side in range(min_side, max_side + 1, step):
        other = min(max_side, resolution * resolution // side // step * step)
        if other >= min_side:
            sizes |= {(side, other), (other, side)}
    return tuple(sorted(sizes))


def cut(image: Image.Image, geometry: Geometry) -> Image.Image:
    """Apply a geometry: the picture (or mask) that the model sees."""
    if geometry.resized[0] * geometry.resized[1] > _LARGEST:  # a thread of a picture, enlarged: only what is kept of it is made
        across, down = (r / o for r, o in zip(geometry.resized, image.size, strict=True))
        left, top, right, bottom = geometry.crop
        box = (left / across, top / down, right / across, bottom / down)
        return image.resize(geometry.size, Image.Resampling.LANCZOS, box)
    resized = image if image.size == geometry.resized else image.resize(geometry.resized, Image.Resampling.LANCZOS)
    return resized.crop(geometry.crop)
