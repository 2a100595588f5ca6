"""The wheel in an environment of its own, and a project of one's own outside of the repository: run, changed, updated, retrained."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest
from project import REPOSITORY, Project
from ruamel.yaml import YAML

pytestmark = pytest.mark.slow
_NOT_SOURCES = (
    ".git",
    ".venv*",
    ".work",
    "build",
    "dist",
    "reports",
    "mlruns",
    "cache",
    "tmp",
    "__pycache__",
    "*.egg-info",
    "tests",
)
FEW = (
    *("train.steps=6", "train.warmup_steps=1", "validate.inference_steps=2", "validate.prompts=[a zyx star]"),
    *("validate.untriggered_prompts=[]", "validate.loss_timesteps=2", "tracking.enabled=false"),
)


@dataclass(frozen=True)
class Installed:
    """An environment that holds the wheel, and the tests' own environment's packages behind it."""

    environment: Path

    @property
    def packages(self) -> Path:
        return next(self.environment.glob("lib/python*/site-packages"))

    def run(self, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
        """A command by name, as in the activated environment; none of the repository's is on the path."""
        path = f"{self.environment / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin"
        environment = {**Project(folder).environment({}), "PATH": path, "VIRTUAL_ENV": str(self.environment)}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(REPOSITORY, folder / "source", ignore=shutil.ignore_patterns(*_NOT_SOURCES))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", *options, "--wheel-dir", str(folder), str(folder / "source")], check=True)
    shutil.rmtree(folder / "source")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    made = Installed(folder / "env")
    [wheel] = folder.glob("*.whl")
    subprocess.run(
        [*pip, "--python", str(folder / "env/bin/python"), "install", "--no-deps", "--no-index", str(wheel)], check=True
    )
    # a line in a .pth adds the folder alone: the editable install in there, which is a .pth too, does not come along
    (made.packages / "base.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    (made.environment / "bin/dvc").write_text(f'#!/bin/sh\nexec {made.environment}/bin/python -m dvc "$@"\n')
    (made.environment / "bin/dvc").chmod(0o755)
    return made


def test_a_project_outside_of_the_repository(installed: Installed, tmp_path: Path) -> None:
    where = installed.run(
        tmp_path, "python", "-c", "import cli, pipeline, stages; print(cli.__file__, *pipeline.__path__, *stages.__path__)"
    )
    assert all(path.startswith(str(installed.packages)) for path in where.stdout.split()), where.stdout + where.stderr
    images = tmp_path / "images"
    images.mkdir()
    for i in range(1, 13):
        for end in ("png", "txt"):
            shutil.copy(REPOSITORY / f"assets/demo-dataset/{i:03}.{end}", images)
    done = installed.run(tmp_path, "reprolora", "init", "mine", "--images", "images", "--preset", "demo", "--trigger", "zyx")
    assert done.returncode == 0 and "dataset.resolution: 64  (the base's own" in done.stdout, done.stdout + done.stderr
    project = Project(tmp_path / "mine")
    assert not list(project.root.rglob("*.py"))

    def reprolora(*arguments: str) -> subprocess.CompletedProcess[str]:
        return installed.run(project.root, "reprolora", *arguments)

    def git(*arguments: str) -> str:
        return installed.run(project.root, "git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments).stdout

    done = reprolora("run", *(part for change in FEW for part in ("--set", change)))
    assert done.returncode == 0 and len(project.executed()) == 5, done.stdout + done.stderr
    assert project.path("dist/adapter/mine.safetensors").is_file() and project.path("reports/index.html").is_file()
    assert reprolora("status").stdout.count("up to date") == 5
    verified = reprolora("verify", "dist/adapter/mine.safetensors")
    assert verified.returncode == 0 and verified.stdout.count("matches") == 7, verified.stdout + verified.stderr
    untracked = git("status", "--porcelain")
    assert "code.json" in untracked and not any(
        name in untracked for name in ("build/", "reports/", "dist/", ".work", "mlruns")
    )
    git("add", "--all")
    git("commit", "-qm", "first")

    # nothing, a parameter, and DVC without us
    assert reprolora("run").returncode == 0 and project.executed() == []
    assert reprolora("run", "--set", "export.title=Mine").returncode == 0 and project.executed() == ["export-and-card"]
    bare = installed.run(project.root, "dvc", "repro")
    assert bare.returncode == 0 and project.executed() == [], bare.stdout + bare.stderr
    assert "export.title" in reprolora("diff", "HEAD").stdout
    git("commit", "-qam", "title")

    # an update that changes one stage's code
    with (installed.packages / "stages/validate.py").open("a") as file:
        file.write("# another version\n")
    told = {line["stage"]: line["reasons"] for line in json.loads(reprolora("status", "--json").stdout)}
    assert told["validate"] == ["the installed reprolora has other code for it"] and told["train-lora"] == []
    assert told["export-and-card"] == ["after validate"]
    assert "with other code for validate" in reprolora("check").stdout
    bare = installed.run(project.root, "dvc", "repro", "--force", "--single-item", "validate")
    assert bare.returncode != 0 and "error: code.json states" in bare.stderr and "brings it up to date" in bare.stderr, (
        bare.stderr
    )
    assert project.executed() == ["validate"]
    swept = reprolora("sweep", "--set", "export.title=A")
    assert swept.returncode == 2 and "other code for validate" in swept.stdout and "commit or stash them" in swept.stderr
    git("checkout", "-q", "code.json")
    done = reprolora("run")
    assert done.returncode == 0 and "with other code for validate" in done.stdout, done.stdout + done.stderr
    assert project.executed() == ["validate"]  # which drew the same: nothing follows
    assert installed.run(project.root, "dvc", "status").stdout.strip().endswith("up to date.")
    git("commit", "-qam", "updated")

    # experiments run in copies of the project; the workflow's own lines
    done = reprolora("sweep", "--set", "export.title=A")
    assert done.returncode == 0 and "takes the best over" in done.stdout, done.stdout + done.stderr
    assert project.executed() == ["export-and-card"]
    steps = YAML(typ="safe").load(project.path(".github/workflows/retrain.yml").read_text())["jobs"]["retrain"]["steps"]
    assert installed.run(project.root, "dvc", "remote", "add", "--default", "shared", str(tmp_path / "remote")).returncode == 0
    for name, said in (("Train", "finished=true"), ("Compare", "changed=false")):
        [lines] = [step["run"] for step in steps if step.get("name") == name]
        heads = f"export MINUTES=5 GITHUB_OUTPUT={tmp_path}/{name} GITHUB_STEP_SUMMARY={tmp_path}/summary\n"
        done = installed.run(project.root, "bash", "-eo", "pipefail", "-c", heads + lines)
        assert done.returncode == 0 and said in (tmp_path / name).read_text(), done.stdout + done.stderr
    assert project.executed() == []
