"""A project of one's own, made from a folder of pictures outside the repository, and run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from PIL import Image
from project import REPOSITORY, Project

from pipeline.config import load_params
from pipeline.errors import UserError
from pipeline.init_project import init_project, propose


def pictures(folder: Path, sides: list[tuple[int, int]]) -> Path:
    folder.mkdir(parents=True)
    for i, size in enumerate(sides):
        Image.effect_noise(size, 90).convert("RGB").save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a picture {i}")
    return folder


def test_what_is_proposed_suits_the_pictures(tmp_path: Path) -> None:
    large = {p.key: p for p in propose(pictures(tmp_path / "a", [(900, 700)] * 20), 512, 4)}
    assert large["dataset.resolution"].value == 512 and large["train.steps"].value == 500
    assert "dataset.max_rejected" not in large and "100 times each" in large["train.steps"].reason
    small = {p.key: p.value for p in propose(pictures(tmp_path / "b", [(450, 400)] * 19 + [(90, 900)]), 512, 4)}
    assert small == {"dataset.resolution": 384, "train.steps": 500, "dataset.max_rejected": 1}
    (tmp_path / "none").mkdir()
    assert propose(tmp_path / "none", 512, 4) == []


def test_nothing_is_overwritten_and_mistakes_are_said(tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", [(64, 64)])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for folder, preset, where, said in (
        ("full", "sd15", images, "is not empty"),
        ("new", "sd9", images, "there are sd15, sdxl, sd3, demo"),
        ("new", "sd15", tmp_path / "nowhere", "no such folder"),
        ("images/inside", "sd15", images, "lies inside the pictures"),
    ):
        with pytest.raises(UserError, match=said):
            init_project(REPOSITORY, tmp_path / folder, where, preset, "")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"] and not (tmp_path / "new").exists()


@pytest.mark.parametrize("preset", ["sd15", "sdxl"])
def test_presets_make_valid_projects(tmp_path: Path, preset: str) -> None:
    images = pictures(tmp_path / "images", [(600, 600)] * 3)
    init_project(REPOSITORY, tmp_path / "my style", images, preset, "zyx")
    params = load_params(tmp_path / "my style" / "params.yaml")
    assert params.export.name == "my-style" and params.dataset.trigger == "zyx" and params.dataset.path == "data"
    assert params.dataset.resolution == {"sd15": 512, "sdxl": 576}[preset]
    assert (tmp_path / "my style" / "data.dvc").is_file() and (tmp_path / "my style" / ".git").is_dir()
    assert "# inner dimension" in (tmp_path / "my style" / "params.yaml").read_text()


@pytest.mark.slow
def test_a_project_on_the_embedded_base_runs_and_reruns(tmp_path: Path) -> None:
    images = tiny.make_pictures(tmp_path / "images", count=12, size=(80, 64))
    command = [sys.executable, "cli.py", "init", str(tmp_path / "mine"), "--images", str(images), "--preset", "demo"]
    done = subprocess.run([*command, "--trigger", "zyx"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "dataset.resolution: 64" in done.stdout, done.stdout + done.stderr
    project = Project(tmp_path / "mine")
    few = ["--set", "train.steps=12", "--set", "train.warmup_steps=2", "--set", "validate.inference_steps=4"]
    done = project.cli("run", *few)
    assert done.returncode == 0 and len(project.executed()) == 5, done.stdout + done.stderr
    assert project.path("dist/adapter/mine.safetensors").is_file() and project.path("reports/index.html").is_file()
    status = project.cli("status")
    assert status.returncode == 0 and status.stdout.count("up to date") == 5, status.stdout
    assert project.cli("run", "--set", "export.title=Mine").returncode == 0 and project.executed() == ["export-and-card"]
    tracked = subprocess.run(
        ["git", "status", "--porcelain"], cwd=project.root, capture_output=True, text=True, check=True
    ).stdout
    assert not any(name in tracked for name in ("build/", "reports/", "dist/", ".work", "mlruns"))
