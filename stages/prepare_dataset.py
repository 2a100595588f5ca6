"""prepare-dataset: a folder of pictures and captions -> a manifest with a train/held-out split, and a report."""

from __future__ import annotations

from pipeline.dataset.manifest import write_manifest
from pipeline.dataset.prepare import prepare, refuse_nothing_to_train_on, refuse_too_many_rejects
from pipeline.dataset.report import write_report
from pipeline.progress import say
from pipeline.stage import Stage
from pipeline.workspace import DATASET, DATASET_REPORT


def main(stage: Stage) -> None:
    """Run the stage."""
    settings = stage.params.dataset
    manifest, rejects = prepare(stage.workspace.root, settings, stage.stop.check)
    write_manifest(stage.out(DATASET), manifest, rejects)
    listing = (stage.out(DATASET) / "rejects.jsonl").relative_to(stage.workspace.home)
    refuse_too_many_rejects(rejects, settings, listing)
    refuse_nothing_to_train_on(manifest, settings)
    write_report(stage.out(DATASET_REPORT), stage.workspace.root, manifest, rejects, settings.max_pixels)
    held_out = sum(s.split == "held-out" for s in manifest.samples)
    say(
        f"  {len(manifest.samples)} pictures: {len(manifest.samples) - held_out} to train on, {held_out} held out, {len(rejects)} rejected"
    )
