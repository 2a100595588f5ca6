"""Hashes of large files, kept for as long as nobody touches the file: a base of 7 GB is read in four seconds, and each stage asks
for its hash several times."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

from pipeline.files import hash_file, hash_json, write_json
from pipeline.workspace import Workspace

_LARGE = 16 * 2**20  # bytes; smaller files are read anew each time
_SETTLED = 2.0  # seconds that a file must have been left alone: file systems' clocks tick in milliseconds, some in seconds


def hash_weights(path: Path) -> str:
    """sha256 of a file's bytes, in hex; of a large one as remembered, where its size, inode and times of change are those of then.
    The time of the inode's change (ctime) is the system's own: neither copying nor unpacking an older file brings an old one back."""
    state = _state(path)
    if state[0] < _LARGE:
        return hash_file(path)
    note = Workspace.here().work / "hashes" / f"{hash_json(str(path.resolve()))[:24]}.json"
    try:
        told = json.loads(note.read_text(encoding="utf-8"))
        if told["state"] == state:
            return str(told["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not asked yet, or cut short
    found = hash_file(path)
    if _state(path) == state and time.time() - max(state[-2:]) / 1e9 > _SETTLED:
        with contextlib.suppress(OSError):  # a full disk, a project that may only be read: then it is read again next time
            write_json(note, {"state": state, "sha256": found})
    return found


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
