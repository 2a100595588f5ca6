"""One of several processes that share the encoding out: `torchrun -m pipeline.encode_worker JOB`.

Every process takes its share of what is to do and leaves it in the common store; nothing is sent between them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType

from pipeline.config import load_params
from pipeline.dataset.manifest import read_manifest
from pipeline.encode import Cut, How, Todo
from pipeline.encoders import encode_todo
from pipeline.encodings import ContentStore
from pipeline.errors import EXIT_USER_ERROR, UserError
from pipeline.families import family
from pipeline.files import write_json
from pipeline.launch import leave_with_parent
from pipeline.model_source import LocalModel


def write_job(path: Path, todo: Todo, manifest: Path, root: Path, store: Path, model: LocalModel, name: str, how: How) -> None:
    """Write down what the processes have to do: masks are left to the caller."""
    write_json(
        path,
        {
            "cuts": {key: [cut.sample.path, cut.sample.unpacked, cut.flipped] for key, cut in todo.cuts.items()},
            "captions": todo.captions,
            "manifest": str(manifest),
            "root": str(root),
            "store": str(store),
            "model": _written(model),
            "vae": _written(model.vae) if model.vae else None,
            "family": name,
            "how": how,
        },
    )


def _written(model: LocalModel) -> list[str | None]:
    return [str(model.path), model.variant, model.commit]


def main(path: Path) -> None:
    """Do this process's share of a job."""
    from accelerate import PartialState

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)  # unwinds, so that what is encoded is kept

    signal.signal(signal.SIGTERM, leave)
    if "WORLD_SIZE" in os.environ:
        leave_with_parent()
    job = json.loads(path.read_text(encoding="utf-8"))
    root, store = Path(job["root"]), ContentStore(Path(job["store"]))
    runtime = load_params(root / "params.yaml").runtime
    state = PartialState(cpu=runtime.device == "cpu")
    manifest = read_manifest(Path(job["manifest"]))
    by_path = {(s.path, s.unpacked): s for s in manifest.samples}
    vae = LocalModel(Path(job["vae"][0]), *job["vae"][1:]) if job["vae"] else None
    model = replace(LocalModel(Path(job["model"][0]), *job["model"][1:]), vae=vae)
    kind, how = family(job["family"]), How(**job["how"])

    def share(keys: list[str]) -> list[str]:
        return sorted(keys)[state.process_index :: state.num_processes]

    captions = {key: job["captions"][key] for key in share(list(job["captions"]))}
    cuts = {
        key: Cut(by_path[path, unpacked], flip)
        for key in share(list(job["cuts"]))
        for path, unpacked, flip in [job["cuts"][key]]
    }
    todo = Todo(cuts, captions, {})
    try:
        encode_todo(todo, manifest, root, kind, model, store, how, state.device, runtime.workers, lambda: None)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
