"""Results shared through a DVC remote: a clean clone runs nothing, and what finished before a failure is not lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from project import Project, commit, git

pytestmark = pytest.mark.slow


@pytest.fixture
def shared(new_project: Callable[[], Project], tmp_path: Path) -> Project:
    """A project whose pictures DVC tracks, with a folder for a remote."""
    project = new_project()
    assert project.dvc("add", "data").returncode == 0
    assert project.dvc("remote", "add", "--default", "shared", str(tmp_path / "remote")).returncode == 0
    return project


def clone(project: Project, tmp_path: Path) -> Project:
    commit(project.root)
    git(tmp_path, "clone", "-q", str(project.root), "clone")
    return Project(tmp_path / "clone")


def gets_everything(other: Project, project: Project) -> None:
    """A clone that runs nothing, and has what the project has."""
    done = other.cli("run", "--pull")
    assert done.returncode == 0, done.stdout + done.stderr
    assert other.executed() == []
    for name in ("build/adapter/adapter.safetensors", "dist/adapter/README.md", "data/000.png"):
        assert other.path(name).read_bytes() == project.path(name).read_bytes()


def test_a_clean_clone_gets_everything_and_runs_nothing(shared: Project, tmp_path: Path) -> None:
    done = shared.cli("run", "--push")
    assert done.returncode == 0 and "to the remote" in done.stdout, done.stdout + done.stderr
    other = clone(shared, tmp_path)
    assert not other.path("data/000.png").exists() and not other.path("build").exists()
    gets_everything(other, shared)
    other.set("validate", prompts=["a blue circle"])
    assert other.cli("run", "--pull", "--push").returncode == 0
    assert other.executed() == ["validate", "export-and-card"]
    shared.executed()
    shared.set("validate", prompts=["a blue circle"])
    done = shared.cli("run", "--pull")
    assert done.returncode == 0 and shared.executed() == []  # the run cache: a setting that somebody else has run


def test_what_finished_before_a_failure_is_pushed_and_local_files_stay(shared: Project, tmp_path: Path) -> None:
    shared.set("lora", targets=["no_such_layer"])
    done = shared.cli("run", "--push")
    assert done.returncode == 2 and "no_such_layer" in done.stdout + done.stderr and "to the remote" in done.stdout
    other = clone(shared, tmp_path)
    other.set("lora", targets=["to_q"])
    other.path("data").mkdir()
    shutil.copy(shared.path("data/001.png"), other.path("data/mine.png"))
    other.path("data/mine.txt").write_text("mine, and nowhere else")
    assert other.cli("run", "--pull").returncode == 0
    assert other.path("data/mine.txt").read_text() == "mine, and nowhere else"
    git(other.root, "checkout", "data.dvc")
    shutil.rmtree(other.path("data"))
    other.executed()
    done = other.cli("run", "--pull")
    assert done.returncode == 0, done.stdout + done.stderr
    assert other.executed() == ["train-lora", "validate", "export-and-card"]


def test_strict_refuses_what_is_not_pinned_and_no_remote_is_said(project: Project) -> None:
    done = project.cli("run", "--strict")
    assert done.returncode == 2 and "is not pinned" in done.stdout + done.stderr
    done = project.cli("run", "--pull")
    assert done.returncode == 2 and "dvc remote add --default" in done.stderr
