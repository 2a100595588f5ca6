"""Scan, decode, cut, caption, split: the work of prepare-dataset."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from pipeline.config import Concept, Dataset
from pipeline.dataset.captions import dress, variants, with_trigger
from pipeline.dataset.duplicates import Alike, Likeness, likeness
from pipeline.dataset.geometry import Geometry, bucket, fit, shared, square
from pipeline.dataset.images import BadImage, Picture, decode, hash_pixels, read_mask
from pipeline.dataset.manifest import Manifest, Mask, Sample, split_of
from pipeline.dataset.masks import masks_of
from pipeline.dataset.rows import shown
from pipeline.dataset.source import Found, Reject, is_image, is_inside, linked_folders, require_folder, visible_files
from pipeline.dataset.sources import source_of
from pipeline.errors import UserError
from pipeline.progress import progress

_LISTED = 10  # rejects named in a message; the rest stand in the file
_AHEAD = 64  # pictures in memory at most, however many there are
T = TypeVar("T")
R = TypeVar("R")

AutoCaption = Callable[[list[tuple[Path, str]]], list[str]]
"""Captions for pictures without one, given their files and pixel hashes."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What prepare-dataset found out."""

    manifest: Manifest
    rejects: list[Reject]  # cannot be used: counted against `dataset.max_rejected`
    left_out: list[Reject]  # could be used, but should not: duplicates
    duplicates: list[tuple[str, str]]  # each near-duplicate, after the first picture that it repeats; by path
    notes: list[Reject]  # used, with something that a person should know


@dataclass(frozen=True, slots=True)
class Item:
    """A picture that a source found, with the concept it belongs to."""

    found: Found
    concept: Concept
    place: Path  # the folder that its source was given, or that of unpacked pictures
    name: str  # in that folder
    mask: Path | None
    no_mask: str  # why there is none although one is asked for

    @property
    def file(self) -> Path:
        """Where it lies; made when asked for: a `Path` takes more memory than all else that is known of a picture."""
        return self.place / self.name


@dataclass(frozen=True, slots=True)
class _Seen:
    """What looking at an item's pixels told."""

    item: Item
    pixels: str
    geometry: Geometry
    mask: Mask | None
    like: Likeness
    notes: tuple[str, ...]


def prepare(
    root: Path,
    settings: Dataset,
    check_stop: Callable[[], None],
    unpacked: Path,
    auto_caption: AutoCaption | None = None,
) -> Prepared:
    """Read every picture once and decide what the model will see.

    Args:
        root: the project's folder.
        settings: the `dataset` section.
        check_stop: raises when asked to stop.
        unpacked: where packed sources put their pictures.
        auto_caption: called with the pictures that have no caption, if `settings.missing_caption` is `auto`.

    Raises:
        UserError: no folder, no picture, or concepts that overlap.
    """
    folder = root / settings.path
    seen, rejects = _see(folder, settings, unpacked, check_stop)
    samples: list[Sample] = []
    likenesses: list[Likeness] = []
    for look, texts in zip(seen, _captions(seen, settings, auto_caption), strict=True):
        path = look.item.found.path
        if isinstance(texts, str):
            rejects.append(Reject(path, texts))
            continue
        concept = look.item.concept
        samples.append(
            Sample(
                path,
                look.pixels,
                look.geometry,
                tuple(texts),
                "train" if concept.regularisation else split_of(look.pixels, settings.held_out_fraction),
                look.item.found.repeats * concept.repeats,
                concept.regularisation,
                look.mask,
                look.item.found.unpacked,
            )
        )
        likenesses.append(look.like)
    notes = [Reject(look.item.found.path, note) for look in seen for note in look.notes]
    del seen  # as large as the samples, and no longer wanted
    samples = _hold_one_out(samples, settings)
    kept, left_out, duplicates = _without_duplicates(samples, likenesses, settings)
    manifest = Manifest(settings.path, settings.trigger, settings.background, tuple(kept))
    return Prepared(manifest, sorted(rejects, key=lambda r: (r.path, r.reason)), left_out, duplicates, notes)


def _see(folder: Path, settings: Dataset, unpacked: Path, check_stop: Callable[[], None]) -> tuple[list[_Seen], list[Reject]]:
    """Look at every picture that the sources find."""
    items, rejects = scan_concepts(folder, settings, unpacked, check_stop)
    seen: list[_Seen] = []
    with progress("reading pictures", len(items), "pictures") as bar:
        for item, result in _ahead(lambda i: _look(i, folder, settings), items):
            check_stop()
            if isinstance(result, str):
                rejects.append(Reject(item.found.path, result))
            else:
                seen.append(result)
            bar.advance()
    return seen, rejects


def refuse_too_many_rejects(rejects: list[Reject], settings: Dataset, listing: Path, page: Path | None) -> None:
    """Fail when more was rejected than allowed; `listing` is the file that names all, `page` shows them beside the others."""
    if len(rejects) > settings.max_rejected:
        lines = [f"  {r.path}: {r.reason}" for r in rejects[:_LISTED]]
        if len(rejects) > _LISTED:
            lines.append(f"  … and {len(rejects) - _LISTED} more")
        raise UserError(
            f"{settings.path}: {len(rejects)} rejected, dataset.max_rejected allows {settings.max_rejected}:\n"
            + "\n".join(lines)
            + f"\nMend or remove them, or raise dataset.max_rejected; the whole list is in {listing}"
            + (f", and on the page {page}" if page else "")
        )


def refuse_nothing_to_train_on(manifest: Manifest, left_out: int, settings: Dataset) -> None:
    """Fail when no picture is left on the training side."""
    if not any(s.split == "train" and not s.regularisation for s in manifest.samples):
        raise UserError(
            f"{settings.path}: no picture is left to train on: {len(manifest.samples)} usable, all held out by "
            f"dataset.held_out_fraction {settings.held_out_fraction}, or for regularisation; {left_out} more left out, as duplicates: "
            "add pictures or lower it"
        )


def scan_concepts(
    folder: Path, settings: Dataset, unpacked: Path, check_stop: Callable[[], None]
) -> tuple[list[Item], list[Reject]]:
    """What all concepts' sources find, sorted by path; pixels unread.

    Raises:
        UserError: no folder, no picture, or concepts that overlap.
    """
    require_folder(folder)
    concepts = settings.concepts or (Concept(path="."),)
    places = [_place(concept, folder) for concept in concepts]
    for i, a in enumerate(places):
        for b in places[i + 1 :]:
            if a.is_relative_to(b) or b.is_relative_to(a):
                raise UserError(f"dataset.concepts: {a} and {b} overlap: a picture must belong to one concept")
    items: list[Item] = []
    named = {settings.masks, *(c.path for c in concepts), *(c.masks for c in concepts)}
    why = "is a link to a folder, and links are not followed: put the folder itself here, or remove the link"
    rejects = [Reject(shown(name), why) for name in linked_folders(folder) if name not in named]
    for concept, place in zip(concepts, places, strict=True):
        prefix = "" if place == folder.resolve() else place.relative_to(folder.resolve()).as_posix() + "/"
        own = _as_concept(settings, concept)
        scan = source_of(place, own).scan(place, own, unpacked, check_stop)
        setting = concept.masks or settings.masks
        masks = masks_of(setting, folder)
        for found in scan.found:
            lies_in = unpacked if found.unpacked else place
            file = lies_in / found.path
            if masks and masks.holds(file):
                continue  # which the source took for a picture
            path = found.path if found.unpacked else prefix + found.path
            # a concept's own masks go by the names in it, those of the whole dataset by the names in that
            mask = masks.of(file, found.path if concept.masks else path) if masks else None
            if mask and not is_inside(mask, folder):
                rejects.append(Reject(path, f"has a mask that is a link out of the dataset's folder: {setting}"))
                continue
            no_mask = f"has no mask {masks.where}" if masks and not mask else ""
            items.append(Item(replace(found, path=path), concept, lies_in, found.path, mask, no_mask))
        for reject in scan.rejects:
            if not (masks and masks.holds(place / reject.path)):
                rejects.append(Reject(prefix + reject.path, reject.reason))
    if settings.concepts:
        told = [masks for m in (settings.masks, *(c.masks for c in settings.concepts)) if (masks := masks_of(m, folder))]
        covered = {place.relative_to(folder.resolve()).as_posix() + "/" for place in places}
        rejects += [
            Reject(name, "lies in none of dataset.concepts")
            for name in visible_files(folder)
            if is_image(name)
            and name.isprintable()
            and not name.startswith(tuple(covered))
            and not any(masks.holds(folder / name) for masks in told)
        ]
    return sorted(items, key=lambda i: i.found.path), rejects


def _as_concept(settings: Dataset, concept: Concept) -> Dataset:
    """The settings as the source of one concept is to see them."""
    own: dict[str, object] = {"format": concept.format or settings.format}
    if concept.instance_prompt:
        own["instance_prompt"] = concept.instance_prompt
    return settings.model_copy(update=own)


def _place(concept: Concept, folder: Path) -> Path:
    place = (folder / concept.path).resolve()
    if not place.is_dir() or not place.is_relative_to(folder.resolve()):
        raise UserError(
            f"dataset.concepts: {concept.path!r} is no folder in {folder}: a concept's path is relative to dataset.path"
        )
    return place


def _look(item: Item, folder: Path, settings: Dataset) -> _Seen | str:
    """Decode and measure one picture; a reason where it cannot be used. Called in threads: Pillow lets others run."""
    try:
        picture = decode(item.file, settings.max_pixels, settings.background)
        mask_image = _mask(item, picture, settings)
        pixels = hash_pixels(picture.image)
        geometry = shared(_geometry(picture, mask_image, pixels, settings))
    except BadImage as bad:
        return str(bad)
    mask = None
    if mask_image:
        path = item.mask.relative_to(folder.resolve()).as_posix() if item.mask else None
        mask = Mask(path, hash_pixels(mask_image))
    return _Seen(item, pixels, geometry, mask, likeness(picture.image), picture.notes)


def _mask(item: Item, picture: Picture, settings: Dataset) -> Image.Image | None:
    """The mask as greyscale of the picture's size."""
    if (item.concept.masks or settings.masks) == "alpha":
        if picture.alpha is None:
            raise BadImage("has no transparency, but its alpha channel is to be the mask")
        return picture.alpha
    if item.no_mask:
        raise BadImage(item.no_mask)
    if not item.mask:
        return None
    return read_mask(item.mask, picture.image.size, settings.max_pixels)


def _geometry(picture: Picture, mask: Image.Image | None, pixels: str, settings: Dataset) -> Geometry:
    size, b = picture.image.size, settings.buckets
    if b:
        target = bucket(size, settings.resolution, b.step, b.min_side, b.max_side, settings.allow_upscaling)
    else:
        target = square(size, settings.resolution, settings.allow_upscaling)
    if settings.crop == "random":
        rng = np.random.default_rng([settings.seed, int(pixels[:16], 16)])
        return fit(size, target, lambda w, h: (int(rng.integers(w + 1)), int(rng.integers(h + 1))))
    if settings.crop == "mask" and mask is not None:
        return fit(size, target, _around(mask, target))
    return fit(size, target)


def _around(mask: Image.Image, target: tuple[int, int]) -> Callable[[int, int], tuple[int, int]]:
    """Place the cut so that the mask's centre of mass comes as near to its middle as the picture allows."""
    weights = np.asarray(mask, np.float64)
    if not weights.any():
        raise BadImage("has a mask that is black all over")
    x, y = (
        (np.arange(n) + 0.5) @ weights.sum(axis=axis) / weights.sum() / n for axis, n in ((0, mask.width), (1, mask.height))
    )

    def place(spare_width: int, spare_height: int) -> tuple[int, int]:
        left = round(x * (target[0] + spare_width) - target[0] / 2)
        top = round(y * (target[1] + spare_height) - target[1] / 2)
        return min(max(left, 0), spare_width), min(max(top, 0), spare_height)

    return place


def _captions(seen: list[_Seen], settings: Dataset, auto_caption: AutoCaption | None) -> list[list[str] | str]:
    """The caption variants of every picture, or why it has none."""
    raw: list[tuple[str, ...]] = []
    for look in seen:
        found, concept = look.item.found, look.item.concept
        instance = concept.instance_prompt or (None if concept.regularisation else settings.instance_prompt)
        folder_name = found.class_name or Path(concept.path).name or Path(settings.path).name
        named = folder_name if settings.missing_caption == "folder-name" else ""
        raw.append(found.captions or ((instance,) if instance else (named,) if named else ()))
    if settings.missing_caption == "auto" and auto_caption:
        without = [i for i, captions in enumerate(raw) if not captions]
        written = auto_caption([(seen[i].item.file, seen[i].pixels) for i in without])
        for i, caption in zip(without, written, strict=True):
            raw[i] = (caption,)
    return [_resolve(look, captions, settings) for look, captions in zip(seen, raw, strict=True)]


def _resolve(look: _Seen, captions: tuple[str, ...], settings: Dataset) -> list[str] | str:
    if not captions:
        return "has no caption: write one beside it, or set dataset.instance_prompt, or dataset.missing_caption to folder-name or auto"
    concept = look.item.concept
    orders = (
        variants(captions, settings.keep_tags, settings.variants, settings.seed, look.pixels)
        if settings.shuffle_tags
        else list(captions)
    )
    prefix = settings.prefix if concept.prefix is None else concept.prefix
    suffix = settings.suffix if concept.suffix is None else concept.suffix
    trigger = "" if concept.regularisation else settings.trigger  # pictures of the class must not answer to it
    return list(dict.fromkeys(with_trigger(dress(c, prefix, suffix, settings.template), trigger) for c in orders))


def _hold_one_out(samples: list[Sample], settings: Dataset) -> list[Sample]:
    """Few pictures and chance: one is held out all the same, or nothing could be measured."""
    ours = [s for s in samples if not s.regularisation]
    if not settings.held_out_fraction or len(ours) < 2 or any(s.split == "held-out" for s in ours):
        return samples
    least = min(ours, key=lambda s: s.pixels)
    return [replace(s, split="held-out") if s.pixels == least.pixels and not s.regularisation else s for s in samples]


def _without_duplicates(
    samples: list[Sample], likenesses: list[Likeness], settings: Dataset
) -> tuple[list[Sample], list[Reject], list[tuple[str, str]]]:
    """Leave out later copies if asked to, and always what would carry a held-out picture into the training. The pairs are each
    near-duplicate's path after that of the first picture that it repeats."""
    everyone = Alike(likenesses, range(len(samples)))
    held_out = Alike(likenesses, [j for j, sample in enumerate(samples) if sample.split == "held-out"])
    pairs: dict[int, int] = {}  # each near-duplicate, and the first picture that it repeats
    gone: dict[int, str] = {}  # by place: two rows of an archive may hold one picture, and then share its path
    kept = {split: np.zeros(len(samples), np.bool_) for split in ("train", "held-out")}
    for j, sample in enumerate(samples):
        first = next(everyone.near(j))  # itself, if no other
        if first < j:
            pairs[j] = first
        if settings.duplicates == "drop":
            if first < j and (i := next(everyone.near(j, kept[sample.split]), None)) is not None:
                gone[j] = f"nearly the same picture as {samples[i].path}"
            else:
                kept[sample.split][j] = True
    for j, sample in enumerate(samples):
        if sample.split == "train" and j not in gone and (other := next(held_out.near(j), None)) is not None:
            gone[j] = f"nearly the same picture as {samples[other].path}, which is held out: losses would flatter"
    left_out = [Reject(samples[j].path, gone[j]) for j in sorted(gone)]
    return (
        [s for j, s in enumerate(samples) if j not in gone],
        left_out,
        [(samples[i].path, samples[j].path) for j, i in pairs.items()],
    )


def _ahead(work: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
    """Results in order, worked out in threads at most `_AHEAD` items ahead of the reader."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting: deque[tuple[T, Future[R]]] = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) == _AHEAD:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(cancel_futures=True)
