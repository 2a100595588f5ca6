"""What every source of pictures and captions gives: the interface, and what all sources share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.config import Dataset
from pipeline.errors import UserError

# pictures that Pillow reads only with plug-ins, or not at all: named, so that none goes missing without a word
FOREIGN_EXTENSIONS = (".heic", ".heif", ".avif", ".jfif", ".jxl", ".jp2", ".svg", ".raw", ".cr2", ".nef", ".dng", ".psd")
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
NOT_READ = "is a picture in a format that is not read here"
MAX_CAPTION_CHARACTERS = 10_000


@dataclass(frozen=True, slots=True)
class Found:
    """A picture, its pixels unread, with what the source says of it."""

    path: str  # relative to the dataset's folder, or to the folder of unpacked pictures; with `/`
    captions: tuple[str, ...]  # as written, cleaned; several are variants of each other; empty: the source has none
    repeats: int = 1  # how often an epoch shows it
    class_name: str = ""  # folder, label or Kohya class that names what it shows, where the source knows one
    mask: str | None = None  # picture of the same size, white where the loss counts; relative to the dataset's folder
    unpacked: bool = False  # the picture was taken out of an archive into the folder of unpacked pictures


@dataclass(frozen=True, slots=True)
class Reject:
    """A file or row that cannot be used, and why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Scan:
    """What a source found, both sorted by path."""

    found: list[Found]
    rejects: list[Reject]


class Source(Protocol):
    """One way in which people keep pictures and captions. One module each, with a `SOURCE`."""

    name: str  # as in `dataset.format`

    def detect(self, folder: Path, settings: Dataset) -> bool:
        """Whether the folder is kept in this way; looks at names alone."""

    def scan(self, folder: Path, settings: Dataset, unpacked: Path, check_stop: Callable[[], None]) -> Scan:
        """List the pictures. Packed sources write each picture's bytes as they are into `unpacked`, one at a time.

        Raises:
            UserError: the folder is not what the format asks for, or holds no picture.
        """


def visible_files(folder: Path) -> Collection[str]:
    """Every file below the folder by its relative path with `/`, sorted; hidden files and folders are left alone, and folders that
    are links. Names alone: a `Path` for each of very many files would take more memory than all else that is known of them.

    Raises:
        UserError: a folder that cannot be listed.
    """
    names: list[str] = []

    def refuse(error: OSError) -> None:
        raise UserError(
            f"dataset.path: {error.filename} cannot be listed: {error.strerror}: its pictures would be missing unnoticed"
        )

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(place).relative_to(folder).as_posix()
        prefix = "" if inside == "." else inside + "/"
        # a link to nothing is listed too: it is refused when it is opened, and a picture that is missing is not missed in silence
        names += [
            prefix + name for name in files if not name.startswith(".") and _is_file_or_dead_link(os.path.join(place, name))
        ]
    return dict.fromkeys(sorted(names)).keys()


def linked_folders(folder: Path) -> list[str]:
    """The visible folders that are links, as relative names with `/`, sorted: they may lead anywhere, round in a circle too, so that nobody goes into them."""
    links = []
    for place, folders, _ in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links += [Path(place, name) for name in folders if os.path.islink(os.path.join(place, name))]
    return sorted(path.relative_to(folder).as_posix() for path in links)


def _is_file_or_dead_link(path: str) -> bool:
    return os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))


def folder_name(name: str) -> str:
    """The name of the folder that a picture lies in, "" at the top; one string for all of its pictures."""
    return sys.intern(name.rpartition("/")[0].rpartition("/")[2])


def extension(name: str) -> str:
    """The name's last extension with its dot, in lower case; "" where it has none."""
    return os.path.splitext(name)[1].lower()


def is_image(name: str) -> bool:
    """Whether the file's name says that it is a picture."""
    return extension(name) in IMAGE_EXTENSIONS


def foreign_pictures(names: Iterable[str]) -> list[Reject]:
    """The files that are pictures in a format that is not read here."""
    return [
        Reject(name, f"{NOT_READ}: convert it to one of {', '.join(IMAGE_EXTENSIONS)}")
        for name in names
        if extension(name) in FOREIGN_EXTENSIONS and name.isprintable()
    ]


def is_inside(path: Path, folder: Path) -> bool:
    """Whether the path, links followed, lies in the folder."""
    return path.resolve().is_relative_to(folder.resolve())


def captions_needed(settings: Dataset) -> bool:
    """Whether pictures without a caption are refused: nothing else gives them one."""
    return settings.missing_caption == "refuse" and not settings.instance_prompt


def require_folder(folder: Path) -> None:
    """Raise `UserError` where the dataset's folder is not there."""
    if not folder.is_dir():
        raise UserError(f"dataset.path: {folder} is no folder: give the folder that holds your pictures and captions")


def read_text_file(path: Path) -> tuple[str, str]:
    """The file's text and what is wrong with it, one of them empty."""
    try:
        return path.read_text(encoding="utf-8-sig"), ""
    except UnicodeDecodeError as error:
        return "", f"is not UTF-8 text (byte {error.start})"
    except OSError as error:
        return "", f"cannot be read: {error.strerror}"


def clean_caption(text: str) -> tuple[str, str]:
    """A caption with its white space folded, and what is wrong with it, one of them empty."""
    caption = " ".join(text.split())
    if not caption.strip(" ,"):
        return "", "the caption is empty"
    if len(caption) > MAX_CAPTION_CHARACTERS:
        return "", f"the caption has {len(caption)} characters; at most {MAX_CAPTION_CHARACTERS} are allowed"
    if any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in caption):
        return "", "the caption holds control characters"
    return caption, ""
