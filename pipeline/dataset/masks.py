"""Where a picture's mask lies: in a folder of masks, or beside the picture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.dataset.source import IMAGE_EXTENSIONS, is_image
from pipeline.errors import UserError

_ENDINGS = (*IMAGE_EXTENSIONS, *(ending.upper() for ending in IMAGE_EXTENSIONS))
_MARKS = (".mask", "-masklabel")  # cat.mask.png, or OneTrainer's cat-masklabel.png, beside cat.jpg


class Masks(Protocol):
    """A way of finding masks, and of telling them from pictures."""

    @property
    def where(self) -> str:
        """As in `has no mask …`."""

    def holds(self, path: Path) -> bool:
        """Whether this is a mask."""

    def of(self, file: Path, name: str) -> Path | None:
        """The mask of a picture, which lies at `file` and goes by the relative path `name`."""


@dataclass(frozen=True)
class MaskFolder:
    """Masks have their pictures' relative names, whatever the ending."""

    folder: Path
    where: str

    def holds(self, path: Path) -> bool:
        return path.is_relative_to(self.folder) or path.resolve().is_relative_to(self.folder)

    def of(self, file: Path, name: str) -> Path | None:
        stem = self.folder / Path(name).with_suffix("")
        return _first(stem.with_name(stem.name + ending) for ending in _ENDINGS)


@dataclass(frozen=True)
class MasksBeside:
    """Masks lie beside their pictures, with a mark in their names."""

    where: str = "beside it"

    def holds(self, path: Path) -> bool:
        return is_image(path.name) and path.stem.endswith(_MARKS)

    def of(self, file: Path, name: str) -> Path | None:
        return _first(file.with_name(file.stem + mark + ending) for mark in _MARKS for ending in _ENDINGS)


def _first(candidates: Iterable[Path]) -> Path | None:
    return next((path for path in candidates if path.is_file()), None)


def masks_of(setting: str | None, folder: Path) -> Masks | None:
    """As `dataset.masks` says; None where there are none, or the pictures' own transparency is the mask.

    Raises:
        UserError: it names no folder in the dataset's.
    """
    if setting in (None, "alpha"):
        return None
    if setting == "sidecar":
        return MasksBeside()
    named = (folder / str(setting)).resolve()
    if not (named.is_dir() and named.is_relative_to(folder.resolve())):
        raise UserError(
            f"dataset.masks: {named} is no folder in {folder}: give `alpha`, `sidecar`, or a folder in dataset.path"
        )
    return MaskFolder(named, f"in {setting}")
