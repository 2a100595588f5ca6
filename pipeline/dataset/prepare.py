"""Scan, decode, cut, split: the work of prepare-dataset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pipeline.config import Dataset
from pipeline.dataset.images import BadImage, centre_crop, decode, hash_pixels
from pipeline.dataset.manifest import Manifest, Sample, split_of
from pipeline.dataset.sidecar import Reject, scan
from pipeline.errors import UserError
from pipeline.progress import progress

_LISTED = 10  # rejects named in a message; the rest stand in the file


def prepare(root: Path, settings: Dataset, check_stop: Callable[[], None]) -> tuple[Manifest, list[Reject]]:
    """Read every picture once and decide what the model will see.

    Raises:
        UserError: no folder, no picture, or nothing left to train on.
    """
    folder = root / settings.path
    found, rejects = scan(folder, settings.caption_extension)
    samples: list[Sample] = []
    with progress("reading pictures", len(found), "pictures") as bar:
        for item in found:
            check_stop()
            try:
                image = decode(folder / item.path, settings.max_pixels)
                geometry = centre_crop(image.size, settings.resolution)
            except BadImage as bad:
                rejects.append(Reject(item.path, str(bad)))
            else:
                pixels = hash_pixels(image)
                caption = with_trigger(item.caption, settings.trigger)
                samples.append(Sample(item.path, pixels, geometry, caption, split_of(pixels, settings.held_out_fraction)))
            bar.advance()
    if settings.held_out_fraction and len(samples) > 1 and all(s.split == "train" for s in samples):
        # few pictures and chance: one is held out all the same, or nothing could be measured
        least = min(samples, key=lambda s: s.pixels)
        samples = [replace(s, split="held-out") if s.pixels == least.pixels else s for s in samples]
    return Manifest(settings.path, settings.trigger, tuple(samples)), sorted(rejects, key=lambda r: r.path)


def refuse_too_many_rejects(rejects: list[Reject], settings: Dataset, listing: Path) -> None:
    """Fail when more was rejected than allowed; `listing` is the file that names all."""
    if len(rejects) > settings.max_rejected:
        lines = [f"  {r.path}: {r.reason}" for r in rejects[:_LISTED]]
        if len(rejects) > _LISTED:
            lines.append(f"  … and {len(rejects) - _LISTED} more")
        raise UserError(
            f"{settings.path}: {len(rejects)} rejected, dataset.max_rejected allows {settings.max_rejected}:\n"
            + "\n".join(lines)
            + f"\nMend or remove them, or raise dataset.max_rejected; the whole list is in {listing}"
        )


def refuse_nothing_to_train_on(manifest: Manifest, settings: Dataset) -> None:
    """Fail when no picture is left on the training side."""
    if not any(s.split == "train" for s in manifest.samples):
        raise UserError(
            f"{settings.path}: no picture is left to train on: {len(manifest.samples)} usable, all held out by "
            f"dataset.held_out_fraction {settings.held_out_fraction}: add pictures or lower it"
        )


def with_trigger(caption: str, trigger: str) -> str:
    """The caption with the trigger word in front, unless it holds it already."""
    return caption if not trigger or trigger in caption else f"{trigger}, {caption}"
