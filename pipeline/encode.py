"""Encode what is not in the content store yet: the work of precompute-latents-and-embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.dataset.images import BadImage, cut, decode, hash_pixels
from pipeline.dataset.manifest import Manifest, Sample
from pipeline.encodings import ContentStore, EncodedSample, Entry, Index, latent_key, text_key
from pipeline.errors import UserError
from pipeline.families.base import Family
from pipeline.model_source import LocalModel
from pipeline.progress import progress, say

_PICTURES, _CAPTIONS = 8, 16  # per forward pass, at 512×512 pixels; larger pictures go in smaller batches
_KEEP_EVERY = 64  # pictures per segment: what a kill can cost


@dataclass(frozen=True)
class Counts:
    """How much was really encoded."""

    pictures: int
    captions: int


def encode(
    manifest: Manifest,
    root: Path,
    family: Family,
    model: LocalModel,
    store: ContentStore,
    dtype: str,
    flip: bool,
    device: torch.device,
    check_stop: Callable[[], None],
) -> tuple[Index, Counts]:
    """Make sure that every encoding of the manifest is in the store.

    Raises:
        UserError: a picture changed since the manifest was written, does not fit the family's stride, or encodes to
            non-finite values.
    """
    vae = model.fingerprint(*family.vae_folders)
    text = model.fingerprint(*family.text_folders)
    pictures: dict[str, tuple[Sample, bool]] = {}
    samples = []
    for sample in manifest.samples:
        if any(side % family.stride for side in sample.geometry.size):
            raise UserError(
                f"{sample.path}: {'×'.join(map(str, sample.geometry.size))} pixels: {family.name} takes sides that are "
                f"multiples of {family.stride}: change dataset.resolution"
            )
        keys = [latent_key(sample.pixels, sample.geometry, flipped, vae, dtype) for flipped in (False, True)[: 1 + flip]]
        pictures.update((key, (sample, flipped)) for key, flipped in zip(keys, (False, True), strict=False))
        samples.append(
            EncodedSample(
                sample.id,
                sample.caption,
                sample.split,
                sample.geometry.size,
                tuple(keys),
                text_key(sample.caption, text, dtype),
            )
        )
    captions = {text_key(caption, text, dtype): caption for caption in ["", *(s.caption for s in manifest.samples)]}
    todo_pictures = {k: v for k, v in pictures.items() if k not in store}
    todo_captions = {k: v for k, v in captions.items() if k not in store}
    target = getattr(torch, dtype)
    if todo_captions:
        _encode_captions(todo_captions, family, model, store, target, device, check_stop)
    if todo_pictures:
        _encode_pictures(todo_pictures, root / manifest.folder, family, model, store, target, device, check_stop)
    index = Index(family.name, dtype, text_key("", text, dtype), tuple(sorted(samples, key=lambda s: s.id)))
    return index, Counts(len(todo_pictures), len(todo_captions))


@torch.inference_mode()
def _encode_captions(
    todo: dict[str, str],
    family: Family,
    model: LocalModel,
    store: ContentStore,
    dtype: torch.dtype,
    device: torch.device,
    check_stop: Callable[[], None],
) -> None:
    encoders = family.load_text_encoders(model, device)
    keys = list(todo)
    counts, most = family.token_counts(encoders, [todo[k] for k in keys])
    long = [todo[k] for k, n in zip(keys, counts, strict=True) if n > most]
    if long:
        say(
            f"  {len(long)} captions are longer than the {most} tokens that the text encoder reads; the rest is cut off, as in:"
        )
        say(f"    {long[0][:160]}")
    with progress("encoding captions", len(keys), "captions") as bar:
        for chunk in _chunks(keys, _CAPTIONS):
            check_stop()
            # always a full batch: the last bits of a value must not depend on what else is encoded with it
            padded = [todo[k] for k in chunk] + [""] * (_CAPTIONS - len(chunk))
            named = family.encode_captions(encoders, padded)
            entries = {key: {part: values[i].to(dtype) for part, values in named.items()} for i, key in enumerate(chunk)}
            for key, entry in entries.items():
                if not all(values.isfinite().all() for values in entry.values()):
                    raise UserError(
                        f"the caption {todo[key][:100]!r} has no finite embedding in {dtype}: set encode.dtype to float32"
                    )
            store.add(entries)
            bar.advance(len(chunk))


@torch.inference_mode()
def _encode_pictures(
    todo: dict[str, tuple[Sample, bool]],
    folder: Path,
    family: Family,
    model: LocalModel,
    store: ContentStore,
    dtype: torch.dtype,
    device: torch.device,
    check_stop: Callable[[], None],
) -> None:
    vae = family.load_vae(model, device)
    pending: dict[str, Entry] = {}
    # pictures of one size share a batch; both sides of a flip follow each other
    keys = sorted(todo, key=lambda k: (todo[k][0].geometry.size, todo[k][0].path, todo[k][1]))
    try:
        with progress("encoding pictures", len(keys), "pictures") as bar:
            for chunk in _batches_of_one_size(keys, todo):
                check_stop()
                pixels = [_pixels(folder, *todo[key]) for key in chunk]
                # always a full batch, as with captions
                full = torch.stack(pixels + [pixels[-1]] * (_batch_size(todo[chunk[0]][0]) - len(chunk)))
                posterior = family.encode_pixels(vae, full.to(device))
                for i, key in enumerate(chunk):
                    mean, std = posterior.mean[i].to(dtype).cpu(), posterior.std[i].to(dtype).cpu()
                    if not (mean.isfinite().all() and std.isfinite().all()):
                        raise UserError(
                            f"{todo[key][0].path}: its latents are not finite in {dtype}: set encode.dtype to float32 or "
                            "bfloat16, or look at the picture"
                        )
                    pending[key] = {"mean": mean, "std": std, "geometry": geometry_condition(*todo[key])}
                if len(pending) >= _KEEP_EVERY:
                    store.add(pending)
                    pending = {}
                bar.advance(len(chunk))
    finally:
        store.add(pending)


def _batch_size(sample: Sample) -> int:
    """Pictures per forward pass of the VAE, whose memory grows with their area."""
    width, height = sample.geometry.size
    return max(1, min(_PICTURES, _PICTURES * 512 * 512 // (width * height)))


def geometry_condition(sample: Sample, flipped: bool) -> Tensor:
    """Original height and width, crop top and left (mirrored with the picture), target height and width: (6,) float32."""
    g = sample.geometry
    left, top, right, _ = g.crop
    width, height = g.size
    crop_left = g.resized[0] - right if flipped else left
    return torch.tensor([g.original[1], g.original[0], top, crop_left, height, width], dtype=torch.float32)


def _pixels(folder: Path, sample: Sample, flipped: bool) -> Tensor:
    """(3, H, W) in [-1, 1].

    Raises:
        UserError: the file is not what the manifest describes.
    """
    path = folder / sample.path
    try:
        image = decode(path, max_pixels=2**62)  # the manifest holds only pictures that were let in
    except BadImage as bad:
        raise UserError(f"{sample.path} {bad}, but was fine when prepare-dataset read it: run again") from None
    if hash_pixels(image) != sample.pixels:
        raise UserError(f"{sample.path} changed since prepare-dataset read it: run again")
    picture = cut(image, sample.geometry)
    if flipped:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.asarray(picture, np.float32) / 127.5 - 1).permute(2, 0, 1)


def _batches_of_one_size(keys: Sequence[str], todo: dict[str, tuple[Sample, bool]]) -> Iterator[list[str]]:
    batch: list[str] = []
    for key in keys:
        if batch and (len(batch) == _batch_size(todo[key][0]) or todo[key][0].geometry.size != todo[batch[0]][0].geometry.size):
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch


def _chunks(keys: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for i in range(0, len(keys), size):
        yield keys[i : i + size]
