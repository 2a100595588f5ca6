"""Settings that suit a folder of pictures: resolution, length, repeats, each with its reason."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Dataset
from pipeline.dataset.source import is_image, visible_files
from pipeline.dataset.sources import source_of
from pipeline.errors import UserError

_EXPOSURES = 100  # how often a picture is shown: what styles and subjects of a few dozen pictures usually take
_LEAST_STEPS, _MOST_STEPS = 300, 4000
_FEW = 10  # pictures
_UNEVEN = 2  # a folder with so many times the pictures of another outweighs it


@dataclass(frozen=True)
class Proposal:
    """A setting, and why."""

    key: str
    value: Any
    reason: str


def propose(pictures: Path, resolution: int, batch_size: int) -> list[Proposal]:
    """Look at the pictures and propose what suits them; nothing where none lies open to be looked at.

    Args:
        resolution: the base's own, in pixels.
        batch_size: pictures a step.

    Raises:
        UserError: every picture is too small for any base.
    """
    sides = _shorter_sides(pictures)
    if not sides:
        return []
    small = sorted(sides.values())[len(sides) // 10]
    step = 64 if resolution > 64 else 8
    fitting = max(step, min(resolution, small // step * step))
    left = sum(side < fitting for side in sides.values())
    if left == len(sides):
        raise UserError(
            f"the largest of {left} pictures has {max(sides.values())} pixels on its shorter side: {fitting} are needed"
        )
    why = f"nine pictures in ten have {small} pixels or more on their shorter side"
    why += f"; {left} smaller ones are rejected" if left else ""
    proposals = [Proposal("dataset.resolution", fitting, why if fitting < resolution else f"the base's own; {why}")]
    if left:
        proposals.append(Proposal("dataset.max_rejected", left, "those that are too small"))
    repeats = _repeats(pictures, [name for name, side in sides.items() if side >= fitting])
    return [*proposals, *repeats, _steps(len(sides) - left, batch_size, bool(repeats))]


def _steps(count: int, batch_size: int, repeated: bool) -> Proposal:
    steps = min(_MOST_STEPS, max(_LEAST_STEPS, round(_EXPOSURES * count / batch_size / 50) * 50))
    why = f"{count} pictures are shown some {steps * batch_size / count:.0f} times each, {batch_size} a step"
    if repeated:
        why += ", those of smaller folders more often"
    elif count < _FEW:
        why += "; so few need no repeats, since steps alone say how often each is shown, but mind the overfitting_gap"
    return Proposal("train.steps", steps, why)


def _repeats(pictures: Path, names: list[str]) -> list[Proposal]:
    """`dataset.concepts`, where the pictures lie in folders of very different sizes and nothing else says how often to show each."""
    sizes: dict[str, int] = defaultdict(int)
    for name in names:
        top, slash, _ = name.partition("/")
        sizes[top if slash else ""] += 1
    if len(sizes) < 2 or "" in sizes or max(sizes.values()) < _UNEVEN * min(sizes.values()) or not _plain(pictures):
        return []
    most = max(sizes.values())
    concepts = [{"path": top, "repeats": max(1, round(most / size))} for top, size in sorted(sizes.items())]
    told = ", ".join(f"{top} {size}" for top, size in sorted(sizes.items()))
    return [Proposal("dataset.concepts", concepts, f"the folders differ in size ({told}) and are to count about the same")]


def _plain(pictures: Path) -> bool:
    """Whether the captions lie beside the pictures, so that each folder can be read alone."""
    try:
        return source_of(pictures, Dataset(path=str(pictures), resolution=64)).name == "sidecar"
    except UserError:  # `check` tells
        return False


def _shorter_sides(pictures: Path) -> dict[str, int]:
    """Pixels of each picture that lies open, by its relative path."""
    from PIL import Image

    sides = {}
    for name in visible_files(pictures):
        if is_image(name):
            try:
                with Image.open(pictures / name) as image:
                    sides[name] = min(image.size)
            except Exception:  # prepare-dataset says what is wrong with it
                continue
    return sides
