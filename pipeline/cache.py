"""Looking after the content store."""

from __future__ import annotations

import time
from contextlib import ExitStack

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from pipeline.encodings import ContentStore, Encodings, hash_tensors
from pipeline.errors import UserError
from pipeline.lock import held
from pipeline.workspace import ENCODED, Workspace

_STAGE = "precompute-latents-and-embeddings"


def stats(workspace: Workspace) -> str:
    """How much there is, and how much of it the present encodings use."""
    store, used = ContentStore(workspace.store), _used(workspace) or set()
    keys = set(store.keys())
    size = sum(segment.stat().st_size for segment in store.segments())
    return f"{len(keys)} encodings in {len(store.segments())} files, {_mib(size)}; {len(keys & used)} of them are in use"


def collect(workspace: Workspace, older_than: float, dry_run: bool) -> str:
    """Delete the entries that the present encodings do not use.

    Args:
        older_than: days; files written since are left alone.
        dry_run: only say what would go.

    Raises:
        UserError: there are no present encodings, as after an encoding that was cut off: all would go that it has done.
        AlreadyRunning: encodings are being made, here or by an experiment in a copy of the project.
    """
    with ExitStack() as locks:
        for lock in sorted((workspace.work / _STAGE).glob("*/lock")):
            locks.enter_context(held(lock, f"{_STAGE} is running, and the store is its own"))
        return _collect(workspace, older_than, dry_run)


def _collect(workspace: Workspace, older_than: float, dry_run: bool) -> str:
    used = _used(workspace)
    if used is None:
        raise UserError(f"{ENCODED} is missing, so nothing is in use and all would be deleted: run the pipeline first")
    store = ContentStore(workspace.store)
    newest = time.time() - older_than * 86_400
    gone, freed = 0, 0
    for segment in store.segments():
        if segment.stat().st_mtime > newest:
            continue
        keys = store.keys_in(segment)
        kept = [key for key in keys if key in used]
        if len(kept) == len(keys):
            continue
        before = segment.stat().st_size
        gone += len(keys) - len(kept)
        if not dry_run:
            store.add(store.read(kept))  # under another name: a segment is named by what it holds
            segment.unlink()
        freed += before * (len(keys) - len(kept)) // len(keys)
    return f"{gone} encodings {'would be' if dry_run else 'were'} deleted, about {_mib(freed)}"


def verify(workspace: Workspace) -> tuple[int, str]:
    """Compare every file with its checksum and delete those that differ: number of damaged files, and a sentence."""
    before = len(list(workspace.store.glob("*.safetensors"))) if workspace.store.is_dir() else 0
    store = ContentStore(workspace.store)  # deletes what cannot even be opened
    left = sorted(store.folder.glob("*.safetensors"))
    damaged = before - len(left)
    for segment in left:
        try:
            with safe_open(segment, framework="pt") as file:
                stated = (file.metadata() or {}).get("sha256")
            fine = hash_tensors(load_file(segment)) == stated
        except (SafetensorError, OSError):
            fine = False
        if not fine:
            damaged += 1
            segment.unlink(missing_ok=True)
    if damaged:
        return damaged, f"{damaged} of {before} files were damaged and are deleted: the next run encodes them again"
    return 0, f"{before} files are as they were written"


def _used(workspace: Workspace) -> set[str] | None:
    folder = workspace.root / ENCODED
    if not (folder / "index.json").is_file():
        return None
    index = Encodings(folder).index
    keys = {key for s in index.samples for key in (*s.latents, *s.texts, *s.masks)}
    return keys | {index.empty_text}


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
