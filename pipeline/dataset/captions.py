"""From what a source says of a picture to the captions that the model reads: all choices are made here, with a seed."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np


def variants(captions: Sequence[str], keep_tags: int, count: int, seed: int, pixels: str) -> list[str]:
    """`count` orders of the comma-separated tags of each caption, the first `keep_tags` in their places.

    The orders are settled by the seed and the picture's content (`pixels`, hex), so that adding pictures changes no
    other picture's captions.
    """
    rng = np.random.default_rng([seed, int(pixels[:16], 16)])
    orders = []
    for caption in captions:
        tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
        for _ in range(count):
            rest = tags[keep_tags:]
            orders.append(", ".join([*tags[:keep_tags], *(rest[i] for i in rng.permutation(len(rest)))]))
    return orders


def dress(caption: str, prefix: str, suffix: str, template: str) -> str:
    """The caption between prefix and suffix, then put into the template's `{caption}`."""
    return " ".join(template.replace("{caption}", " ".join(part for part in (prefix, caption, suffix) if part)).split())


def with_trigger(caption: str, trigger: str) -> str:
    """The caption with the trigger word in front, unless it holds it already."""
    if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption):  # "sks" is not in "two desks"
        return caption
    return f"{trigger}, {caption}"
