"""The sidecar source: pictures with captions of the same stem beside them, nested folders allowed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MAX_CAPTION_CHARACTERS = 10_000


@dataclass(frozen=True)
class Found:
    """A picture and its caption, unread pixels; `path` is relative to the dataset's folder, with `/`."""

    path: str
    caption: str


@dataclass(frozen=True)
class Reject:
    """A file that cannot be used, and why."""

    path: str
    reason: str


def scan(folder: Path, caption_extension: str) -> tuple[list[Found], list[Reject]]:
    """List the folder's pictures with their captions, sorted by path; hidden files are left alone.

    Raises:
        UserError: the folder is missing or holds no picture.
    """
    require_folder(folder)
    files = {
        p.relative_to(folder).as_posix(): p
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    }
    images = [name for name in files if Path(name).suffix.lower() in IMAGE_EXTENSIONS]
    captions = {name for name in files if Path(name).suffix == caption_extension}
    if not images:
        raise UserError(
            f"dataset.path: no picture in {folder}: looked for {', '.join(IMAGE_EXTENSIONS)} in it and its sub-folders"
        )
    found: list[Found] = []
    rejects: list[Reject] = []
    stems: dict[str, str] = {}
    for name in images:
        stem = Path(name).with_suffix("").as_posix()
        sidecar = stem + caption_extension
        if not name.isprintable():
            rejects.append(Reject(ascii(name), "has a name that cannot be printed: rename it"))
        elif stem in stems:
            rejects.append(Reject(name, f"shares its caption file with {stems[stem]}: give one of them another name"))
        elif sidecar not in captions:
            rejects.append(Reject(name, f"has no caption: {sidecar} is missing"))
        elif not _inside(files[name], folder) or not _inside(files[sidecar], folder):
            rejects.append(Reject(name, "is a link out of the dataset's folder"))
        else:
            stems[stem] = name
            caption, fault = _read_caption(files[sidecar])
            if fault:
                rejects.append(Reject(name, f"{sidecar}: {fault}"))
            else:
                found.append(Found(name, caption))
    image_stems = {Path(name).with_suffix("").as_posix() for name in images}
    for name in sorted(captions):
        if Path(name).with_suffix("").as_posix() not in image_stems:
            rejects.append(Reject(name, "is a caption without a picture of the same name"))
    return found, rejects


def require_folder(folder: Path) -> None:
    """Raise `UserError` where the dataset's folder is not there."""
    if not folder.is_dir():
        raise UserError(f"dataset.path: {folder} is no folder: give the folder that holds your pictures and captions")


def _inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _read_caption(path: Path) -> tuple[str, str]:
    """The caption with its white space folded, and what is wrong with it, one of them empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        return "", f"is not UTF-8 text (byte {error.start})"
    except OSError as error:
        return "", f"cannot be read: {error.strerror}"
    caption = " ".join(text.split())
    if not caption:
        return "", "the caption is empty"
    if len(caption) > MAX_CAPTION_CHARACTERS:
        return "", f"the caption has {len(caption)} characters; at most {MAX_CAPTION_CHARACTERS} are allowed"
    if any(ord(c) < 32 or 127 <= ord(c) < 160 for c in caption):
        return "", "the caption holds control characters"
    return caption, ""
