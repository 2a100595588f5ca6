"""The manifest: one line per training picture, written by prepare-dataset and read by the encoders."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.dataset.geometry import Geometry, shared
from pipeline.dataset.source import Reject
from pipeline.files import atomic_file, hash_json, json_fields, write_json
from pipeline.workspace import UNPACKED

Split = Literal["train", "held-out"]


@dataclass(frozen=True, slots=True)
class Mask:
    """Where the loss counts: white counts fully, black not at all."""

    path: str | None  # as a sample's; None: the picture's own alpha channel
    pixels: str  # sha256 of the decoded mask


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture, how it is cut, what it is called and which side of the split it is on."""

    path: str  # relative to the dataset's folder, or to the folder of unpacked pictures; with `/`
    pixels: str  # sha256 of the decoded picture
    geometry: Geometry
    captions: tuple[str, ...]  # variants: training draws one each time
    split: Split
    repeats: int = 1  # how often an epoch shows it
    regularisation: bool = False  # a picture of the class, not of the subject: prior preservation
    mask: Mask | None = None
    unpacked: bool = False

    @property
    def id(self) -> str:
        """Identity by content: the same after a rename."""
        mask = self.mask.pixels if self.mask else None
        content = [self.pixels, self.geometry, self.captions, self.repeats, self.regularisation, mask]
        return hash_json(content)[:16]


@dataclass(frozen=True, slots=True)
class Manifest:
    """All samples, sorted by path, and what is needed to find and read their pictures."""

    folder: str
    trigger: str
    background: str  # colour under transparent pictures
    samples: tuple[Sample, ...]

    def file(self, root: Path, sample: Sample) -> Path:
        """Where a sample's picture lies."""
        return root / (UNPACKED if sample.unpacked else self.folder) / sample.path


def split_of(pixels: str, held_out_fraction: float) -> Split:
    """The side of a picture, by its content alone: adding pictures never moves an old one across."""
    return "held-out" if int(pixels[:13], 16) / 16**13 < held_out_fraction else "train"


def write_manifest(out: Path, manifest: Manifest, rejects: Iterable[Reject], left_out: Iterable[Reject] = ()) -> None:
    """Write `dataset.json`, `manifest.jsonl`, `rejects.jsonl` and `left-out.jsonl` into the folder `out`."""
    head = {"folder": manifest.folder, "trigger": manifest.trigger, "background": manifest.background}
    write_json(out / "dataset.json", head)
    _write_lines(out / "manifest.jsonl", manifest.samples)
    _write_lines(out / "rejects.jsonl", rejects)
    _write_lines(out / "left-out.jsonl", left_out)


def read_manifest(folder: Path) -> Manifest:
    """The manifest that `write_manifest` wrote."""
    head = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    return Manifest(**head, samples=tuple(_sample(fields) for fields in read_lines(folder / "manifest.jsonl")))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, one by one. JSON lets U+2028 through, so lines end at `\\n` alone."""
    with path.open(encoding="utf-8", newline="\n") as file:
        yield from map(json.loads, file)


def _sample(fields: dict[str, Any]) -> Sample:
    geometry = shared(Geometry(*(tuple(fields["geometry"][key]) for key in ("original", "resized", "crop"))))
    mask = Mask(**fields["mask"]) if fields["mask"] else None
    return Sample(**{**fields, "geometry": geometry, "mask": mask, "captions": tuple(fields["captions"])})


def _write_lines(path: Path, rows: Iterable[Sample | Reject]) -> None:
    """One by one: the text of all of them would be as large as they are."""
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, default=json_fields, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
