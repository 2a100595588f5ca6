"""Parquet files that hold the pictures' bytes, as datasets are exported to the Hub.

The columns mean what Hugging Face's `datasets` says of them; a picture is a struct {bytes, path} or plain bytes. The rows come
straight from Arrow, one row group in memory at a time: `datasets`, streaming, reads ahead to the end of the file (48 MB held of a
file of 48 MB, against 10). Nothing is decoded, fetched or cached. All files below the folder are read, whatever split their names
tell of: held-out pictures are chosen by `dataset.held_out_fraction`. https://huggingface.co/docs/datasets/image_dataset
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.config import Dataset
from pipeline.dataset.rows import CAPTION_COLUMNS, LINK_OUT, caption_value, captions_of, names_like, shown, sorted_scan, unfit
from pipeline.dataset.source import Found, Reject, Scan, captions_needed, is_inside
from pipeline.dataset.unpack import unpack
from pipeline.errors import UserError

_ROWS = 4  # held in memory at a time: each may be a picture of many megabytes
_LABEL = "label"  # column of classes in datasets of classified pictures


class Parquet:
    """See `pipeline.dataset.source.Source`."""

    name = "parquet"

    def detect(self, folder: Path, settings: Dataset) -> bool:
        return bool(_tables(folder))

    def scan(self, folder: Path, settings: Dataset, unpacked: Path, check_stop: Callable[[], None]) -> Scan:
        tables = _tables(folder)
        if not tables:
            raise unfit(folder, self.name, "files named *.parquet are looked for in it and its sub-folders")
        found: list[Found] = []
        rejects: list[Reject] = []
        for table in tables:
            if not table.isprintable() or not is_inside(folder / table, folder):
                rejects.append(Reject(shown(table), LINK_OUT if table.isprintable() else "has a name that cannot be printed"))
                continue
            number = 0
            try:
                for row in _read(folder / table, settings):
                    check_stop()
                    number += 1
                    item, fault = _found(row, settings, unpacked)
                    if fault:
                        rejects.append(Reject(f"{table}, row {number}", fault))
                    elif item:
                        found.append(item)
            except _Unreadable as error:
                rejects.append(Reject(table, f"after {number} rows, {error}" if number else str(error)))
        return sorted_scan(found, rejects)


class _Unreadable(Exception):
    """The file, or what is left of it, cannot be read; the message is the reason."""


def _tables(folder: Path) -> list[str]:
    return [name for name in names_like(folder, "*.parquet") if Path(name).name != "metadata.parquet"]


def _found(row: Mapping[str, Any], settings: Dataset, unpacked: Path) -> tuple[Found | None, str]:
    picture = row["picture"]
    data = picture.get("bytes") if isinstance(picture, Mapping) else None
    if not data:
        path = picture.get("path") if isinstance(picture, Mapping) else None
        return None, f"holds no picture's bytes but the path {shown(str(path))}" if path else "holds no picture"
    value, no_value = caption_value(row["rest"], settings.caption_column)
    captions, no_caption = captions_of(value, settings.caption_lines)
    if fault := no_value or no_caption:
        return None, fault
    name, fault = unpack(data, unpacked)
    return (None, fault) if fault else (Found(name, captions, class_name=row["class_name"], unpacked=True), "")


def _read(path: Path, settings: Dataset) -> Iterator[dict[str, Any]]:
    """Picture ({bytes, path}), class name and the other columns of each row.

    Raises:
        _Unreadable: the file is damaged, or has no pictures.
        UserError: it has pictures and no captions.
    """
    import datasets
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as table:
            features = datasets.Features.from_arrow_schema(table.schema_arrow)
            column = _picture_column(features, settings)
            _refuse_without_captions(path, list(features), settings)
            usual = {settings.caption_column, *CAPTION_COLUMNS, _LABEL} - {column}
            rest = [name for name in features if name in usual]
            names = features.get(_LABEL)
            for batch in table.iter_batches(batch_size=_ROWS, columns=[column, *rest], use_threads=False):
                for row in batch.to_pylist():
                    label = row.get(_LABEL)
                    if isinstance(names, datasets.ClassLabel) and isinstance(label, int) and 0 <= label < names.num_classes:
                        label = names.int2str(label)
                    picture = row[column]
                    yield {
                        "picture": {"bytes": picture} if isinstance(picture, bytes) else picture,
                        "class_name": label if isinstance(label, str) and label.isprintable() else "",
                        "rest": {name: row[name] for name in rest if name != _LABEL or name == settings.caption_column},
                    }
    except (UserError, _Unreadable):
        raise
    except Exception as error:  # a damaged file makes Arrow raise nearly anything
        raise _Unreadable(f"cannot be read as parquet ({type(error).__name__})") from None


def _picture_column(features: Mapping[str, Any], settings: Dataset) -> str:
    """`dataset.image_column`, else the only column that looks like pictures."""
    import datasets

    if settings.image_column in features:
        return settings.image_column
    alike = [
        name
        for name, kind in features.items()
        if isinstance(kind, datasets.Image) or (isinstance(kind, dict) and "bytes" in kind)
    ]
    if len(alike) == 1:
        return alike[0]
    columns = ", ".join(shown(name) for name in list(features)[:20])
    raise _Unreadable(f"has no column {settings.image_column} of pictures; it has {columns}: name it in dataset.image_column")


def _refuse_without_captions(path: Path, columns: list[str], settings: Dataset) -> None:
    if captions_needed(settings) and not {settings.caption_column, *CAPTION_COLUMNS} & set(columns):
        raise UserError(
            f"dataset.caption_column: {path} has no column {settings.caption_column}; it has "
            f"{', '.join(shown(name) for name in columns[:20])}: name the one that holds the captions"
        )


SOURCE = Parquet()
