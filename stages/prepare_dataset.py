"""prepare-dataset: a folder of pictures and captions -> a manifest with a train/held-out split, and a report."""

from __future__ import annotations

from pathlib import Path

from pipeline.dataset.manifest import write_manifest
from pipeline.dataset.prepare import prepare, refuse_nothing_to_train_on, refuse_too_many_rejects
from pipeline.dataset.report import in_words, write_report
from pipeline.files import hash_file, write_json
from pipeline.progress import say
from pipeline.stage import Stage
from pipeline.workspace import DATASET, DATASET_REPORT, UNPACKED


def main(stage: Stage) -> None:
    """Run the stage."""
    settings, root, out = stage.params.dataset, stage.workspace.root, stage.out(DATASET)

    def auto_caption(pictures: list[tuple[Path, str]]) -> list[str]:
        if not pictures:
            return []
        from pipeline.auto_caption import write_captions
        from pipeline.device import pick_device
        from pipeline.model_source import ModelSource, resolve

        assert settings.auto_caption
        source = ModelSource(settings.auto_caption, settings.auto_caption_revision)
        model = resolve(source, root, "dataset.auto_caption")
        device = pick_device(stage.params.runtime.device)
        return write_captions(pictures, model, stage.workspace.captions, device, settings.background, stage.stop.check)

    unpacked = out / UNPACKED.relative_to(DATASET)
    prepared = prepare(root, settings, stage.stop.check, unpacked, auto_caption)
    write_manifest(out, prepared.manifest, prepared.rejects, prepared.left_out)
    record = stage.workspace.dataset_files / f"{hash_file(out / 'manifest.jsonl')}.json"
    write_json(record, {"folder": settings.path, "files": stage.snapshot.deps[settings.path]})
    report = stage.out(DATASET_REPORT)
    if prepared.manifest.samples:
        write_report(report, root, prepared, settings, unpacked)  # first: it shows what the two below complain of
    home = stage.workspace.home
    page = (report / "index.html").relative_to(home) if prepared.manifest.samples else None
    refuse_too_many_rejects(prepared.rejects, settings, (out / "rejects.jsonl").relative_to(home), page)
    refuse_nothing_to_train_on(prepared.manifest, len(prepared.left_out), settings)
    say(f"  {in_words(prepared)}")
