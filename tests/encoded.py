"""Pictures encoded by a tiny base, for the tests of what comes after."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.config import Dataset
from pipeline.dataset.prepare import prepare
from pipeline.encode import Counts, encode
from pipeline.encodings import ContentStore, Encodings, write_encoded
from pipeline.families import family
from pipeline.model_source import LocalModel


def encode_folder(
    pictures: Path,
    base: Path,
    store: Path,
    out: Path,
    name: str = "sd",
    dtype: str = "float32",
    flip: bool = False,
    held_out_fraction: float = 0.3,
    **dataset: object,
) -> tuple[Encodings, Counts]:
    """prepare-dataset and precompute-latents-and-embeddings without DVC."""
    settings = Dataset(**{"path": pictures.name, "resolution": 32, "held_out_fraction": held_out_fraction, **dataset})
    manifest, _ = prepare(pictures.parent, settings, lambda: None)
    kept = ContentStore(store)
    index, counts = encode(
        manifest,
        pictures.parent,
        family(name),
        LocalModel(base, None, None),
        kept,
        dtype,
        flip,
        torch.device("cpu"),
        lambda: None,
    )
    write_encoded(out, index, kept)
    return Encodings(out), counts
