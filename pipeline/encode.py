"""Which encodings the manifest needs, and which of them are not in the store yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from pipeline.dataset.manifest import Manifest, Sample
from pipeline.encodings import ContentStore, EncodedSample, Index, Reading, latent_key, mask_key, text_key
from pipeline.errors import UserError
from pipeline.families.base import Family
from pipeline.model_source import LocalModel
from pipeline.progress import say


@dataclass(frozen=True)
class How:
    """How pictures and captions are encoded: the `encode` section."""

    dtype: str  # of what is stored
    compute_dtype: str  # of the VAE's arithmetic
    flip: bool
    tiling: bool  # large pictures go through the VAE in tiles
    clip_skip: int
    caption_chunks: int


@dataclass(frozen=True, slots=True)
class Cut:
    """A training picture, or its mirror image."""

    sample: Sample
    flipped: bool


@dataclass(frozen=True)
class Todo:
    """What must be encoded, by key."""

    cuts: dict[str, Cut]
    captions: dict[str, str]
    masks: dict[str, Cut]

    def __bool__(self) -> bool:
        return bool(self.cuts or self.captions or self.masks)


@dataclass(frozen=True)
class Counts:
    """How much was really encoded."""

    pictures: int
    captions: int


class Work(Protocol):
    """Encodes everything that is to do and leaves it in the store."""

    def __call__(self, todo: Todo) -> None: ...


def encode(
    manifest: Manifest,
    family: Family,
    model: LocalModel,
    store: ContentStore,
    how: How,
    work: Work,
    seed: Callable[[], None] = lambda: None,
) -> tuple[Index, Counts]:
    """Make sure that every encoding of the manifest is in the store.

    Args:
        work: called with what is missing, unless nothing is.
        seed: called before that; may bring entries into the store from elsewhere.

    Raises:
        UserError: a picture does not fit the family's stride; and what `work` raises.
    """
    reading = Reading(model.fingerprint(*family.text_folders), how.caption_chunks, how.clip_skip, how.dtype)
    vae = "/".join([model.fingerprint(*family.vae_folders), how.compute_dtype, *(["tiled"] if how.tiling else [])])
    wanted = Todo({}, {text_key("", reading): ""}, {})
    cell = model.pixels_per_cell() if any(sample.mask for sample in manifest.samples) else 0
    samples = []
    for sample in manifest.samples:
        if any(side % family.stride for side in sample.geometry.size):
            raise UserError(
                f"{sample.path}: {'×'.join(map(str, sample.geometry.size))} pixels: {family.name} takes sides that are "
                f"multiples of {family.stride}: change dataset.resolution or dataset.buckets.step"
            )
        cuts = [Cut(sample, flipped) for flipped in (False, True)[: 1 + how.flip]]
        latents = [latent_key(sample.pixels, sample.geometry, cut.flipped, vae, how.dtype) for cut in cuts]
        texts = [text_key(caption, reading) for caption in sample.captions]
        masks = []
        if sample.mask:
            masks = [mask_key(sample.mask.pixels, sample.geometry, cut.flipped, cell) for cut in cuts]
        wanted.cuts.update(zip(latents, cuts, strict=True))
        wanted.captions.update(zip(texts, sample.captions, strict=True))
        wanted.masks.update(zip(masks, cuts, strict=False))
        samples.append(
            EncodedSample(
                sample.id,
                sample.captions,
                sample.split,
                sample.geometry.size,
                tuple(latents),
                tuple(texts),
                tuple(masks),
                sample.repeats,
                sample.regularisation,
            )
        )
    missing = _missing(wanted, store)
    if missing:
        seed()
        missing = _missing(wanted, store)
    if missing:
        work(missing)
    _tell_of_long_captions(store, wanted.captions)
    index = Index(
        family.name,
        how.dtype,
        how.clip_skip,
        how.caption_chunks,
        text_key("", reading),
        tuple(sorted(samples, key=lambda s: s.id)),
    )
    return index, Counts(len(missing.cuts), len(missing.captions))


def token_report(index: Index, store: ContentStore) -> dict[str, object]:
    """Lengths in tokens, and every caption that is cut off, by sample."""
    keys = sorted({key for s in index.samples for key in s.texts})
    tokens, limit = _tokens(store, keys)
    return {
        "limit": limit,
        "captions": len(keys),
        "lengths": _histogram(list(tokens.values())),
        "cut_off": [
            {"sample": s.id, "caption": caption, "tokens": tokens[key]}
            for s in index.samples
            for key, caption in zip(s.texts, s.captions, strict=True)
            if tokens[key] > limit
        ],
    }


def _missing(wanted: Todo, store: ContentStore) -> Todo:
    return Todo(
        {k: v for k, v in wanted.cuts.items() if k not in store},
        {k: v for k, v in wanted.captions.items() if k not in store},
        {k: v for k, v in wanted.masks.items() if k not in store},
    )


def _tokens(store: ContentStore, keys: Iterable[str]) -> tuple[dict[str, int], int]:
    """Length of each caption, by key, and how much of one is read."""
    pairs = {key: entry["tokens"].tolist() for key, entry in store.read(keys, "tokens").items()}
    return {key: count for key, (count, _) in pairs.items()}, next(iter(pairs.values()))[1]


def _tell_of_long_captions(store: ContentStore, captions: dict[str, str]) -> None:
    tokens, limit = _tokens(store, captions)
    long = sorted(captions[key] for key, count in tokens.items() if count > limit)
    if long:
        say(
            f"  {len(long)} captions are longer than the {limit} tokens that are read; the rest is cut off "
            "(encode.caption_chunks reads more; all of them are listed in build/encoded/tokens.json), as in:"
        )
        say(f"    {long[0][:160]}")


def _histogram(counts: list[int]) -> dict[str, int]:
    limits = (10, 20, 40, 75, 150, 225)
    names = [next((f"up to {limit:03d}" for limit in limits if count <= limit), "over 225") for count in counts]
    return {name: names.count(name) for name in sorted(set(names))}
