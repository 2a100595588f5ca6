"""Decoding a picture, and the geometry that cuts it to the training resolution."""

from __future__ import annotations

import hashlib
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError


class BadImage(Exception):
    """The picture cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Geometry:
    """How a picture becomes a training picture: resize to `resized`, then cut `crop` out. All in pixels."""

    original: tuple[int, int]  # width, height as decoded and turned upright
    resized: tuple[int, int]
    crop: tuple[int, int, int, int]  # left, top, right, bottom within `resized`

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the training picture."""
        left, top, right, bottom = self.crop
        return right - left, bottom - top


def decode(path: Path, max_pixels: int) -> Image.Image:
    """Read a picture as upright 8-bit RGB; transparency is laid over white.

    Raises:
        BadImage: not a picture, damaged, truncated, more than `max_pixels`, or of a depth that would be cut off.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise BadImage(f"has {width}×{height} pixels; dataset.max_pixels allows {max_pixels}")
                if image.mode.startswith(("I", "F")):
                    raise BadImage(f"has {image.mode} pixels (more than 8 bits a channel): convert it to 8-bit first")
                image.load()
                upright = ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise BadImage("is not a picture that can be read") from None
    except Image.DecompressionBombError as error:
        raise BadImage(f"is too large: {error}") from None
    except (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError, OverflowError, struct.error) as error:
        raise BadImage(f"is damaged: {error}") from None
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return upright.convert("RGB")


def hash_pixels(image: Image.Image) -> str:
    """sha256 of the size and the RGB bytes: the same for one picture stored under any name or lossless format."""
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).hexdigest()


def centre_crop(size: tuple[int, int], resolution: int) -> Geometry:
    """Scale the shorter side to `resolution` and cut the middle square out.

    Raises:
        BadImage: the picture is smaller than the resolution; enlarging it would invent detail.
    """
    width, height = size
    if min(size) < resolution:
        raise BadImage(f"is {width}×{height} pixels, smaller than dataset.resolution {resolution}")
    scale = resolution / min(size)
    resized = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    left, top = (resized[0] - resolution) // 2, (resized[1] - resolution) // 2
    return Geometry(size, resized, (left, top, left + resolution, top + resolution))


def cut(image: Image.Image, geometry: Geometry) -> Image.Image:
    """Apply a geometry: the RGB picture that the model sees."""
    resized = image if image.size == geometry.resized else image.resize(geometry.resized, Image.Resampling.LANCZOS)
    return resized.crop(geometry.crop)
