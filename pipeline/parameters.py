"""`docs/parameters.md`: every key of `params.yaml` with its type, default and meaning, out of the JSON schema and `dvc.yaml`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.schema import schema

_HEAD = """\
# Parameters

Written by `reprolora schema --markdown`; do not edit. Every key of `params.yaml`, the keys that hold tables of their own after it.
*required*: the file must state it. A key that is left out has the default that stands here, which need not be what the presets set.
What a change reruns ends where a stage's results come out byte-identical ([stages.md](stages.md)). `params.schema.json` says the same to
editors, which complete and check by it.
"""


def parameters_page(shipped: Path, pipeline: Path) -> str:
    """The page.

    Args:
        shipped: the `params.yaml` that has a comment at every key.
        pipeline: `dvc.yaml`, which says what each section reruns.
    """
    made = schema(shipped.read_text(encoding="utf-8"))
    stages = YAML(typ="safe").load(pipeline.read_text(encoding="utf-8"))["stages"]
    parts = [_HEAD]
    for section, entry in made["properties"].items():
        parts += [f"\n## {section}\n\n{_reruns(section, stages)}\n\n", *_tables(section, entry, made["$defs"])]
    return "".join(parts)


def _reruns(section: str, stages: dict[str, Any]) -> str:
    """The pipeline is a chain: the first stage that reads a section, and all after it."""
    names = list(stages)
    first = next((i for i, name in enumerate(names) if section in stages[name].get("params", [])), None)
    if first is None:
        return "A change reruns nothing."
    return f"A change reruns {'all five stages' if first == 0 else ', '.join(f'`{name}`' for name in names[first:])}."


def _tables(name: str, entry: dict[str, Any], models: dict[str, Any]) -> list[str]:
    """The table of one section, then those of the models in it."""
    if "additionalProperties" in entry and "propertyNames" in entry:
        metrics = "Keys are metrics ([metrics.md](metrics.md)); each holds one or more of these:\n\n"
        return [metrics, *_tables(f"{name}.METRIC", entry["additionalProperties"], models)]
    model = models[entry["$ref"].rpartition("/")[2]]
    rows, nested = ["| key | type and values | default | meaning |\n|---|---|---|---|\n"], []
    for key, field in model["properties"].items():
        default = _code(field["default"]) if "default" in field else "*required*"
        if inner := _model_in(field):
            nested += [f"\n`{name}.{key}`, {_title(models[inner])}:\n\n", *_tables(f"{name}.{key}", {"$ref": inner}, models)]
            default = "`{}`" if isinstance(field.get("default"), dict) else default
        cells = (f"`{name}.{key}`", _kind(field, models), default, field.get("description", ""))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return rows + nested


def _model_in(field: dict[str, Any]) -> str | None:
    """The name of the model that a field holds, by itself, in a list, or beside null."""
    for part in (field, field.get("items", {}), *field.get("anyOf", [])):
        if "$ref" in part:
            return str(part["$ref"].rpartition("/")[2])
    return None


def _title(model: dict[str, Any]) -> str:
    return str(model["description"]).partition(": ")[2].rstrip(".")


def _kind(field: dict[str, Any], models: dict[str, Any]) -> str:
    """What a value may be, in words."""
    if "anyOf" in field:
        return " or ".join(_kind(part, models) for part in field["anyOf"])
    if "enum" in field:
        return ", ".join(_code(value) for value in field["enum"])
    if "$ref" in field:
        return "table"
    kind = field["type"]
    if kind == "array":
        if "prefixItems" in field:
            return f"list of {len(field['prefixItems'])}: {'; '.join(_kind(part, models) for part in field['prefixItems'])}"
        return f"{'non-empty ' if field.get('minItems') else ''}list of {_kind(field['items'], models)}"
    if kind == "object":
        return f"table of {_kind(field['additionalProperties'], models)}"
    if kind == "string":
        pattern = f" that matches `{field['pattern']}`" if "pattern" in field else ""
        return f"{'non-empty ' if field.get('minLength') else ''}text{pattern}"
    return {"boolean": "true or false", "null": "`null`"}.get(kind) or f"{kind}{_bounds(field)}"


def _bounds(field: dict[str, Any]) -> str:
    told = [
        f"{sign} {field[key]:,}".replace(",", " ")
        for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if key in field and abs(field[key]) < 2**62
    ]
    told += [f"multiple of {field['multipleOf']}"] if "multipleOf" in field else []
    return f" {', '.join(told)}" if told else ""


def _code(value: Any) -> str:
    """As YAML has it; quotes only where a reader could take the text for something else."""
    plain = isinstance(value, str) and re.fullmatch(r"[a-z.][\w.+-]*", value)
    return f"`{value if plain else json.dumps(value, ensure_ascii=False)}`"
