"""A project of one's own: pictures and settings, under git and DVC, that use the installed reprolora."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from ruamel.yaml.comments import CommentedMap

from pipeline.config import check_params, load_yaml
from pipeline.dvc_process import call
from pipeline.edit import assign, dumped
from pipeline.errors import UserError
from pipeline.fetch import fetch, folder_of
from pipeline.files import write_text
from pipeline.propose import Proposal, propose
from pipeline.renew import REQUIREMENTS, write_record
from pipeline.shipped import shipped
from pipeline.sources import CODE_JSON

PRESETS = ("sd15", "sd21", "sdxl", "sd3", "demo")
_AS_SHIPPED = (".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore", "params.schema.json", "constraints.txt")
_WORKFLOWS = (".github/workflows/retrain.yml", ".github/gitlab-ci.retrain.yml")
_DEMO_MODELS = ("assets/tiny-sd", "assets/tiny-clip")
_DEMO_TRIGGER = "nightglow"
# what the checkout's workflows say, and what an installed package needs instead
_INSTEAD = (
    ('make setup\n          echo "$PWD/.venv/bin" >> "$GITHUB_PATH"', f"pip install --requirement {REQUIREMENTS}"),
    ('make setup && export PATH="$PWD/.venv/bin:$PATH"', f"pip install --requirement {REQUIREMENTS}"),
    ("cache-dependency-path: constraints.txt", f"cache-dependency-path: {REQUIREMENTS}"),
    ("git add dvc.lock", f"git add dvc.lock {CODE_JSON}"),
    ("; tests/test_retrain.py runs them", ""),
    ("# Not run by a test: no GitLab is at hand. Its lines", "# Its lines"),
    ("python cli.py", "reprolora"),
)


def init_project(folder: Path, images: str, preset: str, trigger: str) -> list[Proposal]:
    """Make the project in `folder`, which must not exist or be empty; all of it or nothing.

    Args:
        images: folder of pictures, in any form that `docs/data.md` names, copied to `data/`; or `hf://owner/name[@revision]`, fetched
            and pinned.

    Returns:
        What was proposed for these pictures.

    Raises:
        UserError: no such preset or pictures, or the folder holds something.
    """
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: there are {', '.join(PRESETS)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty: nothing was written; give a new folder")
    with _whole_or_nothing(folder):
        data = _pictures(folder, images)
        document = load_yaml(shipped("params.yaml" if preset == "demo" else f"presets/{preset}.yaml"))
        proposals = propose(folder / data, document["dataset"]["resolution"], document["train"]["batch_size"])
        name = _ascii_name(folder.resolve().name)
        values = {p.key: p.value for p in proposals} | {
            "dataset.path": data.as_posix(),
            "dataset.trigger": trigger,
            "export.name": name,
        }
        if preset == "demo":
            values |= {"export.title": "", "export.description": ""}
        for key, value in values.items():
            assign(document, key, value)
        _let_prompts_call(document, trigger)
        check_params(document)
        write_text(folder / "params.yaml", dumped(document))
        _write_files(folder, name, preset)
        _repository(folder, data)
    return proposals


@contextmanager
def _whole_or_nothing(folder: Path) -> Iterator[None]:
    there = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not there:
            folder.rmdir()
        raise


def _pictures(folder: Path, images: str) -> Path:
    """Bring the pictures into the project; where they lie in it."""
    if images.startswith("hf:"):
        fetch(folder, images)
        return folder_of(images)
    source = Path(images)
    if not source.is_dir():
        raise UserError(f"--images {images}: no such folder; a dataset of the Hub is hf://owner/name")
    if folder.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{folder} lies inside the pictures {images}: give a folder beside them")
    shutil.copytree(source, folder / "data")
    return Path("data")


def _let_prompts_call(document: CommentedMap, trigger: str) -> None:
    """Put the trigger into the preset's prompts, in place, so that their comments stay."""
    prompts = document["validate"]["prompts"]
    for i, prompt in enumerate(prompts):
        if _DEMO_TRIGGER in prompt:
            prompts[i] = prompt.replace(_DEMO_TRIGGER, trigger) if trigger else prompt.replace(f", {_DEMO_TRIGGER} style", "")
        elif trigger:
            prompts[i] = f"{trigger}, {prompt}"


def _write_files(folder: Path, name: str, preset: str) -> None:
    for file in _AS_SHIPPED:
        write_text(folder / file, shipped(file).read_text(encoding="utf-8"))
    for file in _WORKFLOWS:
        text = shipped(file).read_text(encoding="utf-8")
        for old, new in _INSTEAD:
            text = text.replace(old, new)
        write_text(folder / file, text)
    for model in _DEMO_MODELS if preset == "demo" else ():
        shutil.copytree(shipped(model), folder / model)
    write_text(folder / REQUIREMENTS, f"--constraint constraints.txt\nreprolora=={version('reprolora')}\n")
    write_text(folder / "README.md", _readme(name))
    write_record(folder)


def _repository(folder: Path, data: Path) -> None:
    """git, and the pictures tracked by DVC, a fetched dataset too: a sweep's copies of the project have what either tracks, and no more.
    Nothing is committed: that is the owner's to do."""
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    done = call(folder, "add", "--quiet", str(data))
    if done.returncode:
        raise UserError(f"the pictures could not be added to DVC: {done.stderr.strip()}")


def _ascii_name(name: str) -> str:
    """A file name that every loader takes."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name)
    return plain.strip("._-")[:96] or "adapter"


def _readme(name: str) -> str:
    return f"""# {name}

A LoRA, trained as a reproducible build with reprolora.

```sh
python -m venv .venv && source .venv/bin/activate
pip install --requirement {REQUIREMENTS}   # --find-links FOLDER where the wheel lies in a folder
reprolora pin          # writes down which base this is
reprolora check        # settings, environment, base and pictures, before anything runs
reprolora run          # or: dvc repro
git add --all && git commit --message "First adapter"
```

`params.yaml` holds every setting, explained. The pictures lie in `data/`. `{CODE_JSON}` states which code of reprolora made what lies
here: after an update `reprolora run` writes it anew, and runs the stages whose code is another.
"""
