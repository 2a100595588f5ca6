"""What is encoded again, counted through real DVC runs; several processes; a clean clone that seeds itself."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from project import Project, make_project

from pipeline.files import hash_tree

pytestmark = pytest.mark.slow
ENCODE = "precompute-latents-and-embeddings"


def encoded(project: Project) -> tuple[int, int]:
    """Run up to the encodings; returns (pictures, captions) really encoded."""
    done = project.cli("run", ENCODE)
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.search(r"encoded (\d+) pictures and (\d+) captions", done.stdout)
    return (int(told[1]), int(told[2])) if told else (0, 0)


def each_edit_costs_what_it_must(project: Project, pictures: int) -> None:
    """Of a project whose `pictures` pictures are all encoded."""
    project.path("data/002.txt").write_text("another caption")
    assert encoded(project) == (0, 1)
    Image.new("RGB", (32, 32), (1, 99, 199)).save(project.path("data/003.png"))
    assert encoded(project) == (1, 0)
    for ending in (".png", ".txt"):
        shutil.move(project.path(f"data/004{ending}"), project.path(f"data/zzz{ending}"))
    assert encoded(project) == (0, 0)
    project.set("dataset", resolution=24)
    assert encoded(project) == (pictures, 0)
    project.set("dataset", resolution=32)
    assert encoded(project) == (0, 0)
    config = project.path("base/vae/config.json")
    config.write_text(config.read_text().replace('"scaling_factor": 0.5', '"scaling_factor": 0.25'))
    assert project.cli("pin").returncode == 0
    assert encoded(project) == (pictures, 0)


def test_each_edit_costs_what_it_must(project: Project) -> None:
    assert encoded(project) == (10, 11)
    each_edit_costs_what_it_must(project, 10)


def test_a_clean_clone_seeds_itself_from_the_remote(
    new_project: Callable[[], Project], tmp_path: Path, sd_folder: Path, clip_folder: Path, pictures_folder: Path
) -> None:
    """A remote folder, the lock file and the pictures are all that a fresh runner has."""
    first = new_project()
    assert encoded(first) == (10, 11)
    assert first.dvc("remote", "add", "--default", "shared", str(tmp_path / "remote")).returncode == 0
    assert first.dvc("push").returncode == 0
    clone = make_project(tmp_path / "clone", sd_folder, clip_folder, pictures_folder)
    shutil.copy(first.root / "dvc.lock", clone.root / "dvc.lock")
    shutil.copy(first.root / ".dvc" / "config", clone.root / ".dvc" / "config")
    Image.new("RGB", (32, 32), (3, 1, 4)).save(clone.path("data/new.png"))
    clone.path("data/new.txt").write_text("a new picture")
    assert not (clone.root / ".work").exists() and not (clone.root / ".dvc" / "cache").exists()
    done = clone.cli("run", ENCODE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "21 encodings taken over from the last recorded run" in done.stdout
    assert "encoded 1 pictures and 1 captions" in done.stdout
    each_edit_costs_what_it_must(clone, 11)


def test_a_remote_of_a_kind_that_is_not_installed_keeps_nobody_from_encoding(
    new_project: Callable[[], Project], tmp_path: Path, sd_folder: Path, clip_folder: Path, pictures_folder: Path
) -> None:
    first = new_project()
    assert encoded(first) == (10, 11)
    clone = make_project(tmp_path / "clone", sd_folder, clip_folder, pictures_folder)
    shutil.copy(first.root / "dvc.lock", clone.root / "dvc.lock")
    assert clone.dvc("remote", "add", "--default", "far", "ssh://nowhere.invalid/store").returncode == 0
    done = clone.cli("run", ENCODE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "encoded 10 pictures and 11 captions" in done.stdout


def test_two_processes_give_the_bytes_of_one(new_project: Callable[[], Project]) -> None:
    one, two = new_project(), new_project()
    two.set("runtime", processes=2)
    for project in (one, two):
        project.set("encode", flip=True)
        assert encoded(project) == (20, 11)
    assert hash_tree(one.path("build/encoded")) == hash_tree(two.path("build/encoded"))
    segments = list(two.path(".work/store").glob("*.safetensors"))
    assert len(segments) >= 3  # both took part


def test_a_fault_in_one_of_two_processes_is_named_and_stops_both(project: Project) -> None:
    project.set("runtime", processes=2)
    assert project.cli("run", "prepare-dataset").returncode == 0
    shutil.copy(project.path("data/001.png"), project.path("data/002.png"))
    done = project.cli("stage", ENCODE)
    assert done.returncode == 2
    assert "002.png changed since prepare-dataset read it" in done.stdout + done.stderr


def test_packed_pictures_are_unpacked_once_and_trained_on(project: Project, tmp_path: Path) -> None:
    """A WebDataset shard goes through all the way to the encodings."""
    shard = tmp_path / "shard-000.tar"
    subprocess.run(
        ["tar", "cf", str(shard), *sorted(p.name for p in project.path("data").iterdir())], cwd=project.path("data"), check=True
    )
    shutil.rmtree(project.path("data"))
    project.path("data").mkdir()
    shutil.copy(shard, project.path("data") / shard.name)
    assert encoded(project) == (10, 11)
    assert len(list(project.path("build/dataset/images").iterdir())) == 10
