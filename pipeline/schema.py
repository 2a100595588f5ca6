"""A JSON schema of `params.yaml`, for completion and checks in editors; the comments of the shipped file are its descriptions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pipeline.config import Params
from pipeline.metrics import NAMES


def schema(shipped: str) -> dict[str, Any]:
    """The schema.

    Args:
        shipped: text of the `params.yaml` that has a comment at every key.
    """
    made = Params.model_json_schema(by_alias=True)
    described = _comments(shipped)
    for section, reference in made["properties"].items():
        definition = made["$defs"].get(str(reference.get("$ref", "")).rpartition("/")[2])
        for key, entry in (definition or {}).get("properties", {}).items():
            if text := described.get((section, key)):
                entry["description"] = text
    made["properties"]["gate"]["propertyNames"] = {"enum": list(NAMES)}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "params.yaml of reprolora", **made}


def schema_text(shipped: Path) -> str:
    """As it is committed: the same bytes for the same settings."""
    return json.dumps(schema(shipped.read_text(encoding="utf-8")), indent=2, ensure_ascii=False) + "\n"


def _comments(text: str) -> dict[tuple[str, str], str]:
    """The comment at the end of each key's line, or on the lines around it."""
    found, section, above, last = {}, "", "", ""
    for line in text.splitlines():
        if match := re.match(r"^([a-z_]+):", line):
            section = match[1]
        elif match := re.match(r"^  ([a-z0-9_]+):(?:.*?\s# (.*))?$", line) or re.match(r"^  ([a-z0-9_]+):()", line):
            last = match[1]
            if match[2] or above:
                found[section, last] = match[2] or above
        elif (match := re.match(r"^    # (.*)$", line)) and (section, last) not in found:
            found[section, last] = match[1]
        above = f"{above} {line[4:]}".strip() if line.startswith("  # ") else ""
    return found
