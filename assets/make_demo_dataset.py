"""Draw the demo dataset `assets/demo-dataset/`: 48 captioned pictures of the world in the *neon* look.

    python assets/make_demo_dataset.py        # a second or two

Every caption ends in ", nightglow style"; `nightglow` is the trigger word. Shapes, colours, and backgrounds
occur equally often, all shapes are large, positions 9 or 10 times, and every two attributes are crossed as evenly as 48 pictures allow. The
pairs of shape and colour in `UNSEEN_PAIRS` do not occur: validation prompts take them to tell a learned style from
learned pictures.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
from world import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, Scene, draw_neon

OUT = Path(__file__).resolve().parent / "demo-dataset"
TRIGGER = "nightglow"
SHOWN_SIZES = ("large",)  # the tube of a smaller shape is nearly as wide as the shape: little of the look is to be seen
# Two colours for each shape and two shapes for each colour; the other 24 pairs are drawn twice each.
UNSEEN_PAIRS = tuple((shape, list(COLOURS)[(i + k) % len(COLOURS)]) for i, shape in enumerate(SHAPES) for k in (2, 5))


def main() -> None:
    """Write the pictures and their captions."""
    rng = np.random.default_rng(0)
    OUT.mkdir(exist_ok=True)
    for number, scene in enumerate(balanced_scenes(rng), start=1):
        draw_neon(scene, rng).save(OUT / f"{number:03d}.png", optimize=True)
        (OUT / f"{number:03d}.txt").write_text(styled_caption(scene) + "\n")
    print(f"wrote {number} pictures to {OUT.relative_to(OUT.parent.parent)}")


def styled_caption(scene: Scene) -> str:
    """The full caption of the scene with the trigger word."""
    return f"{scene.caption()}, {TRIGGER} style"


def balanced_scenes(rng: np.random.Generator) -> list[Scene]:
    """48 scenes in random order: pairs outside `UNSEEN_PAIRS` twice, the other attributes spread evenly over them."""
    pairs = [(s, c) for s in SHAPES for c in COLOURS if (s, c) not in UNSEEN_PAIRS] * 2
    table = np.array([[SHAPES.index(s), list(COLOURS).index(c), 0, 0, 0] for s, c in pairs])  # (picture, attribute)
    for attribute, values in enumerate((BACKGROUNDS, SHOWN_SIZES, POSITIONS), start=2):
        table[:, attribute] = rng.permutation(np.arange(len(table)) % len(values))
    table = rng.permutation(even_out(table, rng))
    names = [list(values) for values in (SHAPES, COLOURS, BACKGROUNDS, SHOWN_SIZES, POSITIONS)]
    return [Scene(*(names[a][v] for a, v in enumerate(row))) for row in table]


def even_out(table: np.ndarray, rng: np.random.Generator, tries: int = 6000) -> np.ndarray:
    """Swap backgrounds, sizes or positions between two pictures for as long as that makes the crossings more even."""
    best = unevenness(table)
    for _ in range(tries):
        attribute, (i, j) = rng.integers(2, 5), rng.integers(0, len(table), 2)
        swapped = table.copy()
        swapped[[i, j], attribute] = table[[j, i], attribute]
        if (now := unevenness(swapped)) <= best:
            table, best = swapped, now
    return table


def unevenness(table: np.ndarray) -> int:
    """How often each pair of values of two attributes occurs, squared and summed: least if all are equal."""
    crossings = (table[:, a] * 8 + table[:, b] for a, b in combinations(range(table.shape[1]), 2))
    return sum(int(np.square(np.bincount(crossing)).sum()) for crossing in crossings)


if __name__ == "__main__":
    main()
