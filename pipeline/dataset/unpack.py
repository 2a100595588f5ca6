"""Pictures taken out of archives: their bytes as they are, in files named by content."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pipeline.files import write_bytes

_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", ".png"),
    (b"\xff\xd8\xff", ".jpg"),
    (b"GIF87a", ".gif"),
    (b"GIF89a", ".gif"),
    (b"II*\0", ".tif"),
    (b"MM\0*", ".tif"),
    (b"BM", ".bmp"),
)
LARGEST = 512 * 2**20  # bytes of a packed picture; one is held in memory at a time


def unpack(data: bytes, folder: Path) -> tuple[str, str]:
    """Write the picture unless it is there already; its name in the folder and what is wrong with it, one of them empty.

    The name is sha256 of the bytes with the extension of what they are, whatever the archive called them.
    """
    extension = _extension(data)
    if not extension:
        return "", "is no picture of a known kind (PNG, JPEG, WebP, GIF, TIFF, BMP)"
    if len(data) > LARGEST:
        return "", f"has {len(data)} bytes; at most {LARGEST} are read"
    name = hashlib.sha256(data).hexdigest()[:40] + extension
    path = folder / name
    if not path.is_file() or path.stat().st_size != len(data):
        write_bytes(path, data)
    return name, ""


def _extension(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    return next((extension for signature, extension in _SIGNATURES if data.startswith(signature)), "")
