"""Rows of metadata: which picture a row names and what it says of it, whatever somebody wrote there."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.dataset.source import IMAGE_EXTENSIONS, Found, Reject, Scan, clean_caption, is_image, is_inside
from pipeline.errors import UserError

CAPTION_COLUMNS = ("text", "caption", "prompt")  # looked for where `dataset.caption_column` is not there
LINK_OUT = "is a link out of the dataset's folder"

_DRIVE = re.compile(r"^[A-Za-z]:")
_SHOWN = 200  # characters of a name in a message


def shown(name: str) -> str:
    """A name as it may stand in a message: printable, one line, not endless."""
    text = name if name.isprintable() else ascii(name)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def names_like(folder: Path, pattern: str) -> list[str]:
    """Visible files below the folder whose name fits the pattern, relative with `/`, sorted. Cheap: nothing else is looked at."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob(pattern) if p.is_file())
    return [name for name in names if not any(part.startswith(".") for part in name.split("/"))]


def unfit(folder: Path, format: str, wanted: str) -> UserError:
    """The error of a folder that is not kept as its format asks."""
    return UserError(
        f"dataset.path: no picture to be found in {folder} as dataset.format {format}: {wanted}. "
        "Set dataset.format to auto, or to the form that the folder has"
    )


def sorted_scan(found: Iterable[Found], rejects: Iterable[Reject]) -> Scan:
    """Both lists in an order that the file system does not settle."""
    return Scan(sorted(found, key=lambda f: (f.path, f.captions)), sorted(rejects, key=lambda r: (r.path, r.reason)))


def relative_parts(name: str) -> tuple[list[str], bool]:
    """The parts of a path as a row gives it, from Windows too, and whether it starts at a root."""
    plain = name.replace("\\", "/")
    bare = _DRIVE.sub("", plain)
    return [part for part in bare.split("/") if part not in ("", ".")], bare != plain or plain.startswith("/")


def picture_named(name: object, base: str, files: Collection[str], folder: Path) -> tuple[str, str]:
    """The picture that a row names, and what is wrong with that, one of them empty.

    Args:
        name: what stands in the row, relative to `base`.
        base: sub-folder of the metadata file, "" for the dataset's folder itself.
        files: the names of the visible files in the dataset's folder: nothing else is ever opened.
        folder: the dataset's folder.
    """
    if not isinstance(name, str) or not name.strip():
        return "", "names no picture"
    parts, absolute = relative_parts(name)
    if "://" in name or absolute:
        return "", f"names {shown(name)}: a path relative to the metadata file is wanted"
    if ".." in parts:
        return "", f"names {shown(name)}, which leads out of its folder"
    path = "/".join([part for part in base.split("/") if part] + parts)
    return checked_picture(path, name, files, folder)


def checked_picture(path: str, name: str, files: Collection[str], folder: Path) -> tuple[str, str]:
    """`path` where it is a picture within the folder, and what is wrong, one of them empty; the row called it `name`."""
    if path not in files:
        return "", f"names {shown(name)}, which is not there"
    if not path.isprintable():
        return "", f"names {shown(name)}, which cannot be printed: rename it"
    if not is_image(path):
        return "", f"names {shown(name)}, which is no picture: allowed are {', '.join(IMAGE_EXTENSIONS)}"
    if not is_inside(folder / path, folder):
        return "", f"names {shown(name)}, which {LINK_OUT}"
    return path, ""


def caption_value(row: Mapping[str, object], column: str) -> tuple[object, str]:
    """What the row says in `dataset.caption_column`, else in the only one of the usual columns; and what is wrong, if anything."""
    if column in row:
        return row[column], ""
    usual = [name for name in CAPTION_COLUMNS if name in row]
    if len(usual) > 1:
        return None, f"has several captions ({', '.join(usual)}): name one in dataset.caption_column"
    return (row[usual[0]] if usual else None), ""


def captions_of(value: object, lines: bool) -> tuple[tuple[str, ...], str]:
    """The captions in a row's value, and what is wrong with them; both empty where it says nothing.

    Args:
        value: text, or a list of texts, which are variants of each other; None, NaN and blanks are no caption.
        lines: whether each line of a text is a variant of its own.
    """
    if value is None or value != value:
        return (), ""
    texts = list(value) if isinstance(value, list | tuple) else [value]
    captions: list[str] = []
    for text in texts:
        if text is None:
            continue
        if not isinstance(text, str):
            return (), f"has a caption that is no text but {type(text).__name__}"
        for part in text.splitlines() if lines else [text]:
            if part.strip():
                caption, fault = clean_caption(part)
                if fault:
                    return (), fault
                captions.append(caption)
    return tuple(dict.fromkeys(captions)), ""


def read_json_object(text: bytes) -> tuple[dict[Any, object], str]:
    """The JSON object that the text is, and what is wrong with it, if anything."""
    try:
        value = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        return {}, f"is not UTF-8 text (byte {error.start})"
    except (ValueError, RecursionError) as error:  # also a number too long for Python, or brackets within brackets
        return {}, f"is not JSON: {shown(str(error))}"
    return (value, "") if isinstance(value, dict) else ({}, "is no JSON object")
