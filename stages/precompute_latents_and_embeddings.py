"""precompute-latents-and-embeddings: manifest -> VAE latents and text embeddings in content-keyed shards."""

from __future__ import annotations

from pipeline.dataset.manifest import read_manifest
from pipeline.device import pick_device
from pipeline.encode import How, Todo, encode, token_report
from pipeline.encode_worker import write_job
from pipeline.encoders import encode_masks, encode_todo
from pipeline.encodings import ContentStore, write_encoded
from pipeline.families import family
from pipeline.files import write_json
from pipeline.launch import Processes, launch
from pipeline.model_source import resolve
from pipeline.progress import say
from pipeline.seed import seed_store
from pipeline.stage import Stage
from pipeline.workspace import DATASET, ENCODED


def main(stage: Stage) -> None:
    """Run the stage."""
    params, root, runtime, check_stop = stage.params, stage.workspace.root, stage.params.runtime, stage.stop.check
    store = ContentStore(stage.workspace.store)
    manifest = read_manifest(root / DATASET)
    kind, model = family(params.model.family), resolve(stage.source(), root)
    how = How(**params.encode.model_dump())
    device = pick_device(runtime.device)

    def work(todo: Todo) -> None:
        if runtime.processes == 1:
            encode_todo(todo, manifest, root, kind, model, store, how, device, runtime.workers, check_stop)
            return
        if todo.masks:  # light work: no model has a part in it
            encode_masks(todo.masks, manifest, root, store, model.pixels_per_cell(), check_stop)
        job = stage.work / "job.json"
        write_job(job, todo, root / DATASET, root, store.folder, model, kind.name, how)
        launch("pipeline.encode_worker", [str(job)], Processes(runtime.processes), check_stop)
        store.look_again()

    index, counts = encode(manifest, kind, model, store, how, work, lambda: seed_store(store, stage.workspace))
    write_encoded(stage.out(ENCODED), index, store)
    write_json(stage.out(ENCODED) / "tokens.json", token_report(index, store))
    say(f"  encoded {counts.pictures} pictures and {counts.captions} captions; everything else was in the store")
