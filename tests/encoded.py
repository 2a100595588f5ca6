"""Pictures encoded by a tiny base, for the tests of what comes after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from pipeline.config import Dataset
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.prepare import prepare
from pipeline.encode import Counts, How, Todo, encode
from pipeline.encoders import encode_todo
from pipeline.encodings import ContentStore, Encodings, Index, write_encoded
from pipeline.families import family
from pipeline.model_source import LocalModel

CPU = torch.device("cpu")
HOW = How("float32", "float32", flip=False, tiling=False, clip_skip=0, caption_chunks=1)
FLIPPED = replace(HOW, flip=True)


def prepare_folder(pictures: Path, **dataset: object) -> Manifest:
    """prepare-dataset without DVC."""
    settings = Dataset(**{"path": pictures.name, "resolution": 32, "held_out_fraction": 0.3, **dataset})
    return prepare(pictures.parent, settings, lambda: None, pictures.parent / "unpacked").manifest


def encode_manifest(
    manifest: Manifest,
    root: Path,
    base: Path,
    store: ContentStore,
    name: str = "sd",
    how: How = HOW,
    workers: int = 0,
    check_stop: Callable[[], None] = lambda: None,
    device: torch.device = CPU,
) -> tuple[Index, Counts]:
    """precompute-latents-and-embeddings without DVC, in one process."""
    kind, model = family(name), LocalModel(base, None, None)

    def work(todo: Todo) -> None:
        encode_todo(todo, manifest, root, kind, model, store, how, device, workers, check_stop)

    return encode(manifest, kind, model, store, how, work)


def encode_folder(
    pictures: Path, base: Path, store: Path, out: Path, name: str = "sd", how: How = HOW, workers: int = 0, **dataset: object
) -> tuple[Encodings, Counts]:
    """Both stages: the reader of what they leave in `out`, and what was really encoded."""
    kept = ContentStore(store)
    index, counts = encode_manifest(prepare_folder(pictures, **dataset), pictures.parent, base, kept, name, how, workers)
    write_encoded(out, index, kept)
    return Encodings(out), counts
