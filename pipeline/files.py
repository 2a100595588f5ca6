"""Files written whole or not at all, and content hashes of files and folders."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with `\\n` line ends, atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value`, in which there may be dataclasses, as JSON that is a pure function of it: sorted keys, fixed layout. NaN is
    an error."""
    text = json.dumps(value, default=json_fields, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def json_fields(value: Any) -> dict[str, Any]:
    """What `json.dumps` writes of a dataclass: its fields. `asdict` would copy all that is in them first, which took longer than
    writing it.

    Raises:
        TypeError: it is none.
    """
    return {field.name: getattr(value, field.name) for field in fields(value)}


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to a neighbour and rename it into place, so that a reader or a crash never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path`, safe on disk, when the block ends well and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A fresh folder that becomes `path` when the block ends well and vanishes when it does not. `path` must not exist."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def files_under(path: Path) -> list[Path]:
    """Every file below a folder, sorted by its relative path as text with `/`: the same order on every machine."""
    return sorted((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.relative_to(path).as_posix())


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_tree(path: Path) -> dict[str, str]:
    """Relative path -> sha256 for every file below a folder; `{".": sha256}` for a single file; empty where nothing is."""
    if path.is_file():
        return {".": hash_file(path)}
    return {p.relative_to(path).as_posix(): hash_file(p) for p in files_under(path)}


def hash_json(value: Any) -> str:
    """sha256, in hex, of the canonical JSON of a value, in which there may be dataclasses."""
    canonical = json.dumps(
        value, default=json_fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return hashlib.sha256(canonical.encode()).hexdigest()
