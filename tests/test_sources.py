"""Sources: every form in which people keep pictures and captions, written by its own library or as its documentation shows."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config import Dataset
from pipeline.dataset.source import Scan, visible_files
from pipeline.dataset.sources import SOURCES, source_of
from pipeline.errors import Interrupted, UserError


def settings(**changes: object) -> Dataset:
    return Dataset(**{"path": "data", "resolution": 32, **changes})


def scan(folder: Path, **changes: Any) -> Scan:
    chosen = settings(**changes)
    return source_of(folder, chosen).scan(folder, chosen, folder.parent / "unpacked", lambda: None)


def captions(result: Scan) -> dict[str, tuple[str, ...]]:
    assert len({f.path for f in result.found}) == len(result.found)
    return {f.path: f.captions for f in result.found}


def reasons(result: Scan) -> dict[str, str]:
    return {r.path: r.reason for r in result.rejects}


def picture(number: int, format: str = "PNG") -> bytes:
    """A picture told by its number, so that a swapped caption is seen."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(file, format)
    return file.getvalue()


def put(path: Path, content: bytes | str = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


# --- each form, as others write it ----------------------------------------------------------------------------------------


def sidecar_files(folder: Path) -> None:
    put(folder / "a.png", picture(1))
    put(folder / "a.txt", "a cat\n")
    put(folder / "deep/er/b.jpg", picture(2, "JPEG"))
    put(folder / "deep/er/b.caption", "a dog")
    put(folder / "c.webp", picture(3, "WEBP"))
    put(folder / "c.txt", "by the configured extension")
    put(folder / "c.caption", "not this one")
    put(folder / "d.png", picture(4))
    put(folder / ".hidden/e.png", picture(5))


def two_folder_files(folder: Path) -> None:
    put(folder / "images/a.png", picture(1))
    put(folder / "images/x/b.png", picture(2))
    put(folder / "texts/a.txt", "a cat")
    put(folder / "texts/x/b.txt", "a dog")


def two_folder_files_called_captions(folder: Path) -> None:
    put(folder / "images/a.png", picture(1))
    put(folder / "captions/a.caption", "a cat")


def metadata_csv(folder: Path) -> None:
    """As https://huggingface.co/docs/datasets/image_dataset shows it, in a split's folder."""
    for number, name in enumerate(("0001.png", "0002.png", "sub/0003.png", "0004.png")):
        put(folder / "train" / name, picture(number))
    with (folder / "train/metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows(
            [
                ("file_name", "text"),
                ("0001.png", "a cat, on a mat"),
                ("0002.png", "two\nlines"),
                ("sub/0003.png", 'he said "no"'),
            ]
        )


def metadata_jsonl(folder: Path) -> None:
    for number in range(3):
        put(folder / f"{number}.png", picture(number))
    rows = [{"file_name": "0.png", "prompt": ["a cat", "the cat"]}, {"file_name": "1.png", "prompt": ["ein Hund — ü"]}]
    put(folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def metadata_parquet(folder: Path) -> None:
    import datasets

    for number in range(2):
        put(folder / f"{number}.png", picture(number))
    rows = {"file_name": ["0.png", "1.png"], "caption": [["a cat", "the cat"], ["a dog"]], "other": [1, 2]}
    datasets.Dataset.from_dict(rows).to_parquet(folder / "metadata.parquet")


def class_folders(folder: Path) -> None:
    put(folder / "cat/a.png", picture(1))
    put(folder / "dog/b.png", picture(2))


def kohya_folders(folder: Path) -> None:
    """As sd-scripts' --train_data_dir wants it."""
    put(folder / "10_sks dog/a.png", picture(1))
    put(folder / "10_sks dog/a.txt", "sks dog, sitting")
    put(folder / "10_sks dog/b.png", picture(2))
    put(folder / "2_a_cat/c.png", picture(3))
    put(folder / "2_a_cat/c.caption", "a cat, sleeping")


def kohya_meta(folder: Path) -> None:
    """As `merge_captions_to_metadata.py`, `merge_dd_tags_to_metadata.py` and `prepare_buckets_latents.py` make it, one after the
    other: json.dump(metadata, f, indent=2), keys are bare stems."""
    for number, name in enumerate(("a.png", "b.one.png", "c.jpg", "d.png")):
        put(folder / name, picture(number))
    early = {"a": {"caption": "an early caption"}}
    late = {
        "a": {"caption": "a cat", "tags": "1cat, sitting", "train_resolution": [512, 768]},
        "b.one": {"caption": "a dog", "train_resolution": [640, 640]},
        "c": {"tags": "1bird, solo", "train_resolution": (640, 640)},
    }
    put(folder / "meta_cap.json", json.dumps(early, indent=2))
    put(folder / "meta_lat.json", json.dumps(late, indent=2))


def kohya_meta_full_path(folder: Path) -> None:
    """With --full_path --recursive, the second entry made on another machine."""
    put(folder / "x/a.png", picture(1))
    put(folder / "y/a.png", picture(2))
    put(folder / "y/b.png", picture(3))
    meta = {
        str(folder / "x/a.png"): {"caption": "first"},
        "/content/drive/train/y/a.png": {"caption": "second"},
        "C:\\train\\y\\b.png": {"caption": "third"},
    }
    put(folder / "meta_cap.json", json.dumps(meta, indent=2))


def hub_export(folder: Path) -> None:
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    (folder / "data").mkdir()
    for shard in range(2):
        numbers = range(shard * 3, shard * 3 + 3)
        rows = {
            "image": [{"bytes": picture(n, "JPEG" if n % 2 else "PNG"), "path": f"{n}.png"} for n in numbers],
            "text": [f"caption {n}" for n in numbers],
            "label": [n % 2 for n in numbers],
        }
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(folder / f"data/train-{shard:05}-of-00002.parquet", batch_size=2)


def tar_shards(folder: Path) -> None:
    """Members in pairs, as the `webdataset` and `img2dataset` writers leave them."""
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as archive:
            for number in range(shard * 3, shard * 3 + 3):
                row = {"caption": f"caption {number}", "key": f"{number:05}", "width": 8}
                add(archive, f"{number:05}.jpg", picture(number, "JPEG"))
                add(archive, f"{number:05}.json", json.dumps(row).encode())
                add(archive, f"{number:05}.txt", f"caption {number}".encode())


def add(archive: tarfile.TarFile, name: str, content: bytes = b"", **fields: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in fields.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


FORMS: list[tuple[Callable[[Path], None], str, dict[str, tuple[str, ...]]]] = [
    (
        sidecar_files,
        "sidecar",
        {"a.png": ("a cat",), "c.webp": ("by the configured extension",), "d.png": (), "deep/er/b.jpg": ("a dog",)},
    ),
    (two_folder_files, "two-folders", {"images/a.png": ("a cat",), "images/x/b.png": ("a dog",)}),
    (two_folder_files_called_captions, "two-folders", {"images/a.png": ("a cat",)}),
    (
        metadata_csv,
        "imagefolder",
        {
            "train/0001.png": ("a cat, on a mat",),
            "train/0002.png": ("two lines",),
            "train/0004.png": (),
            "train/sub/0003.png": ('he said "no"',),
        },
    ),
    (metadata_jsonl, "imagefolder", {"0.png": ("a cat", "the cat"), "1.png": ("ein Hund — ü",), "2.png": ()}),
    (metadata_parquet, "imagefolder", {"0.png": ("a cat", "the cat"), "1.png": ("a dog",)}),
    (class_folders, "imagefolder", {"cat/a.png": (), "dog/b.png": ()}),
    (
        kohya_folders,
        "kohya",
        {
            "10_sks dog/a.png": ("sks dog, sitting",),
            "10_sks dog/b.png": ("sks dog",),
            "2_a_cat/c.png": ("a cat, sleeping",),
        },
    ),
    (
        kohya_meta,
        "kohya-json",
        {"a.png": ("a cat,1cat, sitting",), "b.one.png": ("a dog",), "c.jpg": ("1bird, solo",), "d.png": ()},
    ),
    (kohya_meta_full_path, "kohya-json", {"x/a.png": ("first",), "y/a.png": ("second",), "y/b.png": ("third",)}),
]
PACKED = [(hub_export, "parquet"), (tar_shards, "webdataset")]
ALL = [(write, format) for write, format, _ in FORMS] + PACKED


@pytest.mark.parametrize(("write", "format", "expected"), FORMS, ids=lambda v: getattr(v, "__name__", ""))
def test_every_picture_meets_its_caption(folder: Path, write: Any, format: str, expected: Any) -> None:
    write(folder)
    assert source_of(folder, settings()).name == format
    for named in ("auto", format):
        result = scan(folder, format=named)
        assert captions(result) == expected and not result.rejects
        assert not any(f.unpacked for f in result.found)
    assert not (folder.parent / "unpacked").exists()


@pytest.mark.parametrize(("write", "format"), PACKED, ids=lambda v: getattr(v, "__name__", ""))
def test_packed_pictures_come_out_byte_for_byte_and_once(folder: Path, write: Any, format: str) -> None:
    write(folder)
    result = scan(folder)
    assert source_of(folder, settings()).name == format and not result.rejects and len(result.found) == 6
    unpacked = folder.parent / "unpacked"
    whole = {}
    for item in result.found:
        number = int(item.captions[0].removeprefix("caption "))
        jpeg = format == "webdataset" or number % 2
        assert (unpacked / item.path).read_bytes() == picture(number, "JPEG" if jpeg else "PNG")
        assert item.unpacked and item.path.endswith(".jpg" if jpeg else ".png")
        whole[number] = item
    assert sorted(whole) == list(range(6))
    if format == "parquet":
        assert [whole[n].class_name for n in range(6)] == ["cat", "dog"] * 3
    before = {p.name: p.stat().st_mtime_ns for p in unpacked.iterdir()}
    assert sorted(before) == [f.path for f in result.found]
    assert scan(folder) == result
    assert {p.name: p.stat().st_mtime_ns for p in unpacked.iterdir()} == before, "nothing is written twice"


def test_repeats_and_class_names(folder: Path) -> None:
    kohya_folders(folder)
    found = {f.path: f for f in scan(folder).found}
    assert [(f.repeats, f.class_name) for f in found.values()] == [(10, "sks dog"), (10, "sks dog"), (2, "a_cat")]


def test_class_folders_name_the_class(folder: Path) -> None:
    class_folders(folder)
    assert {f.path: f.class_name for f in scan(folder).found} == {"cat/a.png": "cat", "dog/b.png": "dog"}


@pytest.mark.parametrize("write", [metadata_csv, metadata_jsonl, metadata_parquet], ids=lambda v: v.__name__)
def test_imagefolder_reads_the_rows_that_datasets_reads(folder: Path, write: Any, tmp_path: Path) -> None:
    import datasets

    write(folder)
    theirs = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    theirs = theirs.cast_column("image", datasets.Image(decode=False))
    column = next(name for name in ("text", "prompt", "caption") if name in theirs.column_names)
    ours = captions(scan(folder))
    for row in theirs:
        name = Path(row["image"]["path"]).relative_to(folder).as_posix()
        texts = row[column] if isinstance(row[column], list) else [row[column]]
        assert ours[name] == tuple(" ".join(text.split()) for text in texts)


def test_webdataset_reads_the_samples_that_datasets_reads(folder: Path, tmp_path: Path) -> None:
    import datasets

    tar_shards(folder)
    files = sorted(str(p) for p in folder.iterdir())
    theirs = datasets.load_dataset(
        "webdataset", data_files=files, split="train", streaming=True, cache_dir=str(tmp_path / "cache")
    ).cast_column("jpg", datasets.Image(decode=False))
    result = scan(folder)
    ours = {((folder.parent / "unpacked" / f.path).read_bytes(), f.captions[0]) for f in result.found}
    assert ours == {(row["jpg"]["bytes"], row["txt"]) for row in theirs} and len(ours) == 6


def test_parquet_reads_the_rows_that_datasets_reads(folder: Path, tmp_path: Path) -> None:
    import datasets

    hub_export(folder)
    files = sorted(str(p) for p in folder.rglob("*.parquet"))
    theirs = datasets.load_dataset(
        "parquet", data_files=files, split="train", streaming=True, cache_dir=str(tmp_path / "cache")
    )
    theirs = theirs.cast_column("image", datasets.Image(decode=False))
    ours = {((folder.parent / "unpacked" / f.path).read_bytes(), f.captions[0]) for f in scan(folder).found}
    assert ours == {(row["image"]["bytes"], row["text"]) for row in theirs} and len(ours) == 6


def test_the_order_does_not_depend_on_the_file_system(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rglob = Path.rglob
    for write, _ in ALL:
        place = folder / write.__name__
        place.mkdir()
        write(place)
        straight = scan(place)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rglob", lambda path, pattern: iter(sorted(rglob(path, pattern), reverse=True)))
            assert scan(place) == straight
        assert [f.path for f in straight.found] == sorted(f.path for f in straight.found)


@pytest.mark.parametrize(("write", "format"), ALL, ids=lambda v: getattr(v, "__name__", ""))
def test_a_stop_is_heeded_and_nothing_is_asked_of_a_network(
    folder: Path, write: Any, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder)

    def no_network(*args: object) -> None:
        raise AssertionError("something was asked of a network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    assert scan(folder).found
    if format in ("parquet", "webdataset", "kohya-json") or write.__name__.startswith("metadata"):

        def stop() -> None:
            raise Interrupted("now")

        with pytest.raises(Interrupted):
            source_of(folder, settings()).scan(folder, settings(), folder.parent / "unpacked", stop)


def test_memory_is_one_row_groups_however_long_the_file(folder: Path) -> None:
    """48 MB in row groups of 2 MB; Arrow's own count of what it held at most, in a process of its own."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    table = pa.table({"image": [picture(n) + rng.bytes(2**20) for n in range(48)], "text": [f"{n}" for n in range(48)]})
    pq.write_table(table, folder / "x.parquet", row_group_size=2)
    script = """
import sys
from pathlib import Path
from pipeline.config import Dataset
from pipeline.dataset.parquet import SOURCE
data = Path(sys.argv[1])
found = SOURCE.scan(data, Dataset(path="data", resolution=32), data.parent / "unpacked", lambda: None).found
import pyarrow
print(len(found), pyarrow.default_memory_pool().max_memory())
"""
    command = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    found, peak = map(int, done.stdout.split())
    assert found == 48 and 0 < peak < 16 * 2**20, peak


# --- choosing -------------------------------------------------------------------------------------------------------------


def test_every_format_of_the_settings_has_its_source() -> None:
    from typing import get_args

    from pipeline.config import Format

    assert {source.name for source in SOURCES} == set(get_args(Format)) - {"auto"}


@pytest.mark.parametrize("format", ["two-folders", "imagefolder", "kohya", "kohya-json", "parquet", "webdataset", "sidecar"])
def test_a_named_format_that_does_not_fit_is_said(folder: Path, format: str) -> None:
    put(folder / "notes.md", "hello")
    with pytest.raises(UserError, match=rf"dataset\.path: no picture .*{'' if format == 'sidecar' else format}"):
        scan(folder, format=format)


def test_no_folder_and_mixed_forms(folder: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        source_of(folder / "nowhere", settings())
    tar_shards(folder)
    put(folder / "preview.png", picture(9))
    with pytest.raises(UserError, match=r"holds webdataset files and loose pictures"):
        source_of(folder, settings())
    assert len(scan(folder, format="webdataset").found) == 6
    (folder / "preview.png").unlink()
    hub_export(folder)
    with pytest.raises(UserError, match=r"holds parquet files and webdataset"):
        source_of(folder, settings())


def test_a_missing_caption_column_names_those_that_are_there(folder: Path) -> None:
    put(folder / "a.png", picture(1))
    put(folder / "metadata.csv", "file_name,legend,size\na.png,a cat,3\n")
    with pytest.raises(
        UserError, match=r"dataset\.caption_column: metadata\.csv has no column text; it has file_name, legend, size"
    ):
        scan(folder)
    assert captions(scan(folder, caption_column="legend")) == {"a.png": ("a cat",)}
    assert captions(scan(folder, missing_caption="folder-name")) == {"a.png": ()}


def test_two_usual_columns_need_a_choice(folder: Path) -> None:
    put(folder / "a.png", picture(1))
    put(folder / "metadata.jsonl", json.dumps({"file_name": "a.png", "caption": "one", "prompt": "two"}))
    assert "has several captions (caption, prompt)" in reasons(scan(folder))["metadata.jsonl:1"]
    assert captions(scan(folder, caption_column="prompt")) == {"a.png": ("two",)}


def test_other_columns_of_packed_pictures(folder: Path) -> None:
    import datasets

    rows = {"photo": [{"bytes": picture(1), "path": None}], "legend": [["a cat", "the cat"]], "text": ["not this"]}
    features = {"photo": datasets.Image(), "legend": datasets.List(datasets.Value("string")), "text": datasets.Value("string")}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(folder / "a[1] *.parquet")
    (item,) = scan(folder, caption_column="legend").found
    assert item.captions == ("a cat", "the cat")
    with pytest.raises(UserError, match=r"dataset\.caption_column: .* has no column nothing"):
        put(folder / "b" / "x")
        datasets.Dataset.from_dict({"photo": rows["photo"], "y": [1]}).cast_column("photo", datasets.Image()).to_parquet(
            folder / "b.parquet"
        )
        scan(folder, caption_column="nothing")


def test_lines_are_variants_where_asked(folder: Path) -> None:
    put(folder / "a.png", picture(1))
    put(folder / "metadata.jsonl", json.dumps({"file_name": "a.png", "text": "one\n\ntwo"}))
    assert captions(scan(folder, caption_lines=True)) == {"a.png": ("one", "two")}
    (folder / "metadata.jsonl").unlink()
    put(folder / "meta_cap.json", json.dumps({"a": {"caption": "one\ntwo", "tags": "x, y"}}))
    assert captions(scan(folder, caption_lines=True)) == {"a.png": ("one,x, y", "two,x, y")}


def test_rows_of_one_picture_are_variants_of_its_caption(folder: Path) -> None:
    put(folder / "a.png", picture(1))
    put(folder / "metadata.csv", "file_name,text\na.png,one\na.png,two\na.png,one\n")
    assert captions(scan(folder)) == {"a.png": ("one", "two")}


# --- what is wrong is said, sample by sample ---------------------------------------------------------------------------------


def test_rows_that_cannot_be_used_have_their_line_and_reason(folder: Path) -> None:
    for name in "abcdef":
        put(folder / f"{name}.png", picture(1))
    table = b"file_name,text\na.png,good\nmissing.png,x\n,x\nb.png,a cat, and a dog\nc.png,bad \xff bytes\nd.png,%s\ne.png\nf.png,\n"
    put(folder / "metadata.csv", table % (b"x" * 10_001))
    result = scan(folder)
    assert captions(result) == {"a.png": ("good",), "e.png": (), "f.png": ()}
    assert reasons(result) == {
        "metadata.csv:3": "names missing.png, which is not there",
        "metadata.csv:4": "names no picture",
        "metadata.csv:5": "has more values than columns: put captions with commas in quotes (b.png)",
        "metadata.csv:6": "the caption holds control characters (c.png)",
        "metadata.csv:7": "the caption has 10001 characters; at most 10000 are allowed (d.png)",
    }


def test_lines_of_json_that_cannot_be_used(folder: Path) -> None:
    put(folder / "a.png", picture(1))
    lines = ["{", "[]", '{"text": "x"}', '{"file_name": 3}', '{"file_name": "a.png", "text": 7}', "[" * 100_000, "9" * 5_000]
    put(folder / "metadata.jsonl", "\n".join(lines).encode() + b"\n\xff\n" + b'{"file_name": "a.png", "text": "good"}')
    result = scan(folder)
    assert captions(result) == {"a.png": ("good",)}
    said = reasons(result)
    assert [said.pop(f"metadata.jsonl:{n}").split(":")[0] for n in (1, 6, 7, 8)] == ["is not JSON"] * 3 + [
        "is not UTF-8 text (byte 0)"
    ]
    assert said == {
        "metadata.jsonl:2": "is no JSON object",
        "metadata.jsonl:3": "names no picture",
        "metadata.jsonl:4": "names no picture",
        "metadata.jsonl:5": "has a caption that is no text but int (a.png)",
    }


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", b"name,text\na.png,x\n"),
        ("metadata.csv", b""),
        ("metadata.csv", "file_name,text\na.png,x\n".encode("utf-16")),
        ("metadata.parquet", b"PAR1 not really"),
        ("metadata.parquet", b""),
        ("meta_cap.json", b"{"),
        ("meta_cap.json", b"[1]"),
        ("meta_cap.json", b"\xff\xfe{}"),
        ("meta_cap.json", b"[" * 100_000),
    ],
)
def test_metadata_that_cannot_be_read_at_all_is_named(folder: Path, name: str, content: bytes) -> None:
    put(folder / "a.png", picture(1))
    put(folder / name, content)
    with pytest.raises(UserError, match=re.escape(str(folder / name))):
        scan(folder)


def test_what_kohyas_json_cannot_settle_is_rejected(folder: Path) -> None:
    for name in ("x/a.png", "y/a.png", "b.png", "b.jpg", "c.png", "d.png", "e.png"):
        put(folder / name, picture(1))
    meta = {
        "a": {"caption": "?"},
        "b": {"caption": "?"},
        "c": "text",
        "d": {"tags": 3},
        "e": {"caption": "1"},
        "e.png": {},
        "f": {},
    }
    put(folder / "meta_cap.json", json.dumps(meta))
    said = reasons(scan(folder))
    assert said == {
        "meta_cap.json: a": "may mean x/a.png or y/a.png: give the path with its extension",
        "meta_cap.json: b": "may mean b.jpg or b.png: give the path with its extension",
        "c.png": "has an entry that is no object but str (meta_cap.json)",
        "d.png": "has a caption or tags that are no text but int (meta_cap.json)",
        "e.png": "meta_cap.json names it more than once (e and e.png): leave one",
        "meta_cap.json: f": "names a picture that is not there",
    }


def test_kohyas_form_of_one_object_a_line(folder: Path) -> None:
    put(folder / "a.png", picture(1))
    put(folder / "meta_all.jsonl", '{"image_path": "/old/place/a.png", "caption": "a cat", "image_size": [8, 8]}\n{}\nx\n')
    result = scan(folder)
    assert captions(result) == {"a.png": ("a cat",)}
    assert [r.path for r in result.rejects] == ["meta_all.jsonl: line 2", "meta_all.jsonl: line 3"]


def test_kohya_folders_leave_nothing_out_in_silence(folder: Path) -> None:
    kohya_folders(folder)
    put(folder / "0_unused/x.png", picture(4))
    put(folder / "others/y.png", picture(5))
    put(folder / "20240131_walk/z.png", picture(6))
    put(folder / "10_sks dog/lonely.txt", "nothing to see")
    assert reasons(scan(folder)) == {
        "0_unused/x.png": "lies in a folder that is repeated 0 times: give it 1 or more, or remove it",
        "10_sks dog/lonely.txt": "is a caption without a picture of the same name",
        "20240131_walk/z.png": "lies in no folder named like `10_token class`",
        "others/y.png": "lies in no folder named like `10_token class`",
    }


def test_two_folders_leave_nothing_out_in_silence(folder: Path) -> None:
    two_folder_files(folder)
    put(folder / "preview.png", picture(3))
    put(folder / "texts/x/lonely.txt", "nothing to see")
    put(folder / "images/a.jpg", picture(4, "JPEG"))
    assert reasons(scan(folder)) == {
        "images/a.png": "shares its caption file with images/a.jpg: give one of them another name",
        "preview.png": "lies outside images/",
        "texts/x/lonely.txt": "is a caption without a picture of the same name",
    }


def test_broken_rows_of_parquet_spoil_no_others(folder: Path) -> None:
    import datasets

    images = [
        {"bytes": picture(1), "path": None},
        None,
        {"bytes": None, "path": "/etc/passwd"},
        {"bytes": b"<html>", "path": None},
    ]
    images += [{"bytes": picture(2), "path": None}] * 2
    rows = {"image": images, "text": ["good", "x", "x", "x", "bad \x00", None]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "a.parquet")
    put(folder / "b.parquet", (folder / "a.parquet").read_bytes()[:-9])
    datasets.Dataset.from_dict({"text": ["x"], "n": [1]}).to_parquet(folder / "c.parquet")
    result = scan(folder)
    assert sorted(f.captions for f in result.found) == [(), ("good",)]
    assert reasons(result) == {
        "a.parquet, row 2": "holds no picture",
        "a.parquet, row 3": "holds no picture's bytes but the path /etc/passwd",
        "a.parquet, row 4": "is no picture of a known kind (PNG, JPEG, WebP, GIF, TIFF, BMP)",
        "a.parquet, row 5": "the caption holds control characters",
        "b.parquet": "cannot be read as parquet (ArrowInvalid)",
        "c.parquet": "has no column image of pictures; it has text, n: name it in dataset.image_column",
    }


def test_broken_samples_of_a_shard_spoil_no_others(folder: Path) -> None:
    with tarfile.open(folder / "a.tar", "w") as archive:
        add(archive, "0.png", picture(1))
        add(archive, "0.txt", b"good")
        add(archive, "1.png", picture(2))
        add(archive, "1.txt", b"\xff\xfe")
        add(archive, "2.png", picture(3))
        add(archive, "2.json", b"{")
        add(archive, "3.txt", b"no picture")
        add(archive, "4.png", picture(4))
        add(archive, "4.jpg", picture(5, "JPEG"))
        add(archive, "5.png", b"no picture at all")
        add(archive, "6.png", picture(6))
        add(archive, "6.mask.png", picture(7))
        add(archive, "6.cls", b"3")
        add(archive, "7.png", picture(7))
        add(archive, "7.png", picture(8))
        add(archive, "sub/8.png", picture(9))
    put(folder / "b.tar", b"this is no archive")
    broken = bytearray((folder / "a.tar").read_bytes())
    at = broken.index(b"1.png")
    broken[at] = ord("9")  # the header's checksum no longer fits, and what follows cannot be found
    put(folder / "d.tar", bytes(broken))
    put(folder / "c.tar", (folder / "a.tar").read_bytes()[: 512 + 512 + 512 + 2])
    result = scan(folder)
    assert sorted((f.captions, f.class_name) for f in result.found) == [((), ""), ((), "sub"), (("good",), "")], (
        "d.tar ends after its first sample"
    )
    assert reasons(result) == {
        "a.tar, 1": "txt: is not UTF-8 text (byte 0)",
        "a.tar, 2": "json: is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        "a.tar, 3": "is a caption without a picture of the same name",
        "a.tar, 4": "holds several pictures (png, jpg): name one in dataset.image_column",
        "a.tar, 5": "is no picture of a known kind (PNG, JPEG, WebP, GIF, TIFF, BMP)",
        "a.tar, 7": "holds png twice",
        "b.tar": "cannot be read as tar after 0 members (ReadError)",
        "c.tar": "cannot be read as tar after 2 members (ReadError)",
        "c.tar, 0": "may be cut off: the archive is damaged here",
        "d.tar": "cannot be read as tar after 2 members (ReadError)",
        "d.tar, 0": "may be cut off: the archive is damaged here",
    }
    assert len(scan(folder, image_column="jpg").found) == 4


def test_where_a_shards_captions_come_from(folder: Path) -> None:
    with tarfile.open(folder / "a.tar.gz", "w:gz") as archive:
        add(archive, "0.JPG", picture(1, "JPEG"))
        add(archive, "0.json", json.dumps({"text": "from the column"}).encode())
        add(archive, "0.txt", b"from the file")
        add(archive, "1.jpg", picture(2, "JPEG"))
        add(archive, "1.json", json.dumps({"prompt": "from the only usual column"}).encode())
        add(archive, "2.jpg", picture(3, "JPEG"))
        add(archive, "2.json", json.dumps({"prompt": "not this"}).encode())
        add(archive, "2.caption", b"from the file")
    said = sorted(f.captions for f in scan(folder).found)
    assert said == [("from the column",), ("from the file",), ("from the only usual column",)]


# --- hostile input ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A picture that no dataset may reach."""
    return put(tmp_path / "secret.png", picture(200))


def files_but(folder: Path, *left_out: str) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.parts[len(folder.parts)] not in left_out}


NAMES = ["../secret.png", "x/../../secret.png", "..\\secret.png", "file:///secret.png", "C:\\secret.png", "http://x/y.png"]


@pytest.mark.parametrize("name", [*NAMES, "ABSOLUTE", "link.png", "linked/secret.png", "a\0.png", "😀" * 1000, "a" * 10**6])
@pytest.mark.parametrize("table", ["metadata.csv", "metadata.jsonl", "metadata.parquet", "meta_cap.json", "meta.jsonl"])
def test_metadata_reaches_nothing_outside(folder: Path, outside: Path, table: str, name: str) -> None:
    import datasets

    name = str(outside) if name == "ABSOLUTE" else name
    put(folder / "inside.png", picture(1))
    (folder / "link.png").symlink_to(outside)
    (folder / "linked").symlink_to(outside.parent)
    row = {"file_name": name, "text": "a secret"}
    if table == "metadata.csv":
        with (folder / table).open("w", newline="") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerow(row)
    elif table == "metadata.jsonl":
        put(folder / table, json.dumps(row))
    elif table == "metadata.parquet":
        datasets.Dataset.from_list([row]).to_parquet(folder / table)
    elif table == "meta_cap.json":
        put(folder / table, json.dumps({name: {"caption": "a secret"}}))
    else:
        table = "meta_x.jsonl"
        put(folder / table, json.dumps({"image_path": name, "caption": "a secret"}))
    result = scan(folder)
    assert captions(result) == {"inside.png": ()}
    assert any(r.path.startswith(table) for r in result.rejects)
    assert reasons(result)["link.png"] == "is a link out of the dataset's folder"
    printable(result)


def printable(result: Scan) -> None:
    for reject in result.rejects:
        assert reject.reason and (reject.path + reject.reason).isprintable() and len(reject.path + reject.reason) < 1000, reject
    for item in result.found:
        assert item.path.isprintable()
        assert not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for caption in item.captions for c in caption)


@pytest.mark.parametrize(
    "name", ["../evil.png", "/evil.png", "x/../../evil.png", "..\\evil.png", "C:/evil.png", "a\nb/evil.png"]
)
def test_members_of_an_archive_are_written_nowhere_else(folder: Path, outside: Path, tmp_path: Path, name: str) -> None:
    with tarfile.open(folder / "a.tar", "w") as archive:
        add(archive, name, picture(1))
        add(archive, "good.png", picture(2))
        add(archive, "link.png", type=tarfile.SYMTYPE, linkname=str(outside))
        add(archive, "hard.png", type=tarfile.LNKTYPE, linkname="../secret.png")
        add(archive, "pipe.png", type=tarfile.FIFOTYPE)
        add(archive, "disk.png", type=tarfile.BLKTYPE)
        add(archive, "dir", type=tarfile.DIRTYPE)
        add(archive, "y" * 100_000 + ".png", b"x")
    before = files_but(tmp_path, "unpacked")
    result = scan(folder)
    assert files_but(tmp_path, "unpacked") == before
    (item,) = result.found
    assert [p.name for p in (tmp_path / "unpacked").iterdir()] == [item.path]
    said = reasons(result)
    assert [said[f"a.tar, {name}"] for name in ("link", "hard", "pipe", "disk")] == ["is a link or a device"] * 4
    assert len(result.rejects) == 6
    printable(result)


def test_headers_that_promise_more_than_there_is(folder: Path) -> None:
    """A size of exabytes, a negative size (which made older tarfile turn for ever), a sparse file of a terabyte."""
    for name, size in (("huge", b"\x80\0\0\0\x7f" + b"\xff" * 7), ("negative", b"\xff" * 11 + b"\xf0")):
        member = tarfile.TarInfo("0.png")
        header = bytearray(member.tobuf())
        header[124:136] = size
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        put(folder / f"{name}.tar", bytes(header) + picture(1))
    sparse = tarfile.TarInfo("1.png")
    sparse.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.map": "0,1",
        "GNU.sparse.size": str(2**40),
        "GNU.sparse.name": "1.png",
    }
    with tarfile.open(folder / "sparse.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(sparse)
    result = scan(folder)
    assert not result.found and {r.path.split(",")[0] for r in result.rejects} == {"huge.tar", "negative.tar", "sparse.tar"}


@pytest.mark.parametrize(("write", "format"), ALL, ids=lambda v: getattr(v, "__name__", ""))
def test_links_out_of_the_tree_are_refused(folder: Path, outside: Path, tmp_path: Path, write: Any, format: str) -> None:
    """Every file of a good dataset moved out, and a link left in its place."""
    write(folder)
    for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        path.rename(tmp_path / f"moved{number}")
        path.symlink_to(tmp_path / f"moved{number}")
    try:
        result = scan(folder)
    except UserError as error:
        assert "is a link out of the dataset's folder" in str(error)
    else:
        assert not result.found and all("link out of" in r.reason for r in result.rejects) and result.rejects


HARD = {
    "html": ("<script>alert(1)</script> & <b>", ("<script>alert(1)</script> & <b>",)),
    "emoji": ("👩‍👩‍👧‍👦 🇫🇷 é", ("👩‍👩‍👧‍👦 🇫🇷 é",)),
    "format": ("{caption} %s {0.__class__} $HOME `id`", ("{caption} %s {0.__class__} $HOME `id`",)),
    "blank": (" \t\n ", None),
    "nul": ("a\0b", None),
    "escape": ("\x1b[2Ja", None),
    "c1": ("a\x9bb", None),
    "million": ("x" * 10**6, None),
}


@pytest.mark.parametrize("format", ["sidecar", "csv", "jsonl", "kohya-json", "parquet", "webdataset"])
@pytest.mark.parametrize("case", HARD)
def test_captions_pass_as_plain_text_or_not_at_all(folder: Path, format: str, case: str) -> None:
    import datasets

    text, expected = HARD[case]
    if format == "parquet":
        rows = {"image": [{"bytes": picture(1), "path": None}], "text": [text]}
        datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(folder / "x.parquet")
    elif format == "webdataset":
        with tarfile.open(folder / "x.tar", "w") as archive:
            add(archive, "0.png", picture(1))
            add(archive, "0.txt", text.encode())
    else:
        put(folder / "a.png", picture(1))
    if format == "sidecar":
        put(folder / "a.txt", text)
    elif format == "csv":
        with (folder / "metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("file_name", "text"), ("a.png", text)])
    elif format == "jsonl":
        put(folder / "metadata.jsonl", json.dumps({"file_name": "a.png", "text": text}))
    elif format == "kohya-json":
        put(folder / "meta_cap.json", json.dumps({"a": {"caption": text}}))
    result = scan(folder)
    if expected:
        assert [f.captions for f in result.found] == [expected] and not result.rejects
    elif case == "blank" and format != "sidecar":
        assert [f.captions for f in result.found] == [()], "a blank cell is no caption"
    else:
        assert not result.found and len(result.rejects) >= 1
        for reject in result.rejects:
            assert (reject.path + reject.reason).isprintable() and len(reject.reason) < 300


def test_file_names_that_cannot_be_shown(folder: Path) -> None:
    for name in (b"a\nb.png", b"\x1b[2J.png", b"\xff\xfe.png", b"\xff.txt"):
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(picture(1))
    put(folder / "<b>.png", picture(1))
    for format in ("sidecar", "imagefolder"):
        result = scan(folder, format=format)
        assert [f.path for f in result.found] == ["<b>.png"]
        assert len(result.rejects) == (4 if format == "sidecar" else 3)
        printable(result)


# --- fuzz ---------------------------------------------------------------------------------------------------------------------


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    broken = bytearray(data)
    for _ in range(int(rng.integers(1, 8))):
        at = int(rng.integers(len(broken)))
        kind = rng.integers(4)
        if kind == 0:
            broken[at] = int(rng.integers(256))
        elif kind == 1:
            broken[at:at] = rng.bytes(int(rng.integers(1, 6)))
        elif kind == 2:
            del broken[at : at + int(rng.integers(1, 12))]
        else:
            token = (b'"', b"{", b"}", b",", b"\n", b"\\", b"../", b"\0", b"[", b"\xef\xbb\xbf", b"null", b"1e999", b"NaN")
            broken[at:at] = token[int(rng.integers(len(token)))]
        broken = broken or bytearray(b"x")
    return bytes(broken[: int(rng.integers(len(broken) + 1))] if rng.random() < 0.15 else broken)


@pytest.mark.parametrize(("write", "format"), ALL, ids=lambda v: getattr(v, "__name__", ""))
def test_mutated_metadata_is_accepted_or_rejected_with_a_reason(folder: Path, write: Any, format: str) -> None:
    """40 damaged copies of each form's metadata, 480 in all: no crash, no hang; every picture is found or some reject says why not."""
    rng = np.random.default_rng(3)
    write(folder)
    tables = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix not in (".png", ".jpg", ".webp")]
    if not tables:
        pytest.skip("this form has no metadata")
    whole = scan(folder)
    originals = {p: p.read_bytes() for p in tables}
    harmless = 0
    for _ in range(40):
        for path, data in originals.items():
            path.write_bytes(data)
        damaged = tables[int(rng.integers(len(tables)))]
        damaged.write_bytes(mutated(originals[damaged], rng))
        try:
            result = scan(folder, format=format)
        except UserError as error:
            assert damaged.name in str(error)
            continue
        printable(result)
        harmless += not result.rejects
        assert len(result.found) >= len(whole.found) or result.rejects, "something is left out in silence"
    assert harmless < 40


def test_a_folder_that_cannot_be_listed_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a network drive that went away: half the pictures would be missing without a word."""
    put(folder / "a.png", picture(1))
    put(folder / "shut/b.png", picture(2))
    listed = os.scandir

    def scandir(path: str) -> object:
        if Path(path).name == "shut":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"dataset\.path: .*shut cannot be listed: Input/output error"):
        visible_files(folder)
