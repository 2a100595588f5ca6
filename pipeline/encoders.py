"""Encoding itself: captions, pictures and masks into the store, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.dataset.geometry import cut
from pipeline.dataset.images import BadImage, Picture, decode, hash_pixels, read_mask
from pipeline.dataset.manifest import Manifest
from pipeline.encode import Cut, How, Todo
from pipeline.encodings import ContentStore, Entry
from pipeline.errors import UserError
from pipeline.families.base import Family, Posterior
from pipeline.model_source import LocalModel
from pipeline.progress import progress, say

_PICTURES, _CAPTIONS = 8, 16  # per forward pass, at 512×512 pixels; larger pictures go in smaller batches
_KEEP_EVERY = 64  # pictures in a segment at least, and less than twice as many: what a kill can cost
_LET_IN = 2**62  # the manifest holds only pictures that were let in


def encode_todo(
    todo: Todo,
    manifest: Manifest,
    root: Path,
    family: Family,
    model: LocalModel,
    store: ContentStore,
    how: How,
    device: torch.device,
    workers: int,
    check_stop: Callable[[], None],
) -> None:
    """Encode everything that is to do, in this process; models are loaded only where they are needed.

    Raises:
        UserError: as the three functions below.
    """
    if todo.masks:
        encode_masks(todo.masks, manifest, root, store, model.pixels_per_cell(), check_stop)
    if todo.captions:
        encode_captions(todo.captions, family, model, store, how, device, check_stop)
    if todo.cuts:
        encode_cuts(todo.cuts, manifest, root, family, model, store, how, device, workers, check_stop)


@torch.inference_mode()
def encode_captions(
    todo: dict[str, str],
    family: Family,
    model: LocalModel,
    store: ContentStore,
    how: How,
    device: torch.device,
    check_stop: Callable[[], None],
) -> None:
    """Encode captions by key.

    Raises:
        UserError: an embedding is not finite in the stored type, or a caption does not fit into the device's memory alone.
    """
    encoders, dtype = family.load_text_encoders(model, device), getattr(torch, how.dtype)
    keys = list(todo)
    counts, most = family.token_counts(encoders, [todo[k] for k in keys], how.caption_chunks)
    tokens = dict(zip(keys, counts, strict=True))
    with progress("encoding captions", len(keys), "captions") as bar:
        size, start = _CAPTIONS, 0
        while start < len(keys):
            check_stop()
            chunk = keys[start : start + size]
            # always a full batch: the last bits of a value must not depend on what else is encoded with it
            padded = [todo[k] for k in chunk] + [""] * (size - len(chunk))
            try:
                named = family.encode_captions(encoders, padded, how.caption_chunks, how.clip_skip)
                stored = {part: values.to(dtype).cpu() for part, values in named.items()}
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                if size == 1:
                    raise UserError(
                        f"encoding one caption takes more memory than {device} has: lower encode.caption_chunks, or set "
                        "runtime.device to cpu"
                    ) from None
                _free(device)
                size //= 2
                say(f"  out of memory with {size * 2} captions at once: going on with {size}")
                continue
            start += len(chunk)
            entries = {key: {part: values[i] for part, values in stored.items()} for i, key in enumerate(chunk)}
            for key, entry in entries.items():
                if not all(values.isfinite().all() for values in entry.values()):
                    raise UserError(
                        f"the caption {todo[key][:100]!r} has no finite embedding in {how.dtype}: set encode.dtype to float32"
                    )
                entry["tokens"] = torch.tensor([tokens[key], most], dtype=torch.int32)
            store.add(entries)
            bar.advance(len(chunk))


@torch.inference_mode()
def encode_cuts(
    todo: dict[str, Cut],
    manifest: Manifest,
    root: Path,
    family: Family,
    model: LocalModel,
    store: ContentStore,
    how: How,
    device: torch.device,
    workers: int,
    check_stop: Callable[[], None],
) -> None:
    """Encode pictures by key, decoding ahead in worker processes.

    Raises:
        UserError: a picture changed since the manifest was written, encodes to values that are not finite, or does not fit
            into the device's memory alone.
    """
    vae = _Vae(family, model, device, how)
    dtype = getattr(torch, how.dtype)
    keys = sorted(todo, key=lambda k: (todo[k].sample.geometry.size, k))
    batches = list(_batches_of_one_size(keys, todo))
    loader = DataLoader(
        _Pixels([todo[k] for k in keys], manifest, root),
        batch_sampler=_indices(batches),
        collate_fn=_together,
        num_workers=workers if len(keys) >= _KEEP_EVERY else 0,  # starting them costs more than a few pictures
    )
    pending: dict[str, Entry] = {}
    try:
        with progress("encoding pictures", len(keys), "pictures") as bar:
            for batch, loaded in zip(batches, loader, strict=True):
                check_stop()
                if isinstance(loaded, list):
                    raise UserError("\n".join(loaded))
                posterior = vae.encode(loaded, [todo[k].sample.path for k in batch])
                means, stds = (values.to(dtype).cpu() for values in (posterior.mean, posterior.std))
                fine = (means.isfinite() & stds.isfinite()).flatten(1).all(1).tolist()
                for i, key in enumerate(batch):
                    if not fine[i]:
                        raise UserError(
                            f"{todo[key].sample.path}: its latents are not finite in {dtype}: set encode.dtype to float32 or "
                            "bfloat16, or look at the picture"
                        )
                    # a copy of each: what is kept must not hold its whole batch
                    mean, std = means[i].clone(), stds[i].clone()
                    pending[key] = {"mean": mean, "std": std, "geometry": geometry_condition(todo[key])}
                if len(pending) >= _KEEP_EVERY:
                    store.add(pending)
                    pending = {}
                bar.advance(len(batch))
    finally:
        store.add(pending)


def encode_masks(
    todo: dict[str, Cut], manifest: Manifest, root: Path, store: ContentStore, cell: int, check_stop: Callable[[], None]
) -> None:
    """Resize masks by key to one value per latent cell of `cell` pixels, the mean of what it covers."""
    with progress("resizing masks", len(todo), "masks") as bar:
        for chunk in _chunks(list(todo), _KEEP_EVERY):
            check_stop()
            entries: dict[str, Entry] = {}
            for key in chunk:
                mask = _read_mask(manifest, root, todo[key])
                width, height = todo[key].sample.geometry.size
                small = mask.resize((width // cell, height // cell), Image.Resampling.BOX)
                entries[key] = {"mask": torch.from_numpy(np.asarray(small, np.float32) / 255)[None]}
                bar.advance()
            store.add(entries)


def geometry_condition(wanted: Cut) -> Tensor:
    """Original height and width, crop top and left (mirrored with the picture), target height and width: (6,) float32."""
    g = wanted.sample.geometry
    left, top, right, _ = g.crop
    width, height = g.size
    crop_left = g.resized[0] - right if wanted.flipped else left
    return torch.tensor([g.original[1], g.original[0], top, crop_left, height, width], dtype=torch.float32)


class _Vae:
    """The image encoder with its fall-backs: smaller batches when memory runs out, float32 when values are not finite."""

    def __init__(self, family: Family, model: LocalModel, device: torch.device, how: How) -> None:
        self.family, self.model, self.device, self.how = family, model, device, how
        self.vae = self._load(getattr(torch, how.compute_dtype))
        self.exact: torch.nn.Module | None = None  # the same in float32, once it is needed
        self.most = _PICTURES * 512 * 512  # pixels in a forward pass

    def encode(self, pixels: Tensor, names: Sequence[str]) -> Posterior:
        """(B, 3, H, W) bytes -> the normalised posterior in float32, on the device."""
        area = pixels.shape[-1] * pixels.shape[-2]
        parts: list[Posterior] = []
        start = 0
        while start < len(pixels):
            size = max(1, min(_PICTURES, self.most // area))
            part = pixels[start : start + size]
            # always a full batch: the last bits of a value must not depend on what else is encoded with it
            full = torch.cat([part, part[:1].expand(size - len(part), -1, -1, -1)])
            try:
                full = full.to(self.device).float() / 127.5 - 1  # in [-1, 1]
                posterior = self.family.encode_pixels(self.vae, full)
                if self.how.compute_dtype != "float32":
                    posterior = self._mended(posterior, full, names[start : start + len(part)])
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                self._shrink(size, area, names[start])
                continue
            parts.append(Posterior(posterior.mean[: len(part)], posterior.std[: len(part)]))
            start += len(part)
        return Posterior(torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts]))

    def _mended(self, posterior: Posterior, full: Tensor, names: Sequence[str]) -> Posterior:
        """Rows that are not finite done again in float32, and no others: a value must not depend on what else is encoded."""
        fine = posterior.mean.isfinite().flatten(1).all(1) & posterior.std.isfinite().flatten(1).all(1)
        if fine.all():
            return posterior
        bad = [name for name, row in zip(names, fine, strict=False) if not row]
        say(f"  {', '.join(bad[:3])}{' …' if len(bad) > 3 else ''}: not finite in {self.how.compute_dtype}: encoded in float32")
        self.exact = self.exact or self._load(torch.float32)
        exact, rows = self.family.encode_pixels(self.exact, full), fine[:, None, None, None]
        return Posterior(torch.where(rows, posterior.mean, exact.mean), torch.where(rows, posterior.std, exact.std))

    def _load(self, dtype: torch.dtype) -> torch.nn.Module:
        vae: torch.nn.Module = self.family.load_vae(self.model, self.device, dtype)
        if self.how.tiling:
            vae.enable_tiling()  # type: ignore[operator]
        return vae

    def _shrink(self, size: int, area: int, name: str) -> None:
        if size == 1:
            raise UserError(
                f"{name}: encoding it alone takes more memory than {self.device} has: set encode.tiling, lower "
                "dataset.resolution, or set runtime.device to cpu"
            )
        _free(self.device)
        self.most = size // 2 * area
        say(f"  out of memory with {size} pictures at once: going on with {size // 2}")


def _is_out_of_memory(error: RuntimeError) -> bool:
    """CPUs and MPS raise the plain kind."""
    return isinstance(error, torch.OutOfMemoryError) or "memory" in str(error).lower()


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


class _Pixels(Dataset[Tensor | str]):
    """Decoded and cut pictures, (3, H, W) bytes, or why there is none: an exception would come out of a worker with its
    traceback."""

    def __init__(self, cuts: Sequence[Cut], manifest: Manifest, root: Path) -> None:
        self.cuts, self.manifest, self.root = cuts, manifest, root

    def __len__(self) -> int:
        return len(self.cuts)

    def __getitem__(self, index: int) -> Tensor | str:
        wanted = self.cuts[index]
        try:
            image = _decode(self.manifest, self.root, wanted).image
        except UserError as error:
            return str(error)
        picture = cut(image, wanted.sample.geometry)
        if wanted.flipped:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _together(items: list[Tensor | str]) -> Tensor | list[str]:
    """A batch, (B, 3, H, W) bytes, or what is wrong with it. As one tensor, and in bytes: a worker hands it over by file descriptor."""
    faults = [item for item in items if isinstance(item, str)]
    return faults or torch.stack([item for item in items if isinstance(item, Tensor)])


def _decode(manifest: Manifest, root: Path, wanted: Cut) -> Picture:
    """The picture as the manifest describes it.

    Raises:
        UserError: the file is another one now.
    """
    sample = wanted.sample
    try:
        picture = decode(manifest.file(root, sample), _LET_IN, manifest.background)
    except BadImage as bad:
        raise UserError(f"{sample.path} {bad}, but was fine when prepare-dataset read it: run again") from None
    if hash_pixels(picture.image) != sample.pixels:
        raise UserError(f"{sample.path} changed since prepare-dataset read it: run again")
    return picture


def _read_mask(manifest: Manifest, root: Path, wanted: Cut) -> Image.Image:
    sample = wanted.sample
    assert sample.mask
    if sample.mask.path is None:
        mask = _decode(manifest, root, wanted).alpha
    else:
        try:
            mask = read_mask(root / manifest.folder / sample.mask.path, sample.geometry.original, _LET_IN)
        except BadImage as bad:
            raise UserError(f"{sample.path} {bad}, but was fine when prepare-dataset read it: run again") from None
    if mask is None or hash_pixels(mask) != sample.mask.pixels:
        raise UserError(f"the mask of {sample.path} changed since prepare-dataset read it: run again")
    picture = cut(mask, sample.geometry)
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if wanted.flipped else picture


def _batches_of_one_size(keys: Sequence[str], todo: dict[str, Cut]) -> Iterator[list[str]]:
    batch: list[str] = []
    for key in keys:
        size = todo[key].sample.geometry.size
        if batch and (len(batch) == _batch_size(size) or size != todo[batch[0]].sample.geometry.size):
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch


def _batch_size(size: tuple[int, int]) -> int:
    """Pictures that a worker hands over at once: as many pixels as a forward pass takes of large ones. Handing over costs as much for
    few small pictures as for many, and theirs are the short forward passes."""
    return max(1, min(_KEEP_EVERY, _PICTURES * 512 * 512 // (size[0] * size[1])))


def _indices(batches: Sequence[Sequence[str]]) -> list[list[int]]:
    """The same batches as positions in their concatenation."""
    starts = np.cumsum([0, *map(len, batches)])
    return [list(range(start, start + len(batch))) for start, batch in zip(starts, batches, strict=False)]


def _chunks(keys: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for i in range(0, len(keys), size):
        yield keys[i : i + size]
