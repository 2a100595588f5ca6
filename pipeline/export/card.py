"""The model card: every fact in it is handed in by what really ran."""

from __future__ import annotations

import io
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
    environment.filters["md"] = escape_markdown
    return environment.get_template("card.md.jinja").render(header=text.getvalue().strip(), **facts)


def escape_markdown(text: object) -> str:
    """Text from outside (captions, prompts, names) made inert in Markdown, HTML and tables."""
    safe = str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for mark in "\\`*_[]|#~":
        safe = safe.replace(mark, "\\" + mark)
    return " ".join(safe.split())
