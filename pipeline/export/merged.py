"""The base with an adapter merged in, as a folder in diffusers' layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.export.peft_format import strip, tuner_layers
from pipeline.files import files_under, write_json


def write_merged(folder: Path, pipeline: Any, components: Sequence[str]) -> None:
    """Add every layer's change to the base's weights for good, and save the pipeline.

    The folder holds no trace of where the base lay, so that the same inputs give the same bytes everywhere.
    """
    for component in components:
        module = getattr(pipeline, component)
        for wrapped in tuner_layers(module).values():
            wrapped.merge()  # type: ignore[operator]
        strip(module)
    pipeline.save_pretrained(folder, safe_serialization=True)
    for path in files_under(folder):
        if path.suffix == ".json" and path.name in ("config.json", "model_index.json"):
            config = json.loads(path.read_text(encoding="utf-8"))
            if config.pop("_name_or_path", None) is not None:
                write_json(path, config)
