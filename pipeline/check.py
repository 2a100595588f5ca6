"""Looking before running: settings, environment, models, pictures; and pinning the models."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.base_model import base_source
from pipeline.config import Dataset, Params, load_params
from pipeline.dataset.prepare import scan_concepts
from pipeline.edit import set_values
from pipeline.errors import UserError
from pipeline.estimate import disk_line, memory_line, steps_line, time_line
from pipeline.model_source import ModelSource, pin_of, resolve
from pipeline.progress import say
from pipeline.renew import told_of_code
from pipeline.workspace import Workspace

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "dvc", "mlflow", "safetensors")


def check_all(workspace: Workspace) -> bool:
    """Print one line per check, the fault where there is one, and what the run will take; returns whether all passed."""
    params = load_params(workspace.params)
    count, base = 0, workspace.root / params.model.base

    def pictures() -> str:
        nonlocal count
        count, told = _pictures(workspace, params.dataset)
        return told

    def base_model() -> str:
        nonlocal base
        base, told = _model(workspace, base_source(params.model), "model.base")
        return told

    checks: list[tuple[str, Callable[[], str]]] = [
        ("params.yaml", lambda: "every key and value is allowed"),
        ("project", lambda: _project(workspace)),
        ("code", lambda: told_of_code(workspace.root)),
        ("packages", _packages),
        ("device", lambda: _device(params.runtime.device)),
        ("disk", lambda: _disk(workspace)),
        ("pictures", pictures),
        ("base", base_model),
    ]
    for title, key, named, revision in _helpers(params):
        if named:
            source = ModelSource(named, revision)
            checks.append((title, lambda source=source, key=key: _model(workspace, source, key)[1]))  # type: ignore[misc]
    fine = True
    for title, look in checks:
        try:
            say(f"  ok     {title:<12} {look()}")
        except UserError as error:
            fine = False
            say(f"  FAULT  {title:<12} {error}")
    for title, told in _estimates(workspace, params, count, base) if count else ():
        say(f"  ok     {title:<12} {told}")
    return fine


def _estimates(workspace: Workspace, params: Params, pictures: int, base: Path) -> list[tuple[str, str]]:
    """What the run will take. `base`: the base's folder, as far as it was found."""
    from pipeline.families import family  # with torch

    return [
        ("steps", steps_line(params, pictures)),
        ("time", time_line(workspace, params, pictures)),
        ("memory", memory_line(params, base / family(params.model.family).denoiser_key)),
        ("encodings", disk_line(params, base / "vae" / "config.json", pictures)),
    ]


def pin_models(workspace: Workspace) -> list[str]:
    """Write the present revisions of the base and CLIP models into `params.yaml`; returns what changed."""
    params = load_params(workspace.params)
    wanted = [f"model.revision={_revision(workspace, params.model.base, 'model.base')}"]
    if params.model.vae:
        wanted.append(f"model.vae_revision={_revision(workspace, params.model.vae, 'model.vae')}")
    for _, key, named, _ in _helpers(params):
        if named:
            pinned = key.replace("_model", "") + "_revision"
            wanted.append(f"{pinned}={_revision(workspace, named, key)}")
    return set_values(workspace, wanted)


def _helpers(params: Params) -> list[tuple[str, str, str | None, str | None]]:
    """The models beside the base: title, key, name and pin."""
    v, d = params.validate_, params.dataset
    return [
        ("CLIP", "validate.clip_model", v.clip_model, v.clip_revision),
        ("DINO", "validate.dino_model", v.dino_model, v.dino_revision),
        ("captioner", "dataset.auto_caption", d.auto_caption, d.auto_caption_revision),
    ]


def _revision(workspace: Workspace, base: str, key: str) -> str:
    folder = workspace.root / base
    if folder.is_dir():
        found = pin_of(folder)
        resolve(ModelSource(base, found), workspace.root, key)  # refuses what is no model
        return found
    if folder.is_file():
        return pin_of(folder)
    from huggingface_hub import HfApi

    try:
        return str(HfApi().model_info(base).sha)
    except Exception as error:
        raise UserError(f"{key}: the Hub does not tell the commit of {base}: {str(error).splitlines()[0]}") from None


def _project(workspace: Workspace) -> str:
    if not (workspace.root / ".dvc").is_dir():
        raise UserError("this folder is no DVC project: `dvc init` makes it one")
    return "git and DVC are set up" if (workspace.root / ".git").exists() else "DVC is set up"


def _packages() -> str:
    missing = []
    for name in _PACKAGES:
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        raise UserError(f"not installed: {', '.join(missing)}: install reprolora again (`make setup` in a checkout)")
    return f"Python {sys.version.split()[0]}, " + ", ".join(f"{name} {version(name)}" for name in _PACKAGES)


def _device(wanted: str) -> str:
    import torch

    from pipeline.device import pick_device

    device = pick_device(wanted)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return f"{torch.cuda.get_device_name(device)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    return f"{device}, {os.cpu_count()} cores"


def _disk(workspace: Workspace) -> str:
    free = shutil.disk_usage(workspace.home).free / 2**30
    if free < 1:
        raise UserError(f"only {free:.2f} GiB free: caches and checkpoints need at least 1 GiB")
    return f"{free:.1f} GiB free"


def _pictures(workspace: Workspace, settings: Dataset) -> tuple[int, str]:
    """How many there are, and that in words."""
    with tempfile.TemporaryDirectory() as unpacked:
        items, rejects = scan_concepts(workspace.root / settings.path, settings, Path(unpacked), lambda: None)
    told = f"{len(items)} pictures in {settings.path}"
    told += f", {len(rejects)} files cannot be used: {rejects[0].path} {rejects[0].reason}" if rejects else ""
    return len(items), told


def _model(workspace: Workspace, source: ModelSource, key: str) -> tuple[Path, str]:
    """Its folder, and what there is to say of it."""
    model = resolve(source, workspace.root, key)
    size = sum(p.stat().st_size for p in model.path.rglob("*.safetensors")) / 2**20
    return model.path, f"{source.base}, {size:.0f} MiB of weights, {'as pinned' if source.revision else 'not pinned'}"
