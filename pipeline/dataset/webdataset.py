"""WebDataset shards: tar files in which members of one name, up to the first dot, make a sample (`000.jpg`, `000.txt`, `000.json`).

Read as a stream, one sample in memory at a time; members are never extracted, so their names reach no file system. `datasets` reads
these shards too, and a test compares; but it ends at the first caption that it cannot decode, and passes links over in silence,
where each sample must be found or rejected with its reason.
"""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from pipeline.config import Dataset
from pipeline.dataset.rows import (
    LINK_OUT,
    caption_value,
    captions_of,
    names_like,
    read_json_object,
    relative_parts,
    shown,
    sorted_scan,
    unfit,
)
from pipeline.dataset.source import FOREIGN_EXTENSIONS, NOT_READ, Found, Reject, Scan, folder_name, is_image, is_inside
from pipeline.dataset.unpack import LARGEST, unpack

_SHARDS = ("*.tar", "*.tar.gz", "*.tgz")
_DEFLATE = 1032  # bytes that a byte of gzip can stand for, at most
_LONGEST_TEXT = 16 * 2**20  # bytes of a caption or JSON member
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)  # the convention's own: key, and all extensions


class WebDataset:
    """See `pipeline.dataset.source.Source`."""

    name = "webdataset"

    def detect(self, folder: Path, settings: Dataset) -> bool:
        return bool(_shards(folder))

    def scan(self, folder: Path, settings: Dataset, unpacked: Path, check_stop: Callable[[], None]) -> Scan:
        shards = _shards(folder)
        if not shards:
            raise unfit(folder, self.name, f"shards named {', '.join(_SHARDS)} are looked for in it and its sub-folders")
        found: list[Found] = []
        rejects: list[Reject] = []
        for shard in shards:
            if not shard.isprintable() or not is_inside(folder / shard, folder):
                rejects.append(Reject(shown(shard), LINK_OUT if shard.isprintable() else "has a name that cannot be printed"))
                continue
            for sample in _samples(folder / shard, settings):
                check_stop()
                item, fault = (None, sample.fault) if sample.fault else _found(sample, settings, unpacked)
                if item:
                    found.append(item)
                else:
                    rejects.append(Reject(f"{shard}, {shown(sample.key)}" if sample.key else shard, fault))
        return sorted_scan(found, rejects)


@dataclass
class _Sample:
    """Members of one key: extension, in lower case, -> bytes."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    fault: str = ""


class _Header(tarfile.TarInfo):
    """A header that is damaged is an error: by itself tarfile takes it for the end of the archive, and drops the rest unseen."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from None


def _shards(folder: Path) -> list[str]:
    return sorted(name for pattern in _SHARDS for name in names_like(folder, pattern))


def _found(sample: _Sample, settings: Dataset, unpacked: Path) -> tuple[Found | None, str]:
    pictures = [name for name in sample.members if is_image(f"x.{name}")]
    plain = [name for name in pictures if "." not in name]  # a mask, say, is `000.mask.png`
    chosen = [name for name in pictures if name == settings.image_column] or plain or pictures
    if not chosen:
        if foreign := [name for name in sample.members if f".{name}" in FOREIGN_EXTENSIONS]:
            return None, f"{NOT_READ} ({foreign[0]})"
        return None, "is a caption without a picture of the same name"
    if len(chosen) > 1:
        return None, f"holds several pictures ({', '.join(shown(n) for n in chosen)}): name one in dataset.image_column"
    captions, fault = _captions(sample.members, settings)
    if fault:
        return None, fault
    name, fault = unpack(sample.members[chosen[0]], unpacked)
    class_name = folder_name(sample.key)
    return (None, fault) if fault else (Found(name, captions, class_name=class_name, unpacked=True), "")


def _captions(members: dict[str, bytes], settings: Dataset) -> tuple[tuple[str, ...], str]:
    """From the named column in the JSON, else the caption's own member, else one of the usual columns in the JSON."""
    row, fault = read_json_object(members["json"]) if "json" in members else ({}, "")
    if fault:
        return (), f"json: {fault}"
    if settings.caption_column in row:
        return captions_of(row[settings.caption_column], settings.caption_lines)
    for name in (settings.caption_column, settings.caption_extension[1:].lower(), "txt", "caption"):
        if name in members and not is_image(f"x.{name}"):
            try:
                text = members[name].decode("utf-8-sig")
            except UnicodeDecodeError as error:
                return (), f"{name}: is not UTF-8 text (byte {error.start})"
            return captions_of(text, settings.caption_lines)
    value, fault = caption_value(row, settings.caption_column)
    return ((), fault) if fault else captions_of(value, settings.caption_lines)


def _samples(path: Path, settings: Dataset) -> Iterator[_Sample]:
    """The samples of a shard in its order; what cannot be read is a sample with a fault."""
    texts = {settings.caption_column, settings.caption_extension[1:].lower(), "txt", "caption", "json"}
    sample = _Sample("")
    count = 0
    try:
        packed = not path.name.endswith(".tar")
        end = path.stat().st_size * (_DEFLATE if packed else 1)
        # as a stream: tarfile never seeks back, which a hostile header could make it do for ever
        with tarfile.open(path, "r|gz" if packed else "r|", tarinfo=_Header) as archive:
            for member in archive:
                count += 1
                if member.offset_data + member.size > end:  # tarfile would go there, block by block, past the end
                    raise tarfile.ReadError
                archive.members = []  # type: ignore[attr-defined]  # else it keeps every header that it has seen
                parts, _ = relative_parts(member.name)
                if member.isdir() or (parts and parts[-1].startswith(".")):
                    continue
                match = _NAME.match(member.name)
                key, extension = (match[1], match[2].lower()) if match else (member.name, "")
                if key != sample.key:
                    if sample.members or sample.fault:
                        yield sample
                    sample = _Sample(key)
                wanted = is_image(f"x.{extension}") or extension in texts
                if fault := _refusal(member, wanted):
                    sample.fault = sample.fault or fault
                elif extension in sample.members:
                    sample.fault = f"holds {shown(extension)} twice"
                elif f".{extension}" in FOREIGN_EXTENSIONS:
                    sample.members[extension] = b""  # never read; where there is no other picture it says why
                elif wanted:
                    file = archive.extractfile(member)
                    assert file is not None  # it is a regular file
                    sample.members[extension] = file.read()
                    if len(sample.members[extension]) != member.size:
                        sample.fault = "is cut off"
    except (tarfile.TarError, EOFError, OSError, zlib.error, ValueError, OverflowError) as error:
        if sample.key:
            yield _Sample(sample.key, fault="may be cut off: the archive is damaged here")
        yield _Sample("", fault=f"cannot be read as tar after {count} members ({type(error).__name__})")
        return
    if sample.members or sample.fault:
        yield sample


def _refusal(member: tarfile.TarInfo, wanted: bool) -> str:
    """Why a member is not taken; empty where it is."""
    parts, absolute = relative_parts(member.name)
    if not member.name.isprintable():
        return "has a name that cannot be printed"
    if absolute or ".." in parts:
        return "has a name that leads out of the archive"
    if not member.isreg():
        return "is a link or a device"
    if wanted and member.issparse():
        return "is a sparse file"
    limit = LARGEST if is_image(member.name) else _LONGEST_TEXT
    if wanted and member.size > limit:
        return f"has {member.size} bytes; at most {limit} are read"
    return ""


SOURCE = WebDataset()
