"""Pictures with caption files of the same stem beside them, nested folders allowed."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from pipeline.config import Dataset
from pipeline.dataset.rows import LINK_OUT, shown, sorted_scan
from pipeline.dataset.source import (
    IMAGE_EXTENSIONS,
    Found,
    Reject,
    Scan,
    clean_caption,
    extension,
    folder_name,
    foreign_pictures,
    is_image,
    is_inside,
    read_text_file,
    visible_files,
)
from pipeline.errors import UserError


class Sidecar:
    """See `pipeline.dataset.source.Source`."""

    name = "sidecar"

    def detect(self, folder: Path, settings: Dataset) -> bool:
        return True  # the plainest form: what a folder is taken for when it is nothing else

    def scan(self, folder: Path, settings: Dataset, unpacked: Path, check_stop: Callable[[], None]) -> Scan:
        files = visible_files(folder)
        pictures = {name: stem_of(name) for name in files if is_image(name)}
        if not pictures:
            raise UserError(
                f"dataset.path: no picture in {folder}: looked for {', '.join(IMAGE_EXTENSIONS)} in it and its sub-folders"
            )
        captions = {name: stem_of(name) for name in files if is_caption(name, settings)}
        return pair(folder, files, pictures, captions, settings)


def pair(
    folder: Path,
    files: Collection[str],
    pictures: Mapping[str, str],
    captions: Mapping[str, str],
    settings: Dataset,
    inside: str = "",
) -> Scan:
    """Match pictures with caption files.

    Args:
        folder: the dataset's folder.
        files: relative names of all its visible files.
        pictures, captions: relative name -> stem; a caption belongs to the picture of the same stem.
        settings: for the extensions, the first of which wins, and for `caption_lines`.
        inside: what pictures' names start with and their stems do not.
    """
    named: dict[tuple[str, str], str] = {}
    found: list[Found] = []
    rejects: list[Reject] = []
    for name, stem in captions.items():
        first = named.setdefault((stem, extension(name)), name)
        if first != name:
            rejects.append(Reject(shown(name), f"is a second caption beside {shown(first)}: leave one"))
    taken: dict[str, str] = {}
    endings = caption_extensions(settings)
    for name, stem in pictures.items():
        beside = [named[stem, ending] for ending in endings if (stem, ending) in named]
        class_name = folder_name(name.removeprefix(inside))
        if not name.isprintable():
            rejects.append(Reject(shown(name), "has a name that cannot be printed: rename it"))
        elif not is_inside(folder / name, folder) or (beside and not is_inside(folder / beside[0], folder)):
            rejects.append(Reject(name, LINK_OUT))
        elif not beside:
            found.append(Found(name, (), class_name=class_name))
        elif beside[0] in taken:
            rejects.append(Reject(name, f"shares its caption file with {taken[beside[0]]}: give one of them another name"))
        else:
            taken[beside[0]] = name
            variants, fault = read_captions(folder / beside[0], settings.caption_lines)
            if fault:
                rejects.append(Reject(name, f"{fault} ({beside[0]})"))
            else:
                found.append(Found(name, variants, class_name=class_name))
    foreign = foreign_pictures(files)
    rejects += foreign
    stems = {*pictures.values(), *(stem_of(reject.path.removeprefix(inside)) for reject in foreign)}
    lonely = [name for name, stem in captions.items() if stem not in stems]
    rejects += [Reject(shown(name), "is a caption without a picture of the same name") for name in lonely]
    return sorted_scan(found, rejects)


def caption_extensions(settings: Dataset) -> tuple[str, ...]:
    """The extensions of caption files, the first that is there wins."""
    return tuple(dict.fromkeys((settings.caption_extension.lower(), ".caption")))


def is_caption(name: str, settings: Dataset) -> bool:
    """Whether the file's name says that it is a caption."""
    return extension(name) in caption_extensions(settings)


def stem_of(name: str) -> str:
    """The relative name without its last extension."""
    return os.path.splitext(name)[0]


def read_captions(path: Path, lines: bool) -> tuple[tuple[str, ...], str]:
    """The captions of a file, one, or one per line that is not blank, and what is wrong, one of them empty."""
    text, fault = read_text_file(path)
    if fault:
        return (), fault
    cleaned = [clean_caption(part) for part in ([p for p in text.splitlines() if p.strip()] or [""] if lines else [text])]
    faults = [fault for _, fault in cleaned if fault]
    return ((), faults[0]) if faults else (tuple(caption for caption, _ in cleaned), "")


SOURCE = Sidecar()
