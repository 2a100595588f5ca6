from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import hub as stand_in
import pytest
import tiny
import torch
from encoded import encode_folder
from project import Project, make_project

from pipeline.encodings import Encodings

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


@pytest.fixture(scope="session")
def encodings(tmp_path_factory: pytest.TempPathFactory, pictures_folder: Path, sd_folder: Path) -> Encodings:
    """The pictures as the tiny base encodes them, three tenths of them held out."""
    out = tmp_path_factory.mktemp("encoded")
    return encode_folder(pictures_folder, sd_folder, out / "store", out / "out", held_out_fraction=0.3)[0]


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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[stand_in.Hub]:
    """The stand-in, as the Hub that the client asks."""
    import huggingface_hub.constants as constants

    with stand_in.serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}", raising=True
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub
