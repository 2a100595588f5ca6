"""Counts by name in the order in which a person reads them: `summary.json` and `tokens.json` have them by name."""

from __future__ import annotations

from collections.abc import Mapping


def in_ranges(counts: Mapping[str, int]) -> dict[str, int]:
    """By name, and "over 75" after "up to 40"."""
    return dict(sorted(counts.items(), key=lambda pair: (pair[0].startswith("over "), pair[0])))


def frequent(counts: Mapping[str, int], most: int) -> dict[str, int]:
    """The `most` frequent, the first of them first, equals by name."""
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:most])


def recurring(counts: Mapping[str, int]) -> dict[str, int]:
    """What occurs more than once: a sentence with a comma in it is no tag."""
    return {name: count for name, count in counts.items() if count > 1}
