"""precompute-latents-and-embeddings: manifest -> VAE latents and text embeddings in content-keyed shards."""

from __future__ import annotations

from pipeline.dataset.manifest import read_manifest
from pipeline.device import pick_device
from pipeline.encode import encode
from pipeline.encodings import ContentStore, write_encoded
from pipeline.families import family
from pipeline.model_source import resolve
from pipeline.progress import say
from pipeline.stage import Stage
from pipeline.workspace import DATASET, ENCODED


def main(stage: Stage) -> None:
    """Run the stage."""
    params, root = stage.params, stage.workspace.root
    store = ContentStore(stage.workspace.store)
    index, counts = encode(
        read_manifest(root / DATASET),
        root,
        family(params.model.family),
        resolve(stage.source(), root),
        store,
        params.encode.dtype,
        params.encode.flip,
        pick_device(params.runtime.device),
        stage.stop.check,
    )
    write_encoded(stage.out(ENCODED), index, store)
    say(f"  encoded {counts.pictures} pictures and {counts.captions} captions; everything else was in the store")
