"""The manifest: one line per training picture, written by prepare-dataset and read by the encoders."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pipeline.dataset.images import Geometry
from pipeline.dataset.sidecar import Reject
from pipeline.files import hash_json, write_json, write_text

Split = Literal["train", "held-out"]


@dataclass(frozen=True)
class Sample:
    """A picture, how it is cut, what it is called and which side of the split it is on."""

    path: str  # relative to the dataset's folder, with `/`
    pixels: str  # sha256 of the decoded picture
    geometry: Geometry
    caption: str
    split: Split

    @property
    def id(self) -> str:
        """Identity by content: the same after a rename."""
        return hash_json([self.pixels, asdict(self.geometry), self.caption])[:16]


@dataclass(frozen=True)
class Manifest:
    """All samples, sorted by path, and the folder that their paths start from."""

    folder: str
    trigger: str
    samples: tuple[Sample, ...]


def split_of(pixels: str, held_out_fraction: float) -> Split:
    """The side of a picture, by its content alone: adding pictures never moves an old one across."""
    return "held-out" if int(pixels[:13], 16) / 16**13 < held_out_fraction else "train"


def write_manifest(out: Path, manifest: Manifest, rejects: Iterable[Reject]) -> None:
    """Write `dataset.json`, `manifest.jsonl` and `rejects.jsonl` into the folder `out`."""
    write_json(out / "dataset.json", {"folder": manifest.folder, "trigger": manifest.trigger})
    write_text(out / "manifest.jsonl", "".join(_line(asdict(s)) for s in manifest.samples))
    write_text(out / "rejects.jsonl", "".join(_line(asdict(r)) for r in rejects))


def read_manifest(folder: Path) -> Manifest:
    """The manifest that `write_manifest` wrote."""
    head = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    lines = (folder / "manifest.jsonl").read_text(encoding="utf-8").split("\n")[:-1]  # JSON lets U+2028 through
    return Manifest(head["folder"], head["trigger"], tuple(_sample(json.loads(line)) for line in lines))


def _sample(fields: dict) -> Sample:  # type: ignore[type-arg]
    geometry = Geometry(*(tuple(fields["geometry"][key]) for key in ("original", "resized", "crop")))
    return Sample(**{**fields, "geometry": geometry})


def _line(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True) + "\n"
