"""Where everything lies."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Workspace:
    """The folders of a project.

    `root` holds `dvc.yaml` and the tracked outs. `home` is the original repository: the same folder, except under
    `dvc exp run --temp` and `--queue`, where `root` is a throw-away copy and `home` keeps checkpoints and caches.
    """

    root: Path
    home: Path

    @classmethod
    def here(cls) -> Workspace:
        """The project of the current folder; `DVC_ROOT`, which DVC sets for its stages, names the home."""
        root = Path.cwd()
        return cls(root=root, home=Path(os.environ.get("DVC_ROOT", root)))

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    @property
    def dvc_yaml(self) -> Path:
        return self.root / "dvc.yaml"

    @property
    def dvc_lock(self) -> Path:
        return self.root / "dvc.lock"

    def recorded(self) -> dict[str, Any]:
        """The stages as `dvc.lock` states them; none where nothing has run."""
        text = self.dvc_lock.read_text(encoding="utf-8") if self.dvc_lock.is_file() else ""
        return _stages_of(text)

    @property
    def work(self) -> Path:
        """Checkpoints, caches and journals: untracked, safe to delete at the price of doing the work again."""
        return self.home / ".work"

    @property
    def store(self) -> Path:
        """The content store of encodings, shared by all settings."""
        return self.work / "store"

    @property
    def captions(self) -> Path:
        """Captions that a model wrote, by the picture's content."""
        return self.work / "captions"

    @property
    def dataset_files(self) -> Path:
        """The dataset's files as prepare-dataset saw them, a record by the hash of the manifest that came of them; `status`
        compares."""
        return self.work / "dataset-files"

    @property
    def journal(self) -> Path:
        """One line per stage execution: what ran, when, how it ended."""
        return self.work / "journal.jsonl"

    @property
    def pace(self) -> Path:
        """How fast the last training here was; `check` estimates by it."""
        return self.work / "pace.json"

    @property
    def mlruns(self) -> Path:
        """The default MLflow store: a sqlite database with the artifacts beside it."""
        return self.home / "mlruns"


PREVIEWS = "previews"  # in a training's work directory: pictures of the adapter in the making, a grid a step

# The tracked outs, relative to the root; dvc.yaml declares the same.
DATASET = Path("build/dataset")
UNPACKED = DATASET / "images"  # pictures out of archives
DATASET_REPORT = Path("reports/dataset")
ENCODED = Path("build/encoded")
ADAPTER = Path("build/adapter")
TRAIN_REPORT = Path("reports/train")
VALIDATE_REPORT = Path("reports/validate")
DIST = Path("dist/adapter")


@lru_cache(maxsize=1)
def _stages_of(lock: str) -> dict[str, Any]:
    """Kept, since a run without work reads the same text before and after."""
    from ruamel.yaml import YAML  # `status` starts DVC before it is imported

    stages: dict[str, Any] = (YAML(typ="safe").load(lock) or {}).get("stages", {})
    return stages
