"""`code.json` and `dvc.yaml` of a project that uses the installed reprolora: made, and made anew when another one is installed."""

from __future__ import annotations

import hashlib
import io
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.errors import UserError
from pipeline.files import write_json, write_text
from pipeline.shipped import shipped
from pipeline.sources import CODE_JSON, code_key, installed_code, is_source, stated_code

REQUIREMENTS = "requirements.txt"
_HEAD = f"""\
# The pipeline: its table of contents. `reprolora run` and a bare `dvc repro` do the same.
# {CODE_JSON} states each stage's code by its hash; `reprolora run` writes it anew when another reprolora is installed.
"""
_SETTLING = ("deps", "params", "outs", "metrics", "plots")


def write_record(root: Path) -> None:
    """Write both files for the reprolora that is installed."""
    write_text(root / "dvc.yaml", _pipeline())
    write_json(root / CODE_JSON, _record())


def renew(root: Path) -> list[str]:
    """Bring both files in step with the installed reprolora; a project with code of its own is left alone.

    Returns:
        What changed, a line each.

    Raises:
        UserError: `dvc.yaml` was edited, and the installed reprolora needs it otherwise.
    """
    path = root / "dvc.yaml"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not (root / CODE_JSON).is_file() and CODE_JSON not in text:
        return []
    old, new = stated_code(root), _record()
    told = []
    if text != _pipeline() and (not text or _hash(text) == old.get("dvc.yaml")):
        write_text(path, _pipeline())
        told.append(f"dvc.yaml: the stages as reprolora {new['version']} declares them")
    elif different := _differing(text):
        raise UserError(
            f"dvc.yaml was edited here, and reprolora {new['version']} declares {', '.join(different)} otherwise: remove the file, run "
            "again, which makes it anew, and put your own lines back (`git diff dvc.yaml` shows them)"
        )
    if old != new:
        write_json(root / CODE_JSON, new)
        told.append(f"{CODE_JSON}: {_news(old, new)}")
        told += _require(root, new["version"])
    return told


def told_of_code(root: Path) -> str:
    """For `check`: whether the next run will bring `code.json` up to date."""
    if not (root / CODE_JSON).is_file():
        return "the project's own"
    old, new = stated_code(root), _record()
    return (
        f"reprolora {new['version']}, as {CODE_JSON} states"
        if old == new
        else f"{_news(old, new)}: `run` writes {CODE_JSON} anew"
    )


def _record() -> dict[str, Any]:
    return {"version": version("reprolora"), "dvc.yaml": _hash(_pipeline()), "stages": installed_code()}


def _pipeline() -> str:
    """The shipped `dvc.yaml` with the installed command, and code.json's hashes instead of the source files."""
    document = YAML(typ="safe").load(shipped("dvc.yaml").read_text(encoding="utf-8"))
    for name, entry in document["stages"].items():
        entry["cmd"] = f"reprolora stage {name}"
        entry["deps"] = [dep for dep in entry["deps"] if not is_source(dep)]
        entry["params"].append({CODE_JSON: [code_key(name)]})
    yaml, made = YAML(), io.StringIO()
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 10_000
    yaml.dump(document, made)
    return _HEAD + made.getvalue()


def _differing(text: str) -> list[str]:
    """Stages that do not declare what the installed reprolora declares of them; more is allowed, and other stages are."""
    ours, theirs = (YAML(typ="safe").load(t) or {} for t in (_pipeline(), text))
    found = []
    for name, entry in ours["stages"].items():
        there = (theirs.get("stages") or {}).get(name) or {}
        lacks = any(item not in there.get(kind, []) for kind in _SETTLING for item in entry.get(kind, []))
        if lacks or there.get("cmd") != entry["cmd"]:
            found.append(name)
    return found


def _news(old: dict[str, Any], new: dict[str, Any]) -> str:
    stated = old.get("stages", {})
    other = [name for name, code in new["stages"].items() if stated.get(name) != code]
    versions = [old.get("version"), new["version"]]
    which = f"reprolora {versions[0]} → {versions[1]}" if versions[0] != versions[1] else f"reprolora {versions[1]}"
    return f"{which} is installed, " + (
        f"with other code for {', '.join(other)}" if other else "with the same code for every stage"
    )


def _require(root: Path, installed: str) -> list[str]:
    """Let `requirements.txt` ask for the version that `code.json` now states, where it asks for one."""
    path = root / REQUIREMENTS
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    changed = re.sub(r"(?m)^(reprolora(?:\[[^\]]*\])?==)\S+", rf"\g<1>{installed}", text)
    if changed == text:
        return []
    write_text(path, changed)
    return [f"{REQUIREMENTS}: reprolora=={installed}"]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
