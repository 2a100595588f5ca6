"""A project of one's own: pictures, settings, and the code that will have made the adapter.

The code is copied, not referred to: stages depend on it file by file, so a project is rerun by what changed in its own copy, and
what made an adapter lies in the same commit.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import check_params, load_yaml
from pipeline.dataset.source import is_image, visible_files
from pipeline.edit import assign, dumped
from pipeline.errors import UserError
from pipeline.files import write_text

PRESETS = ("sd15", "sdxl", "sd3", "demo")
_CODE = ("cli.py", "dvc.yaml", "pyproject.toml", "constraints.txt", "params.schema.json", "LICENSE", ".gitignore", ".dvcignore")
_CODE_FOLDERS = ("pipeline", "stages", "presets", ".github")
_DEMO_FOLDERS = ("assets/tiny-sd", "assets/tiny-clip")
_EXPOSURES = 100  # how often a picture is shown: what styles and subjects of a few dozen pictures usually take
_LEAST_STEPS, _MOST_STEPS = 300, 4000


@dataclass(frozen=True)
class Proposal:
    """A setting, and why."""

    key: str
    value: Any
    reason: str


def init_project(checkout: Path, folder: Path, pictures: Path, preset: str, trigger: str) -> list[Proposal]:
    """Make the project in `folder`, which must not exist or be empty.

    Args:
        checkout: the repository that the code is copied from.
        pictures: folder of pictures, in any form that `docs/data.md` names; copied to `data/`.

    Returns:
        What was proposed for these pictures.

    Raises:
        UserError: no such preset or pictures, or the folder holds something.
    """
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: there are {', '.join(PRESETS)}")
    if not (checkout / "dvc.yaml").is_file():
        raise UserError(
            "init copies the code of a checkout, and this is an installed package: run it as `python cli.py init` in one"
        )
    if not pictures.is_dir():
        raise UserError(f"--images {pictures}: no such folder")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: nothing was written; give a new folder")
    if folder.resolve().is_relative_to(pictures.resolve()):
        raise UserError(f"{folder} lies inside the pictures {pictures}: give a folder beside them")
    document = load_yaml(checkout / ("params.yaml" if preset == "demo" else f"presets/{preset}.yaml"))
    proposals = propose(pictures, document["dataset"]["resolution"], document["train"]["batch_size"])
    values = {p.key: p.value for p in proposals} | {"dataset.path": "data", "dataset.trigger": trigger}
    values["export.name"] = _ascii_name(folder.resolve().name)
    if preset == "demo":
        values["export.title"], values["export.description"] = "", ""
    for key, value in values.items():
        assign(document, key, value)
    check_params(document)
    _copy_code(checkout, folder, (*_CODE_FOLDERS, *(_DEMO_FOLDERS if preset == "demo" else ())))
    shutil.copytree(pictures, folder / "data")
    write_text(folder / "params.yaml", dumped(document))
    write_text(folder / "README.md", _readme(values["export.name"]))
    _repository(folder)
    return proposals


def _ascii_name(name: str) -> str:
    """A file name that every loader takes."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name)
    return plain.strip("._-")[:96] or "adapter"


def propose(pictures: Path, resolution: int, batch_size: int) -> list[Proposal]:
    """Look at the pictures: resolution and length that suit them."""
    from PIL import Image

    sides = []
    for name, path in visible_files(pictures).items():
        if is_image(name):
            try:
                with Image.open(path) as image:
                    sides.append(min(image.size))
            except Exception:  # prepare-dataset says what is wrong with it
                continue
    if not sides:  # packed, or something that `check` will complain of
        return []
    small = sorted(sides)[len(sides) // 10]
    step = 64 if resolution > 64 else 8
    fitting = max(step, min(resolution, small // step * step))
    left = sum(side < fitting for side in sides)
    why = f"nine pictures in ten have {small} pixels or more on their shorter side"
    why += f"; {left} smaller ones are rejected" if left else ""
    steps = min(_MOST_STEPS, max(_LEAST_STEPS, round(_EXPOSURES * len(sides) / batch_size / 50) * 50))
    proposals = [
        Proposal("dataset.resolution", fitting, why if fitting < resolution else f"the base's own; {why}"),
        Proposal(
            "train.steps",
            steps,
            f"{len(sides)} pictures are shown some {steps * batch_size / len(sides):.0f} times each, {batch_size} a step",
        ),
    ]
    return [*proposals, Proposal("dataset.max_rejected", left, "those that are too small")] if left else proposals


def _copy_code(checkout: Path, folder: Path, folders: tuple[str, ...]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in _CODE:
        shutil.copyfile(checkout / name, folder / name)
    for name in folders:
        shutil.copytree(checkout / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".dvc").mkdir()
    for name in ("config", ".gitignore"):
        shutil.copyfile(checkout / ".dvc" / name, folder / ".dvc" / name)
    makefile = (checkout / "Makefile").read_text(encoding="utf-8")
    start = makefile.index("setup: .venv/ready")  # how the environment is made; the other targets are the repository's own
    head = "PYTHON ?= python3\nBIN := .venv/bin\n\n.PHONY: run setup\n\nrun: .venv/ready\n\t$(BIN)/python cli.py run\n\n"
    write_text(folder / "Makefile", head + makefile[start:].replace('".[dev]"', '"."'))


def _repository(folder: Path) -> None:
    """git, and the pictures tracked by DVC; nothing is committed: that is the owner's to do."""
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "add", "--quiet", "data"], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"the pictures could not be added to DVC: {done.stderr.strip()}")


def _readme(name: str) -> str:
    return f"""# {name}

A LoRA, trained as a reproducible build with reprolora.

```sh
make setup                 # the environment
source .venv/bin/activate
python cli.py pin          # writes down which base this is
python cli.py check        # settings, environment, base and pictures, before anything runs
python cli.py run          # or: make run, or: dvc repro
git add --all && git commit --message "First adapter"
```

`params.yaml` holds every setting, explained. The pictures in `data/` are tracked by DVC (`data.dvc`).
"""
