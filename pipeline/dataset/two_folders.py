"""Pictures in `images/` and captions in `texts/` or `captions/`, matched by their paths below these folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipeline.config import Dataset
from pipeline.dataset.rows import shown, sorted_scan, unfit
from pipeline.dataset.sidecar import is_caption, pair, stem_of
from pipeline.dataset.source import Reject, Scan, is_image, visible_files

_PICTURES = "images/"
_CAPTIONS = ("texts/", "captions/")


class TwoFolders:
    """See `pipeline.dataset.source.Source`."""

    name = "two-folders"

    def detect(self, folder: Path, settings: Dataset) -> bool:
        return (folder / _PICTURES).is_dir() and any((folder / name).is_dir() for name in _CAPTIONS)

    def scan(self, folder: Path, settings: Dataset, unpacked: Path, check_stop: Callable[[], None]) -> Scan:
        files = visible_files(folder)
        images = [name for name in files if is_image(name)]
        pictures = {name: stem_of(name.removeprefix(_PICTURES)) for name in images if name.startswith(_PICTURES)}
        captions = {
            name: stem_of(name.removeprefix(prefix))
            for prefix in _CAPTIONS
            for name in files
            if name.startswith(prefix) and is_caption(name, settings)
        }
        if not pictures or not self.detect(folder, settings):
            raise unfit(folder, self.name, "pictures are looked for in images/, captions in texts/ or captions/ beside it")
        paired = pair(folder, files, pictures, captions, settings, _PICTURES)
        elsewhere = [Reject(shown(name), "lies outside images/") for name in images if name not in pictures]
        return sorted_scan(paired.found, [*paired.rejects, *elsewhere])


SOURCE = TwoFolders()
