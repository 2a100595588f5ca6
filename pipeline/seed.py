"""A clean clone's first encodings: those that the last run left in DVC's cache or remote."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from pipeline.encodings import ContentStore, Entry
from pipeline.progress import say
from pipeline.workspace import ENCODED, Workspace

_STAGE = "precompute-latents-and-embeddings"


def seed_store(store: ContentStore, workspace: Workspace) -> None:
    """Take over every entry that the stage's last recorded outs hold and the store does not.

    Best effort: whatever cannot be had is encoded again.
    """
    recorded = _recorded(workspace)
    if not recorded:
        return
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    known = len(store.keys())
    repo = Repo(str(workspace.root))
    find: Callable[[str], str] = repo.cache.local.oid_to_path
    listing = Path(find(recorded))
    if not _complete(listing, find):
        with contextlib.suppress(DvcException, OSError, ImportError):  # no remote, no network, no package for such a remote
            repo.fetch(targets=[_STAGE])
    if _complete(listing, find):
        _take(store, [Path(find(digest)) for digest in _shards(listing)])
    gained = len(store.keys()) - known
    if gained:
        say(f"  {gained} encodings taken over from the last recorded run")


def _recorded(workspace: Workspace) -> str:
    """The content hash of `build/encoded` in `dvc.lock`, empty where there is none."""
    outs = workspace.recorded().get(_STAGE, {}).get("outs", [])
    return next((out.get("md5", "") for out in outs if Path(out["path"]) == ENCODED), "")


def _complete(listing: Path, find: Callable[[str], str]) -> bool:
    """Whether DVC's cache holds the folder's listing and all its shards."""
    return listing.is_file() and all(Path(find(digest)).is_file() for digest in _shards(listing))


def _shards(listing: Path) -> list[str]:
    """Content hashes of the shards that a folder's listing in DVC's cache names."""
    entries = json.loads(listing.read_text(encoding="utf-8"))
    return [entry["md5"] for entry in entries if entry["relpath"].endswith(".safetensors")]


def _take(store: ContentStore, shards: list[Path]) -> None:
    for shard in shards:
        if not shard.is_file():
            continue
        try:
            tensors = load_file(shard)
        except (SafetensorError, OSError):
            continue
        entries: dict[str, Entry] = {}
        for name, tensor in tensors.items():
            key, _, part = name.partition(".")
            if key not in store:
                entries.setdefault(key, {})[part] = tensor
        store.add(entries)
