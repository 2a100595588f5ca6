"""Hugging Face's `imagefolder`: pictures with `metadata.csv`, `.jsonl` or `.parquet`, or in folders that name their class.

A metadata file speaks of the pictures in its folder and below: column `file_name`, relative to it, and a caption column that
holds a text or a list of texts. Several rows of one picture are variants of its caption. Pictures without a row are found
without a caption. https://huggingface.co/docs/datasets/image_dataset
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.config import Dataset
from pipeline.dataset.rows import (
    CAPTION_COLUMNS,
    LINK_OUT,
    caption_value,
    captions_of,
    names_like,
    picture_named,
    read_json_object,
    shown,
    sorted_scan,
    unfit,
)
from pipeline.dataset.sidecar import caption_extensions
from pipeline.dataset.source import (
    Found,
    Reject,
    Scan,
    captions_needed,
    extension,
    folder_name,
    foreign_pictures,
    is_image,
    is_inside,
    visible_files,
)
from pipeline.errors import UserError

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval")  # with metadata: no classes
_LONGEST_LINE = 16 * 2**20  # bytes of a line of JSON that are read before it is given up
_LONGEST_FIELD = 16 * 2**20  # characters of a field of CSV, likewise; Python's own 131,072 would hide whose caption is too long

Row = dict[Any, object]
NumberedRow = tuple[int, Row, str]  # line or row number, what it holds, what is wrong with it


class ImageFolder:
    """See `pipeline.dataset.source.Source`."""

    name = "imagefolder"

    def detect(self, folder: Path, settings: Dataset) -> bool:
        return any(names_like(folder, name) for name in METADATA) or _has_class_folders(folder, settings)

    def scan(self, folder: Path, settings: Dataset, unpacked: Path, check_stop: Callable[[], None]) -> Scan:
        files = visible_files(folder)
        images = [name for name in files if is_image(name)]
        if not images:
            raise unfit(
                folder, self.name, "pictures are looked for in it and its sub-folders, beside metadata files or without"
            )
        captions: dict[str, list[str]] = {name: [] for name in images}
        rejects: list[Reject] = []
        told: set[str] = set()  # what rows name that is no picture here
        spoilt: set[str] = set()  # pictures with a row that cannot be used
        tables = [name for name in files if Path(name).name in METADATA]
        for table in tables:
            if not is_inside(folder / table, folder):
                rejects.append(Reject(shown(table), LINK_OUT))
                continue
            columns: set[str] = set()
            for line, row, fault in _read_rows(folder / table, settings):
                check_stop()
                columns.update(key for key in row if isinstance(key, str))
                picture, no_picture = picture_named(_file_name(row, settings), table.rpartition("/")[0], files, folder)
                value, no_value = caption_value(row, settings.caption_column)
                variants, no_caption = captions_of(value, settings.caption_lines)
                if no_picture:
                    told.add("/".join([*table.split("/")[:-1], str(_file_name(row, settings))]))
                if reason := fault or no_picture or no_value or no_caption:
                    rejects.append(Reject(f"{shown(table)}:{line}", f"{reason} ({picture})" if picture else reason))
                    spoilt.add(picture)
                else:
                    captions[picture] += variants
            _refuse_without_captions(table, columns, settings)
        found: list[Found] = []
        for name in images:
            if not name.isprintable():
                rejects.append(Reject(shown(name), "has a name that cannot be printed: rename it"))
            elif not is_inside(folder / name, folder):
                rejects.append(Reject(name, LINK_OUT))
            elif captions[name] or name not in spoilt:
                class_name = folder_name(name)
                if tables and class_name in _SPLITS:
                    class_name = ""
                found.append(Found(name, tuple(dict.fromkeys(captions[name])), class_name=class_name))
        return sorted_scan(found, rejects + [reject for reject in foreign_pictures(files) if reject.path not in told])


def _has_class_folders(folder: Path, settings: Dataset) -> bool:
    """As `datasets` takes it: every picture lies in a sub-folder, and there are two of them or more; and no captions."""
    names = visible_files(folder)
    if any(extension(name) in (".txt", *caption_extensions(settings)) for name in names):
        return False
    parents = {name.rpartition("/")[0] for name in names if is_image(name)}
    return len(parents) > 1 and "" not in parents


def _file_name(row: Row, settings: Dataset) -> object:
    """`file_name`, or `image_file_name` as `datasets` calls it where there are several columns of pictures."""
    return row.get("file_name", row.get(f"{settings.image_column}_file_name"))


def _refuse_without_captions(table: str, columns: set[str], settings: Dataset) -> None:
    if columns and captions_needed(settings) and not columns & {settings.caption_column, *CAPTION_COLUMNS}:
        raise UserError(
            f"dataset.caption_column: {shown(table)} has no column {settings.caption_column}; it has "
            f"{', '.join(shown(name) for name in sorted(columns)[:20])}: name the one that holds the captions"
        )


def _read_rows(path: Path, settings: Dataset) -> Iterator[NumberedRow]:
    """The rows of a metadata file.

    Raises:
        UserError: the file as a whole is not of its kind, or names no pictures.
    """
    read = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}[path.suffix]
    return read(path, settings)


def _read_csv(path: Path, settings: Dataset) -> Iterator[NumberedRow]:
    csv.field_size_limit(_LONGEST_FIELD)
    # what is not UTF-8 becomes surrogates, which spoil their own row and no other
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            columns = list(reader.fieldnames or [])
        except csv.Error as error:
            raise UserError(f"{path} is no table of comma-separated values: {error}") from None
        _require_file_name(path, columns, settings)
        while True:
            try:
                row: Row = dict(next(reader))
            except StopIteration:
                return
            except csv.Error as error:
                yield reader.line_num, {}, f"is no row of comma-separated values: {error}"
            else:
                more = None in row  # a comma in a caption without quotes would cut the caption off unseen
                yield reader.line_num, row, "has more values than columns: put captions with commas in quotes" if more else ""


def _read_jsonl(path: Path, settings: Dataset) -> Iterator[NumberedRow]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_LONGEST_LINE):
            number += 1
            if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
                while (rest := file.readline(_LONGEST_LINE)) and not rest.endswith(b"\n"):
                    pass
                yield number, {}, f"is longer than {_LONGEST_LINE} bytes"
            elif line.strip():
                row, fault = read_json_object(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
                yield number, row, fault


def _read_parquet(path: Path, settings: Dataset) -> Iterator[NumberedRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as table:
            _require_file_name(path, table.schema_arrow.names, settings)
            wanted = {"file_name", f"{settings.image_column}_file_name", settings.caption_column, *CAPTION_COLUMNS}
            columns = [name for name in table.schema_arrow.names if name in wanted]
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row, ""
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if not number:
            raise UserError(f"{path} cannot be read as parquet ({type(error).__name__})") from None
        yield number + 1, {}, f"is damaged from here on ({type(error).__name__})"


def _require_file_name(path: Path, columns: list[str], settings: Dataset) -> None:
    wanted = ("file_name", f"{settings.image_column}_file_name")
    if not set(wanted) & set(columns):
        raise UserError(
            f"{path} has no column {' or '.join(wanted)}: found {', '.join(shown(c) for c in columns[:20]) or 'none'}; "
            "it must name each row's picture, relative to the metadata file"
        )


SOURCE = ImageFolder()
