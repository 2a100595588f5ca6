"""The JSON schema of params.yaml: in step with the models, and true."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from ruamel.yaml import YAML

from pipeline.parameters import parameters_page
from pipeline.schema import schema, schema_text

ROOT = Path(__file__).parent.parent


def test_the_committed_schema_is_the_models() -> None:
    told = "python cli.py schema > params.schema.json"
    assert (ROOT / "params.schema.json").read_text() == schema_text(ROOT / "params.yaml"), told


@pytest.mark.parametrize("path", ["params.yaml", *(f"presets/{p.name}" for p in sorted((ROOT / "presets").glob("*.yaml")))])
def test_shipped_files_are_valid_and_name_the_schema(path: str) -> None:
    text = (ROOT / path).read_text()
    assert text.startswith("# yaml-language-server: $schema=params.schema.json\n")
    jsonschema.validate(YAML(typ="safe").load(text), json.loads((ROOT / "params.schema.json").read_text()))


def test_wrong_keys_and_values_are_not_valid() -> None:
    made = schema((ROOT / "params.yaml").read_text())
    good = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    for section, change in (
        ("train", {"stepz": 1}),
        ("train", {"steps": "many"}),
        ("gate", {"no_metric": {"max": 1}}),
        ("lora", {"rank": 0}),
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**good, section: {**good[section], **change}}, made)


def test_every_key_has_a_description() -> None:
    made = schema((ROOT / "params.yaml").read_text())
    for name, reference in made["properties"].items():
        if name == "gate":
            continue
        for key, entry in made["$defs"][reference["$ref"].rpartition("/")[2]]["properties"].items():
            assert entry.get("description"), f"{name}.{key}"
    for model in made["$defs"].values():
        assert all(entry.get("description") for entry in model["properties"].values()), model["title"]


def test_the_page_of_parameters_is_the_models() -> None:
    page, told = (ROOT / "docs/parameters.md").read_text(), "python cli.py schema --markdown > docs/parameters.md"
    assert page == parameters_page(ROOT / "params.yaml", ROOT / "dvc.yaml"), told
    made = schema((ROOT / "params.yaml").read_text())
    for name, reference in made["properties"].items():
        for key in made["$defs"][reference["$ref"].rpartition("/")[2]]["properties"] if name != "gate" else ():
            assert page.count(f"| `{name}.{key}` |") == 1
    assert "| `encode.clip_skip` | integer ≥ 0, ≤ 11 | `0` |" in page
    assert (
        "A change reruns `validate`, `export-and-card`.\n\n| key | type and values | default | meaning |\n|---|---|---|---|\n| `validate."
        in page
    )
