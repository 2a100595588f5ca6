"""Kohya's folders `10_token class`: the number repeats the pictures, the words name what they show.

As sd-scripts reads its `--train_data_dir`: the caption is that of the caption file, else the folder's words.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pipeline.config import Dataset
from pipeline.dataset.rows import shown, sorted_scan, unfit
from pipeline.dataset.sidecar import is_caption, pair, stem_of
from pipeline.dataset.source import Found, Reject, Scan, is_image, visible_files

_FOLDER = re.compile(r"^([0-9]{1,4})_(.*)$", re.DOTALL)  # five digits and more are a date, or a slip
_SURELY = re.compile(r"^[0-9]{1,3}_")  # `2023_summer` is a year, unless `dataset.format` says otherwise


class Kohya:
    """See `pipeline.dataset.source.Source`."""

    name = "kohya"

    def detect(self, folder: Path, settings: Dataset) -> bool:
        return any(_SURELY.match(p.name) and p.is_dir() for p in folder.iterdir())

    def scan(self, folder: Path, settings: Dataset, unpacked: Path, check_stop: Callable[[], None]) -> Scan:
        files = visible_files(folder)
        within = {name for name in files if "/" in name and _FOLDER.match(name.split("/")[0])}
        pictures = {name: stem_of(name) for name in files if name in within and is_image(name)}
        if not pictures:
            raise unfit(folder, self.name, "pictures are looked for in folders named like `10_token class`")
        captions = {name: stem_of(name) for name in files if name in within and is_caption(name, settings)}
        paired = pair(folder, files, pictures, captions, settings)
        found: list[Found] = []
        rejects = list(paired.rejects)
        for item in paired.found:
            repeats, words = _meaning(item.path)
            if repeats:
                captions_ = item.captions or ((words,) if words else ())
                found.append(replace(item, captions=captions_, repeats=repeats, class_name=words))
            else:
                rejects.append(Reject(item.path, "lies in a folder that is repeated 0 times: give it 1 or more, or remove it"))
        elsewhere = [name for name in files if is_image(name) and name not in within]
        rejects += [Reject(shown(name), "lies in no folder named like `10_token class`") for name in elsewhere]
        return sorted_scan(found, rejects)


def _meaning(name: str) -> tuple[int, str]:
    """Repeats and words of the folder that a picture lies in."""
    match = _FOLDER.match(name.split("/")[0])
    assert match
    return int(match[1]), " ".join(match[2].split())


SOURCE = Kohya()
