"""The model card: every fact in it is handed in by what really ran."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from ruamel.yaml import YAML

_HERE = Path(__file__).parent


def render_card(header: dict[str, Any], facts: dict[str, Any]) -> str:
    """The card's text.

    Args:
        header: the YAML header for the Hub; entries that are None are left out.
        facts: what the template `card.md.jinja` names; a fact that is missing is an error.
    """
    yaml, text = YAML(), io.StringIO()
    yaml.width = 10_000
    yaml.dump({key: value for key, value in header.items() if value is not None}, text)
    environment = Environment(
        loader=FileSystemLoader(_HERE), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    environment.filters |= {"md": escape_markdown, "code": inside_code}
    return environment.get_template("card.md.jinja").render(header=text.getvalue().strip(), **facts)


def escape_markdown(text: object) -> str:
    """Text from outside (captions, prompts, names) made inert in Markdown, HTML and tables."""
    safe = str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for mark in "\\`*_[]|#~":
        safe = safe.replace(mark, "\\" + mark)
    return " ".join(safe.split())


def inside_code(text: object) -> str:
    """Text between two backticks: one of its own would end the code, and a bar the table's cell."""
    return " ".join(str(text).replace("`", "'").replace("|", "¦").split())


def model_index(name: str, metrics: Mapping[str, float | None], dataset: str) -> list[dict[str, Any]] | None:
    """The metrics as the Hub's `model-index`; None where nothing was measured."""
    if not metrics:
        return None
    measured = [
        {"type": metric, "name": metric.replace("_", " "), "value": float(f"{value:.6g}")}
        for metric, value in metrics.items()
        if value is not None
    ]
    data = {"type": "imagefolder", "name": dataset}
    task = {"type": "text-to-image", "name": "Text to image"}
    return [{"name": name, "results": [{"task": task, "dataset": data, "metrics": measured}]}]


def loss_by_fifths(losses: Sequence[float]) -> list[tuple[str, float]]:
    """The training loss in five lines: steps and their mean loss; fewer where there were fewer steps."""
    count = min(5, len(losses))
    edges = [i * len(losses) // count for i in range(count + 1)] if count else []
    return [
        (f"{start + 1}–{end}" if end - start > 1 else f"{end}", sum(losses[start:end]) / (end - start))
        for start, end in pairwise(edges)
    ]
