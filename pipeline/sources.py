"""The code of each stage as it is installed, for projects that have none of their own: which files, and their hash.

Such a project's `code.json` states the hashes, and `dvc.yaml` names each stage's own as a parameter: DVC sees when it changes, and
only there. The files are those that the shipped `dvc.yaml` lists.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, get_args

from ruamel.yaml import YAML

from pipeline.config import Model
from pipeline.errors import UserError
from pipeline.files import hash_file, hash_json
from pipeline.shipped import CODE, shipped

CODE_JSON = "code.json"
FAMILY = "${model.family}"
FAMILIES: tuple[str, ...] = get_args(Model.model_fields["family"].annotation)


def is_source(dep: str) -> bool:
    """Whether a dependency is code of ours."""
    return dep.startswith(("pipeline/", "stages/"))


def source_files(stage: str, family: str) -> dict[str, Path]:
    """A stage's source files by their names in `dvc.yaml`."""
    deps = _shipped_stages()[stage]["deps"]
    return {name: CODE / name for name in (dep.replace(FAMILY, family) for dep in deps) if is_source(name)}


def code_key(stage: str) -> str:
    """Where `code.json` states a stage's code, as `dvc.yaml` writes it: by family where its file is one of the sources, so that the
    choice of a family changes what is compared, and not the file."""
    return f"stages.{stage}" + (f".{FAMILY}" if any(FAMILY in dep for dep in _shipped_stages()[stage]["deps"]) else "")


def installed_code() -> dict[str, Any]:
    """`stages` of `code.json` as the code is now: a hash, or one by family."""
    stages = _shipped_stages()
    return {
        name: {family: hash_of(f"stages.{name}.{family}") for family in FAMILIES}
        if FAMILY in code_key(name)
        else hash_of(code_key(name))
        for name in stages
    }


def hash_of(key: str) -> str:
    """sha256 over the source files that a key of `code.json` stands for: names and bytes."""
    _, stage, *family = key.split(".")
    return hash_json({name: hash_file(path) for name, path in source_files(stage, family[0] if family else "").items()})


def stated_code(root: Path) -> dict[str, Any]:
    """The project's `code.json`; empty where it is missing or damaged."""
    try:
        stated = json.loads((root / CODE_JSON).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stated if isinstance(stated, dict) else {}


def confirmed(root: Path, key: str) -> str:
    """The hash of a stage's code, where `code.json` states the same: DVC records what stands there.

    Raises:
        UserError: it states another.
    """
    stated: Any = stated_code(root)
    for part in key.split("."):
        stated = stated.get(part) if isinstance(stated, dict) else None
    now = hash_of(key)
    if stated != now:
        raise UserError(
            f"{CODE_JSON} states {str(stated)[:12] if stated else 'nothing'} as {key}, and the installed reprolora has {now[:12]}: "
            "`reprolora run` brings it up to date and runs what that affects"
        )
    return now


@cache
def _shipped_stages() -> dict[str, Any]:
    stages: dict[str, Any] = YAML(typ="safe").load(shipped("dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return stages
