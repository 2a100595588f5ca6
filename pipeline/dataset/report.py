"""What prepare-dataset shows a person: counts, and a contact sheet of what the model will see."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from PIL import Image

from pipeline.dataset.images import cut, decode
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.sidecar import Reject
from pipeline.files import write_json
from pipeline.pictures import labelled_grid

_ON_SHEET = 24


def write_report(out: Path, root: Path, manifest: Manifest, rejects: list[Reject], max_pixels: int) -> None:
    """Write `summary.json` and `contact-sheet.png` into the folder `out`."""
    words = Counter(word for s in manifest.samples for word in s.caption.replace(",", " ").split())
    sizes = Counter(f"{w}×{h}" for w, h in (s.geometry.size for s in manifest.samples))
    write_json(
        out / "summary.json",
        {
            "samples": len(manifest.samples),
            "train": sum(s.split == "train" for s in manifest.samples),
            "held_out": sum(s.split == "held-out" for s in manifest.samples),
            "rejected": len(rejects),
            "sizes": dict(sorted(sizes.items())),
            "distinct_captions": len({s.caption for s in manifest.samples}),
            "distinct_pictures": len({s.pixels for s in manifest.samples}),
            "frequent_words": dict(words.most_common(30)),
        },
    )
    shown = manifest.samples[:_ON_SHEET]
    cells: list[list[Image.Image]] = []
    labels: list[list[str]] = []
    for i in range(0, len(shown), 6):
        row = shown[i : i + 6]
        cells.append([cut(decode(root / manifest.folder / s.path, max_pixels), s.geometry) for s in row])
        labels.append([f"{s.caption} [{s.split}]" for s in row])
    labelled_grid(cells, captions=labels).save(out / "contact-sheet.png")
