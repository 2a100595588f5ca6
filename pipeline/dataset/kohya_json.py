"""Kohya's metadata JSON (`meta_cap.json`, `meta_lat.json`), as sd-scripts' `finetune/` scripts make it for `--in_json`.

`{picture: {"caption": ..., "tags": ..., "train_resolution": [width, height]}}`: the key is a bare stem, a relative path, or an
absolute one (`--full_path`), which may come from another machine. Caption and tags are joined with a comma. The resolution is
not used: pictures are cut as `dataset.resolution` says. The form with one JSON object a line is read too.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

from pipeline.config import Dataset
from pipeline.dataset.rows import (
    LINK_OUT,
    captions_of,
    checked_picture,
    read_json_object,
    relative_parts,
    shown,
    sorted_scan,
    unfit,
)
from pipeline.dataset.sidecar import stem_of
from pipeline.dataset.source import Found, Reject, Scan, folder_name, foreign_pictures, is_image, is_inside, visible_files
from pipeline.errors import UserError

_LATEST_FIRST = ("meta_lat.json", "meta_clean.json", "meta_cap_dd.json", "meta_cap.json")  # each script writes the next
_SEPARATOR = ","  # sd-scripts' default --caption_separator


class KohyaJson:
    """See `pipeline.dataset.source.Source`."""

    name = "kohya-json"

    def detect(self, folder: Path, settings: Dataset) -> bool:
        return any(p.is_file() for pattern in ("meta_*.json", "meta_*.jsonl") for p in folder.glob(pattern))

    def scan(self, folder: Path, settings: Dataset, unpacked: Path, check_stop: Callable[[], None]) -> Scan:
        files = visible_files(folder)
        images = [name for name in files if is_image(name)]
        table = _table(folder, list(files))
        if not images:
            raise unfit(folder, self.name, f"{table} is there, and no picture in it or its sub-folders")
        if not is_inside(folder / table, folder):
            raise UserError(f"{folder / table} {LINK_OUT}: copy it there")
        rejects: list[Reject] = []
        entries: dict[str, list[tuple[str, object]]] = defaultdict(list)  # picture -> keys with what they say
        unknown: set[str] = set()  # keys that name no picture
        names = _Names(images)
        for key, entry, unread in _read(folder / table):
            check_stop()
            path, no_path = names.find(key) if not unread else ("", unread)
            picture, no_picture = checked_picture(path, key, files, folder) if path else ("", no_path)
            if no_picture:
                rejects.append(Reject(f"{shown(table)}: {shown(key)}", no_picture))
                unknown.add(key)
            else:
                entries[picture].append((key, entry))
        found: list[Found] = []
        for name in images:
            said = entries.get(name, [])
            captions, fault = _captions(said[0][1], settings.caption_lines) if said else ((), "")
            if not name.isprintable():
                rejects.append(Reject(shown(name), "has a name that cannot be printed: rename it"))
            elif not is_inside(folder / name, folder):
                rejects.append(Reject(name, LINK_OUT))
            elif len(said) > 1:
                keys = " and ".join(shown(key) for key, _ in said[:2])
                rejects.append(Reject(name, f"{shown(table)} names it more than once ({keys}): leave one"))
            elif fault:
                rejects.append(Reject(name, f"{fault} ({shown(table)})"))
            else:
                found.append(Found(name, captions, class_name=folder_name(name)))
        return sorted_scan(found, rejects + [r for r in foreign_pictures(files) if not {r.path, stem_of(r.path)} & unknown])


class _Names:
    """Finds pictures by keys as sd-scripts writes them."""

    def __init__(self, images: list[str]) -> None:
        self.by_name: dict[str, list[str]] = defaultdict(list)  # every ending of a path, with and without its extension
        for name in images:
            for whole in dict.fromkeys((name, stem_of(name))):
                parts = whole.split("/")
                for start in range(len(parts)):
                    self.by_name["/".join(parts[start:])].append(name)
        self.images = set(images)

    def find(self, key: str) -> tuple[str, str]:
        """The picture of a key and what is wrong with it, one of them empty."""
        parts, absolute = relative_parts(key)
        if ".." in parts or "://" in key:
            return "", f"names {shown(key)}, which leads out of its folder"
        for start in range(len(parts) if absolute else min(1, len(parts))):  # an absolute key may start in another folder
            ending = "/".join(parts[start:])
            if ending in self.images:
                return ending, ""
            fitting = self.by_name.get(ending, [])
            beside = [name for name in fitting if stem_of(name) == ending]  # as named from the dataset's folder itself
            fitting = beside or fitting
            if len(fitting) == 1:
                return fitting[0], ""
            if fitting:
                return "", f"may mean {fitting[0]} or {fitting[1]}: give the path with its extension"
        return "", "names a picture that is not there"


def _table(folder: Path, names: list[str]) -> str:
    """The metadata file: the last that sd-scripts' preparation wrote, else the only one."""
    top = [name for name in names if "/" not in name and Path(name).suffix in (".json", ".jsonl") and name != "metadata.jsonl"]
    known = [name for name in _LATEST_FIRST if name in top]
    tables = known[:1] or [name for name in top if name.startswith("meta_")] or top
    if not tables:
        raise unfit(folder, KohyaJson.name, "a metadata file such as meta_cap.json is wanted in it")
    if len(tables) > 1:
        raise UserError(
            f"dataset.path: {folder} holds several metadata files ({', '.join(shown(t) for t in tables[:5])}): leave one in it"
        )
    return tables[0]


def _read(path: Path) -> list[tuple[str, object, str]]:
    """Key, entry and what is wrong with it, for each picture that the file speaks of.

    Raises:
        UserError: the file is not JSON, or no object.
    """
    if path.suffix == ".json":
        try:
            whole = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read as JSON: {shown(str(error))}") from None
        if not isinstance(whole, dict):
            raise UserError(f"{path} must hold one object, {{picture: {{caption, tags}}}}, not {type(whole).__name__}")
        return [(key, entry, "") for key, entry in whole.items()]
    entries: list[tuple[str, object, str]] = []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            row, fault = read_json_object(line)
            key = row.get("image_path")
            if not fault and not isinstance(key, str):
                fault = "has no image_path"
            entries.append((f"line {number}" if fault else str(key), row, fault))
    return entries


def _captions(entry: object, lines: bool) -> tuple[tuple[str, ...], str]:
    """Caption and tags, joined as sd-scripts does; with `lines`, the tags follow each line of the caption."""
    if not isinstance(entry, Mapping):
        return (), f"has an entry that is no object but {type(entry).__name__}"
    caption, tags = ("" if entry.get(key) is None else entry[key] for key in ("caption", "tags"))
    for value in (caption, tags):
        if not isinstance(value, str):
            return (), f"has a caption or tags that are no text but {type(value).__name__}"
    parts = [part for part in caption.splitlines() if part.strip()] if lines else [caption]
    joined = [_SEPARATOR.join(text for text in (part, tags) if text) for part in parts or [""]]
    return captions_of(joined, lines=False)


SOURCE = KohyaJson()
