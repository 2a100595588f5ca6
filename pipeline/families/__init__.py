"""Model families by name. Adding one: a file here, a line below, a preset, a row in tests/test_families.py."""

from __future__ import annotations

from importlib import import_module

from pipeline.families.base import Family

_FILES = {"sd": "pipeline.families.sd", "sdxl": "pipeline.families.sdxl", "sd3": "pipeline.families.sd3"}


def family(name: str) -> Family:
    """The family that `model.family` names; imported only when asked for."""
    found: Family = import_module(_FILES[name]).FAMILY
    return found
