"""Encodings keyed by content: the keys, the store that outlives runs, and the shards that training reads.

A *latent* entry holds `mean` and `std` of the normalised posterior, (C, h, w), and `geometry`, (6,) float32. A *mask* entry
holds `mask`, (1, h, w) float32 in [0, 1]. A *text* entry holds the family's named embeddings, and `tokens`, (2,): the caption's length
and how much of it is read. An entry's key is a hash of all that its values depend on, so a key that is present is valid, whatever
its file is called and whenever it was written.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.dataset.geometry import Geometry
from pipeline.files import hash_json, write_json
from pipeline.progress import say
from pipeline.safetensors_file import write_safetensors

SCHEMA = 1  # raise it when the meaning of stored values changes
SHARD_BYTES = 128 * 2**20  # a shard's size at most, half of it at least, where there is much; fewer, larger files cost DVC less

LEAST_SHARD_BYTES = 8 * 2**20  # ... and where there is little

Entry = dict[str, Tensor]
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "U8": 1}  # of safetensors' types


def latent_key(pixels: str, geometry: Geometry, flipped: bool, vae: str, dtype: str) -> str:
    """Identity of one encoded picture. `pixels`: hash of the decoded picture; `vae`: the encoder's fingerprint."""
    return hash_json(["latents", SCHEMA, pixels, geometry, flipped, vae, dtype])[:32]


@dataclass(frozen=True)
class Reading:
    """How captions are read."""

    encoders: str  # fingerprint of text encoders and tokenizers, which states their length limit too
    chunks: int  # stretches of the encoder's length that a caption may fill
    clip_skip: int  # layers left out at the encoder's end, in diffusers' count
    dtype: str


def text_key(caption: str, reading: Reading) -> str:
    """Identity of one encoded caption."""
    return hash_json(["text", SCHEMA, caption, reading])[:32]


def mask_key(mask: str, geometry: Geometry, flipped: bool, cell: int) -> str:
    """Identity of one resized mask. `mask`: hash of the decoded mask; `cell`: pixels per latent cell."""
    return hash_json(["mask", SCHEMA, mask, geometry, flipped, cell])[:32]


class ContentStore:
    """A folder of segments, each a safetensors file of some entries, added whole or not at all.

    A segment is named by the keys it holds, so two processes that write the same entries write the same file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._segment_of: dict[str, Path] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.look_again()

    def look_again(self) -> None:
        """Find what lies in the folder, from other processes too."""
        for segment in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(segment, framework="pt") as file:
                    names = list(file.keys())
            except (SafetensorError, OSError):
                say(f"  {segment.name} in the content store is damaged: its entries are encoded again")
                segment.unlink(missing_ok=True)
            else:
                self._segment_of.update((name.split(".")[0], segment) for name in names)

    def __contains__(self, key: str) -> bool:
        return key in self._segment_of

    def add(self, entries: dict[str, Entry]) -> None:
        """Keep the entries; they are on disk when this returns."""
        if entries:
            segment = self.folder / f"{hash_json(sorted(entries))[:24]}.safetensors"
            tensors = _flat(entries)
            write_safetensors(segment, tensors, {"sha256": hash_tensors(tensors)})
            self._segment_of.update((key, segment) for key in entries)

    def keys(self) -> list[str]:
        """Of every entry."""
        return list(self._segment_of)

    def keys_in(self, segment: Path) -> list[str]:
        """Of the entries in one file."""
        return [key for key, file in self._segment_of.items() if file == segment]

    def segments(self) -> list[Path]:
        """Every file of the store."""
        return sorted(set(self._segment_of.values()))

    def size(self, keys: Sequence[str]) -> int:
        """Bytes of the entries' tensors, from the headers of their files."""
        wanted, total = set(keys), 0
        for segment in {self._segment_of[key] for key in keys}:
            with safe_open(segment, framework="pt") as file:
                for name in file.keys():
                    if name.split(".")[0] in wanted:
                        part = file.get_slice(name)
                        total += math.prod(part.get_shape()) * _BYTES[part.get_dtype()]
        return total

    def read(self, keys: Iterable[str], part: str | None = None) -> dict[str, Entry]:
        """The entries of these keys, which must be present, or only one part of each."""
        by_segment = defaultdict(list)
        for key in keys:
            by_segment[self._segment_of[key]].append(key)
        entries: dict[str, Entry] = {}
        for segment, wanted in by_segment.items():
            entries.update(_read_entries(segment, wanted, part))
        return entries


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """What training knows of a picture."""

    id: str
    captions: tuple[str, ...]  # variants of each other
    split: str
    size: tuple[int, int]  # width, height in pixels: only pictures of one size share a batch
    latents: tuple[str, ...]  # keys: as it is, and mirrored if `encode.flip`
    texts: tuple[str, ...]  # keys, one per caption
    masks: tuple[str, ...] = ()  # keys, one per latent; empty: the loss counts everywhere
    repeats: int = 1  # how often an epoch shows it
    regularisation: bool = False


@dataclass(frozen=True)
class Index:
    """Table of contents of `build/encoded/`."""

    family: str
    dtype: str
    clip_skip: int
    caption_chunks: int
    empty_text: str  # key of the empty caption
    samples: tuple[EncodedSample, ...]  # sorted by id: renaming a picture changes nothing


def write_encoded(out: Path, index: Index, store: ContentStore) -> None:
    """Write `index.json` and the shards. An entry's shard is settled by its key alone, so a new picture
    rewrites one."""
    latents = sorted({key for s in index.samples for key in s.latents})
    masks = sorted({key for s in index.samples for key in s.masks})
    texts = sorted({key for s in index.samples for key in s.texts} | {index.empty_text})
    for kind, keys in (("latents", latents), ("masks", masks), ("text", texts)):
        if not keys:
            continue
        shards: dict[int, list[str]] = defaultdict(list)
        count = _shard_count(store.size(keys))
        for key in keys:
            shards[int(key[:8], 16) % count].append(key)
        for number, members in shards.items():
            write_safetensors(out / f"{kind}-{number:03d}.safetensors", _flat(store.read(members)))
    write_json(out / "index.json", index)


class Encodings:
    """Reader of `build/encoded/`."""

    def __init__(self, folder: Path) -> None:
        fields = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        samples = tuple(_sample(sample) for sample in fields.pop("samples"))
        self.index = Index(samples=samples, **fields)
        self._files = {}
        self._file_of: dict[str, str] = {}
        self._parts: dict[str, list[str]] = defaultdict(list)
        for shard in sorted(folder.glob("*.safetensors")):
            # kept open: a batch is read through the page cache without opening anything
            self._files[shard.name] = safe_open(shard, framework="pt").__enter__()  # type: ignore[no-untyped-call]
            for name in self._files[shard.name].keys():
                key, _, part = name.partition(".")
                self._file_of[key] = shard.name
                self._parts[key].append(part)

    def samples(self, split: str) -> list[EncodedSample]:
        """The samples of one side of the split, sorted by id."""
        return [s for s in self.index.samples if s.split == split]

    def read(self, key: str) -> Entry:
        """One entry."""
        file = self._files[self._file_of[key]]
        return {part: file.get_tensor(f"{key}.{part}") for part in self._parts[key]}

    def text(self, key: str) -> Entry:
        """The named embeddings of a caption, and nothing else."""
        return {part: values for part, values in self.read(key).items() if part != "tokens"}

    def read_many(self, keys: Sequence[str]) -> list[Entry]:
        """Entries in the order of `keys`."""
        return [self.read(key) for key in keys]


def _sample(fields: dict[str, Any]) -> EncodedSample:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return EncodedSample(**values)


def hash_tensors(tensors: Entry) -> str:
    """sha256 over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def _shard_count(total_bytes: int) -> int:
    """The power of two that keeps shards at or under `SHARD_BYTES` on average, and smaller ones where there is little: a
    new picture rewrites one shard, and one is held in memory while it is written."""
    target = min(SHARD_BYTES, max(LEAST_SHARD_BYTES, total_bytes // 8))
    count = 1
    while total_bytes / count > target:
        count *= 2
    return count


def _flat(entries: dict[str, Entry]) -> dict[str, Tensor]:
    return {f"{key}.{part}": tensor for key, entry in entries.items() for part, tensor in entry.items()}


def _read_entries(path: Path, keys: Sequence[str], only: str | None) -> dict[str, Entry]:
    wanted = set(keys)
    entries: dict[str, Entry] = {key: {} for key in keys}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():
            key, _, part = name.partition(".")
            if key in wanted and only in (None, part):
                # a copy: the tensor is a part of the mapped file, which would stay mapped as long as one of them is kept
                entries[key][part] = file.get_tensor(name).clone()
    return entries
