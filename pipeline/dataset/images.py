"""Decoding a picture: any common format to upright 8-bit sRGB, or a reason why not."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

# What a file may hold, by the ending of its name.
_FORMATS = {
    ".png": {"PNG"},
    ".jpg": {"JPEG", "MPO"},
    ".jpeg": {"JPEG", "MPO"},
    ".webp": {"WEBP"},
    ".bmp": {"BMP"},
    ".tif": {"TIFF"},
    ".tiff": {"TIFF"},
    ".gif": {"GIF"},
}


class BadImage(Exception):
    """The picture cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Picture:
    """A decoded picture."""

    image: Image.Image  # RGB, upright, transparency laid over the background
    alpha: Image.Image | None  # L, of the same size; None where the file has no transparency
    notes: tuple[str, ...] = ()  # what was done to it that a person should know


def decode(path: Path, max_pixels: int, background: str = "#ffffff") -> Picture:
    """Read a picture as upright 8-bit sRGB, its first frame if it is animated.

    Raises:
        BadImage: not a picture, damaged, truncated, of another format than its name says, or more than `max_pixels`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)  # damaged EXIF: the pixels are what counts
            with Image.open(path) as image:
                allowed = _FORMATS.get(path.suffix.lower())
                if allowed and image.format not in allowed:
                    raise BadImage(f"is named {path.suffix} but holds {image.format}: rename it")
                width, height = image.size
                if width * height > max_pixels:
                    raise BadImage(f"has {width}×{height} pixels; dataset.max_pixels allows {max_pixels}")
                frames = getattr(image, "n_frames", 1)
                image.load()
                return _picture(image, frames, background)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("is not a picture that can be read") from None
    except Image.DecompressionBombError as error:
        raise BadImage(f"is too large: {error}") from None
    except OSError as error:  # without the path, which is another on every machine
        raise BadImage(f"is damaged: {error.strerror or error}") from None
    except Exception as error:  # whatever a damaged file makes a decoder raise
        raise BadImage(f"is damaged: {error or type(error).__name__}") from None


def read_mask(path: Path, size: tuple[int, int], max_pixels: int) -> Image.Image:
    """A mask file as greyscale.

    Raises:
        BadImage: it cannot be read or is not of the picture's size.
    """
    try:
        mask = decode(path, max_pixels, "#000000").image.convert("L")  # what is transparent is left out
    except BadImage as bad:
        raise BadImage(f"has a mask, {path.name}, that {bad}") from None
    if mask.size != size:
        raise BadImage(f"is {size[0]}×{size[1]} pixels, but its mask {path.name} {mask.width}×{mask.height}")
    return mask


def hash_pixels(image: Image.Image) -> str:
    """sha256 of mode, size and bytes: the same for one picture stored under any name or lossless format."""
    kind = "" if image.mode == "RGB" else image.mode
    return hashlib.sha256(f"{kind}{image.width}x{image.height}:".encode() + image.tobytes()).hexdigest()


def _picture(image: Image.Image, frames: int, background: str) -> Picture:
    notes = []
    if frames > 1 and image.format in ("GIF", "WEBP", "PNG"):
        notes.append(f"is animated: the first of {frames} frames is used")
    profile = image.info.get("icc_profile")
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "F":
        raise BadImage("has floating-point pixels, whose range is unknown: convert it to 8 or 16 bits")
    if upright.mode.startswith("I"):
        upright = _from_16_bit(upright)
        notes.append("has 16-bit pixels: the upper 8 bits are used")
    alpha = None
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        alpha = layer.getchannel("A")
        upright = layer.convert("RGB") if profile is None else upright
    colours, note = _to_srgb(upright, profile)
    if note:
        notes.append(note)
    if alpha is not None:
        colours = Image.composite(colours, Image.new("RGB", colours.size, background), alpha)
    return Picture(colours, alpha, tuple(notes))


def _from_16_bit(image: Image.Image) -> Image.Image:
    """16-bit grey to 8-bit; Pillow's own conversion would clip everything above 255 to white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadImage(f"has pixels from {values.min()} to {values.max()}, more than 16 bits: convert it to 8 or 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8), "L")


def _to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str]:
    """RGB in sRGB, by the embedded profile where there is one, and a note where it cannot be used."""
    if not profile:
        return image.convert("RGB"), ""
    plain = image
    if image.mode in ("P", "PA", "RGBA", "RGBX", "1"):
        plain = image.convert("RGBA").convert("RGB") if image.mode != "1" else image.convert("L")
    elif image.mode == "LA":
        plain = image.convert("L")
    try:
        converted = ImageCms.profileToProfile(
            plain, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        return plain.convert("RGB"), f"has a colour profile that cannot be used and is read as sRGB: {error}"
    assert converted is not None
    return converted, ""
