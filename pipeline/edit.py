"""Changing `params.yaml` for the user: comments and layout stay, and a value that is not allowed changes nothing."""

from __future__ import annotations

import io
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from pipeline.config import check_params, load_yaml
from pipeline.errors import UserError
from pipeline.files import write_text
from pipeline.stage import value_changes
from pipeline.workspace import Workspace


def set_values(workspace: Workspace, assignments: list[str]) -> list[str]:
    """Apply `section.key=value` assignments, the values read as YAML, to `params.yaml`; all or none.

    Returns:
        One line per value that really changed.

    Raises:
        UserError: an assignment cannot be read, or the result is not valid.
    """
    if not assignments:
        return []
    document, changes = _edited(workspace, assignments)
    if changes:
        write_text(workspace.params, dumped(document))
    return changes


def dumped(document: CommentedMap) -> str:
    """The document as text, its comments kept."""
    text = io.StringIO()
    yaml = YAML(typ="rt")
    yaml.width = 10_000
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(type(None), _as_null)
    yaml.dump(document, text)
    return text.getvalue()


def assign(document: CommentedMap, key: str, value: Any) -> None:
    """Set `section.key` in a document, in place."""
    _assign(document, key.split("."), value)


def preview_values(workspace: Workspace, assignments: list[str]) -> list[str]:
    """What `set_values` would change; nothing is written."""
    return _edited(workspace, assignments)[1]


def _edited(workspace: Workspace, assignments: list[str]) -> tuple[CommentedMap, list[str]]:
    document = load_yaml(workspace.params)
    before = check_params(document).model_dump(mode="json", by_alias=True)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or "." not in key:
            raise UserError(f"--set {assignment}: expected section.key=value, as in --set train.steps=500")
        try:
            value = _lines_of(workspace, text[1:]) if text.startswith("@") else YAML(typ="rt").load(text) if text else ""
        except YAMLError as error:
            raise UserError(f"--set {assignment}: {text!r} is not a YAML value: {str(error).splitlines()[0]}") from None
        _assign(document, key.split("."), value)
    after = check_params(document, where="--set").model_dump(mode="json", by_alias=True)
    return document, value_changes(before, after)


def _lines_of(workspace: Workspace, name: str) -> list[str]:
    """The lines of a file as a list, as in `--set validate.prompts=@prompts.txt`: what is used stands in `params.yaml`, where DVC
    sees it change."""
    path = workspace.root / name
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--set …=@{name}: the file cannot be read: {error}") from None


def _as_null(representer: Any, _: None) -> Any:
    """`null`, where ruamel would leave the place empty."""
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")


def _assign(document: CommentedMap, parts: list[str], value: Any) -> None:
    node: Any = document
    for part in parts[:-1]:
        if not isinstance(node.get(part), CommentedMap):
            node[part] = CommentedMap()
        node = node[part]
    node[parts[-1]] = value
