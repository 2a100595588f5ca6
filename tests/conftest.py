from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import pytest
import tiny
import torch
from project import Project, make_project

torch.set_num_threads(1)  # tiny models: threads cost more than they bring


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_sd(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_sd3(tmp_path_factory.mktemp("models") / "sd3")


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="session")
def pictures_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_pictures(tmp_path_factory.mktemp("pictures") / "data")


@pytest.fixture
def new_project(tmp_path: Path, sd_folder: Path, clip_folder: Path, pictures_folder: Path) -> Callable[[], Project]:
    """Makes fresh projects, numbered."""
    made = []

    def make() -> Project:
        made.append(None)
        return make_project(tmp_path / f"project{len(made)}", sd_folder, clip_folder, pictures_folder)

    return make


@pytest.fixture
def project(new_project: Callable[[], Project]) -> Project:
    return new_project()
