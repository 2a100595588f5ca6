"""A project of one's own in a temporary folder: the real code, the real DVC, a tiny base."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML

REPOSITORY = Path(__file__).resolve().parent.parent
_CODE = ("cli.py", "dvc.yaml", ".gitignore", ".dvcignore", "pipeline", "stages")

PARAMS: dict[str, Any] = {
    "dataset": {"path": "data", "resolution": 32, "held_out_fraction": 0.3},
    "model": {"family": "sd", "base": "base"},
    "encode": {"dtype": "float32"},
    "lora": {"rank": 2, "alpha": 4.0},
    "train": {"steps": 6, "batch_size": 4, "learning_rate": 0.01},
    "validate": {
        "prompts": ["a red circle"],
        "inference_steps": 2,
        "guidance_scale": 2.0,
        "loss_timesteps": 2,
        "loss_samples": 4,
        "clip_model": "clip",
    },
    "gate": {},
    "export": {"name": "tiny"},
    "runtime": {"device": "cpu", "checkpoint_every": 2},
    "tracking": {"enabled": False},
}


@dataclass(frozen=True)
class Project:
    """A folder with everything in it to run."""

    root: Path

    def cli(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """`python cli.py …`, waited for."""
        return self._run([sys.executable, "cli.py", *arguments], environment)

    def dvc(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """`dvc …`, waited for."""
        return self._run([sys.executable, "-m", "dvc", *arguments], environment)

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """A command in a process group of its own, not waited for."""
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=self.environment(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def executed(self) -> list[str]:
        """The stages that were executed since the last time of asking, in order."""
        journal = self.root / ".work" / "journal.jsonl"
        if not journal.is_file():
            return []
        lines = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
        names = [line["stage"] for line in lines if line["outcome"] == "started"]
        journal.unlink()
        return names

    def set(self, section: str, **values: Any) -> None:
        """Change `params.yaml`."""
        params = self.params()
        params[section].update(values)
        self.write(params)

    def params(self) -> dict[str, Any]:
        return YAML(typ="safe").load((self.root / "params.yaml").read_text(encoding="utf-8"))

    def write(self, params: dict[str, Any]) -> None:
        with (self.root / "params.yaml").open("w", encoding="utf-8") as file:
            yaml = YAML(typ="safe", pure=True)
            yaml.default_flow_style = False
            yaml.sort_base_mapping_type_on_output = False
            yaml.dump(params, file)

    def path(self, relative: str) -> Path:
        return self.root / relative

    def environment(self, extra: dict[str, str]) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("REPROLORA", "MLFLOW", "DVC"))}
        return {
            **inherited,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "OMP_WAIT_POLICY": "passive",
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            **extra,
        }

    def _run(self, command: list[str], extra: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.root, env=self.environment(extra), capture_output=True, text=True, check=False, timeout=300
        )


def ended(process: psutil.Process) -> bool:
    """It is gone, or nobody has waited for it yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def git(root: Path, *arguments: str) -> str:
    """git as somebody, in a folder; what it prints."""
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout


def commit(root: Path, message: str = "start") -> None:
    """Everything that is not ignored."""
    git(root, "add", "-A")
    git(root, "commit", "-qm", message)


def copy_of_what_is_tracked(root: Path) -> None:
    """The files that git knows, as they lie here, in the folder `root`."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, root / name)


def make_project(root: Path, base: Path, clip: Path, pictures: Path) -> Project:
    """Lay a project out in `root`, which must not exist."""
    root.mkdir(parents=True)
    for name in _CODE:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, root / name)
    (root / ".dvc").mkdir()
    shutil.copy(REPOSITORY / ".dvc" / "config", root / ".dvc" / "config")
    for source, name in ((base, "base"), (clip, "clip"), (pictures, "data")):
        shutil.copytree(source, root / name)
    project = Project(root)
    project.write(PARAMS)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    return project
