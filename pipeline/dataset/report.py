"""What prepare-dataset shows a person: counts, a page, and a contact sheet of what the model will see."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image, ImageDraw

from pipeline.config import Dataset
from pipeline.dataset.counts import frequent, in_ranges, recurring
from pipeline.dataset.images import decode
from pipeline.dataset.manifest import Sample
from pipeline.dataset.prepare import Prepared
from pipeline.files import write_json, write_text
from pipeline.pictures import labelled_grid

_ON_SHEET = 24
_CELL = 192  # pixels, both sides
_COLUMNS = 6


def write_report(out: Path, root: Path, prepared: Prepared, settings: Dataset, unpacked: Path) -> None:
    """Write `summary.json`, `index.html` and `contact-sheet.png` into the folder `out`.

    Args:
        unpacked: where the pictures of packed sources lie now.
    """
    summary = summarise(prepared)
    write_json(out / "summary.json", summary)
    samples = prepared.manifest.samples
    shown = [samples[i * len(samples) // _ON_SHEET] for i in range(_ON_SHEET)] if len(samples) > _ON_SHEET else list(samples)
    files = [(unpacked if s.unpacked else root / prepared.manifest.folder) / s.path for s in shown]
    cells = [_cell(file, sample, settings) for file, sample in zip(files, shown, strict=True)]
    labels = [f"{s.captions[0]} [{'regularisation' if s.regularisation else s.split}]" for s in shown]
    rows = range(0, len(shown), _COLUMNS)
    labelled_grid([cells[i : i + _COLUMNS] for i in rows], captions=[labels[i : i + _COLUMNS] for i in rows]).save(
        out / "contact-sheet.png"
    )
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.jinja").render(
        folder=settings.path,
        summary=summary,
        tags=recurring(summary["tags"]),
        rejects=prepared.rejects,
        left_out=prepared.left_out,
        duplicates=prepared.duplicates,
        notes=prepared.notes,
    )
    write_text(out / "index.html", page)


def summarise(prepared: Prepared) -> dict[str, Any]:
    """Counts, as JSON types."""
    samples = prepared.manifest.samples
    ours = [s for s in samples if not s.regularisation]
    train = [s for s in ours if s.split == "train"]
    return {
        "samples": len(samples),
        "train": len(train),
        "train_with_repeats": sum(s.repeats for s in train),
        "held_out": len(ours) - len(train),
        "regularisation": len(samples) - len(ours),
        "masked": sum(s.mask is not None for s in samples),
        "rejected": len(prepared.rejects),
        "rejected_by_reason": _by_reason(r.reason for r in prepared.rejects),
        "left_out": len(prepared.left_out),
        "left_out_by_reason": _by_reason(r.reason for r in prepared.left_out),
        "near_duplicates": len(prepared.duplicates),
        "notes_by_reason": _by_reason(r.reason for r in prepared.notes),
        "sizes": _counted(f"{w}×{h}" for w, h in (s.geometry.size for s in samples)),
        "original_megapixels": _counted(_megapixels(s) for s in samples),
        "caption_words": _counted(_words(s) for s in samples),
        "caption_variants": sum(len(s.captions) for s in samples),
        "distinct_captions": len({c for s in samples for c in s.captions}),
        "distinct_pictures": len({s.pixels for s in samples}),
        "frequent_words": _most(word for s in samples for word in s.captions[0].replace(",", " ").split()),
        "tags": _most(tag.strip() for s in samples if "," in s.captions[0] for tag in s.captions[0].split(",")),
    }


def in_words(prepared: Prepared) -> str:
    """One line for the screen."""
    counts = summarise(prepared)
    parts = [f"{counts['samples']} pictures: {counts['train']} to train on, {counts['held_out']} held out"]
    if counts["regularisation"]:
        parts.append(f"{counts['regularisation']} for regularisation")
    if counts["left_out"]:
        parts.append(f"{counts['left_out']} left out as duplicates")
    return ", ".join([*parts, f"{counts['rejected']} rejected"])


def _cell(file: Path, sample: Sample, settings: Dataset) -> Image.Image:
    """The whole picture on a square, what is cut away faded, the cut framed."""
    image = decode(file, settings.max_pixels, settings.background).image
    scale = _CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)
    faded = Image.blend(small, Image.new("RGB", size, "white"), 0.65)
    box = tuple(round(edge * size[i % 2] / sample.geometry.resized[i % 2]) for i, edge in enumerate(sample.geometry.crop))
    left, top, right, bottom = box
    faded.paste(small.crop((left, top, right, bottom)), (left, top))
    if (right - left, bottom - top) != size:
        ImageDraw.Draw(faded).rectangle((left, top, right - 1, bottom - 1), outline=(220, 60, 30))
    cell = Image.new("RGB", (_CELL, _CELL), (235, 235, 235))
    cell.paste(faded, ((_CELL - size[0]) // 2, (_CELL - size[1]) // 2))
    return cell


def _by_reason(reasons: Iterable[str]) -> dict[str, int]:
    """Counts by reason, with the numbers and names in it left out, so that like faults stand together."""
    plain = (re.sub(r"^names .*?(?=, which|:|$)", "names …", reason).split(":")[0] for reason in reasons)
    plain = (re.sub(r"(\s*\([^()]*\))+$", "", reason) for reason in plain)
    return _counted(re.sub(r"\S*\d\S*|\S+\.\w{2,5}(?=[\s,]|$)", "…", reason)[:100] for reason in plain)


def _counted(values: Iterable[str]) -> dict[str, int]:
    return in_ranges(Counter(values))


def _most(values: Iterable[str]) -> dict[str, int]:
    return frequent(Counter(values), 40)


def _megapixels(sample: Sample) -> str:
    width, height = sample.geometry.original
    pixels = width * height / 1e6
    limits = (0.25, 0.5, 1, 2, 4, 8, 16)
    return next((f"up to {limit:g}" for limit in limits if pixels <= limit), "over 16")


def _words(sample: Sample) -> str:
    count = len(sample.captions[0].split())
    limits = (5, 10, 20, 40, 75)
    return next((f"up to {limit:02d}" for limit in limits if count <= limit), "over 75")
