"""Which source reads a folder: the one that is named, or the first that knows its own."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import Dataset
from pipeline.dataset import imagefolder, kohya, kohya_json, parquet, sidecar, two_folders, webdataset
from pipeline.dataset.source import IMAGE_EXTENSIONS, Source, require_folder
from pipeline.errors import UserError

# In the order in which they are asked: what is most particular first. Sidecar takes every folder.
SOURCES: tuple[Source, ...] = (
    kohya_json.SOURCE,
    kohya.SOURCE,
    imagefolder.SOURCE,
    parquet.SOURCE,
    webdataset.SOURCE,
    two_folders.SOURCE,
    sidecar.SOURCE,
)
_PACKED: tuple[Source, ...] = (parquet.SOURCE, webdataset.SOURCE)


def source_of(folder: Path, settings: Dataset) -> Source:
    """The source for `dataset.format`; `auto` looks at the names in the folder.

    Raises:
        UserError: no such folder; or, under `auto`, archives of pictures with something else beside them.
    """
    require_folder(folder)
    if settings.format != "auto":
        return next(source for source in SOURCES if source.name == settings.format)
    packed = [source.name for source in _PACKED if source.detect(folder, settings)]
    if packed:
        loose = any(path.suffix.lower() in IMAGE_EXTENSIONS for path in folder.rglob("*") if not _hidden(path, folder))
        if loose or len(packed) > 1:
            beside = "loose pictures" if loose else packed[1]
            other = "sidecar, or the form that those have" if loose else packed[1]
            raise UserError(
                f"dataset.format: {folder} holds {packed[0]} files and {beside}, and one of them would be left out: "
                f"set it to {packed[0]}, or to {other}"
            )
    return next(source for source in SOURCES if source.detect(folder, settings))


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)
