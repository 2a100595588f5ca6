"""The exported adapter as a version of a registered MLflow model that draws pictures from prompts.

An adapter whose gate failed is not registered. One that no threshold judged gets the alias `candidate`, one that passed `champion`.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipeline.config import load_params
from pipeline.errors import UserError
from pipeline.evaluate.sampling import sampling_changes, scheduler_class
from pipeline.export.diffusers_format import FILE_NAME
from pipeline.families import family
from pipeline.files import write_json
from pipeline.progress import say
from pipeline.workspace import ADAPTER, DIST, ENCODED, VALIDATE_REPORT, Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

_MARK = "reprolora.fingerprint"
_CARRIED = 256 * 2**20  # bytes: a local base up to this size goes into the model, a larger one is referred to
_REQUIREMENTS = ["diffusers", "transformers", "peft", "torch", "accelerate", "safetensors"]


def register(client: MlflowClient, uri: str, run_id: str, fingerprint: str, workspace: Workspace) -> bool:
    """Register `dist/adapter` unless it is registered already or its gate failed; returns whether a version was made.

    Args:
        run_id: the export's run, which holds the model.
        fingerprint: of the export: what is told apart.
    """
    gate = json.loads((workspace.root / DIST / "gate.json").read_text(encoding="utf-8"))
    name = load_params(workspace.params).export.name
    if not gate["passed"]:
        return False
    alias = "champion" if gate["findings"] else "candidate"
    known = _version(client, name, fingerprint)
    if known:  # changed back to an earlier adapter, or cut off before the alias was set
        if client.get_registered_model(name).aliases.get(alias) != known:
            client.set_registered_model_alias(name, alias, known)
        return False
    try:
        settings, artifacts = _settings(workspace)
    except UserError as error:
        say(f"  not registered with MLflow: {error}")
        return False
    from importlib.metadata import version as installed

    import mlflow
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    asked = [ColSpec("string", "prompt"), ColSpec("long", "seed", required=False), ColSpec("double", "scale", required=False)]
    with TemporaryDirectory() as folder, _store(uri), mlflow.start_run(run_id=run_id, log_system_metrics=False):
        write_json(Path(folder) / "settings.json", settings)
        # MLflow warns for want of type hints, which would replace the signature, and of an example, which it would draw
        with warnings.catch_warnings(record=True):
            logged = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(Path(__file__).with_name("registered_model.py")),
                artifacts={**artifacts, "settings": str(Path(folder) / "settings.json")},
                signature=ModelSignature(Schema(asked), Schema([ColSpec("string")])),
                # without the build's mark, `+cpu`, which no index has
                pip_requirements=[f"{package}=={installed(package).partition('+')[0]}" for package in _REQUIREMENTS],
            )
        if not any(model.name == name for model in client.search_registered_models(f"name = '{name}'")):
            client.create_registered_model(name)
        # a server takes a source of this kind only with the id that is in it
        made = client.create_model_version(name, logged.model_uri, run_id, {_MARK: fingerprint}, model_id=logged.model_id)
        client.set_registered_model_alias(name, alias, made.version)
    return True


@contextmanager
def _store(uri: str) -> Iterator[None]:
    """MLflow's fluent functions, which log models, go to this store inside the block; it sets a variable for that."""
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before or "")
        if before is None:
            os.environ.pop("MLFLOW_TRACKING_URI", None)


def _version(client: MlflowClient, name: str, fingerprint: str) -> str | None:
    """The version that was made of this export."""
    found = [v.version for v in client.search_model_versions(f"name = '{name}'") if v.tags.get(_MARK) == fingerprint]
    return str(found[0]) if found else None


def _settings(workspace: Workspace) -> tuple[dict[str, Any], dict[str, str]]:
    """What the model needs to know to draw, and the files that it takes along.

    Raises:
        UserError: plain diffusers cannot draw with this adapter or base.
    """
    root = workspace.root
    validation = json.loads((root / VALIDATE_REPORT / "validation.json").read_text(encoding="utf-8"))
    model = json.loads((root / ADAPTER / "training.json").read_text(encoding="utf-8"))["params"]["model"]
    adapter, base, asked = root / DIST / FILE_NAME, root / model["base"], validation["settings"]
    if not adapter.is_file():
        raise UserError(f"there is no {FILE_NAME}, which is what plain diffusers loads: add diffusers to export.formats")
    if base.is_file() or model["vae"]:
        raise UserError("a base in a single file or with another VAE is not one folder that plain diffusers loads")
    artifacts = {"adapter": str(adapter)}
    local = base.is_dir()
    if local and sum(p.stat().st_size for p in base.rglob("*") if p.is_file()) <= _CARRIED:
        artifacts["base"] = str(base)
    settings = {
        "pipeline_class": family(model["family"]).pipeline_class,
        "base": str(base.resolve()) if local else model["base"],
        "revision": None if local else model["revision"],
        "variant": model["variant"],
        "scheduler": scheduler_class(asked["scheduler"]),
        "scheduler_changes": sampling_changes(model["prediction"], model["zero_terminal_snr"]),
        "clip_skip": json.loads((root / ENCODED / "index.json").read_text(encoding="utf-8"))["clip_skip"] or None,
        "steps": asked["inference_steps"],
        "guidance_scale": asked["guidance_scale"],
        "negative_prompt": asked["negative_prompt"],
        "width": validation["width"],
        "height": validation["height"],
    }
    return settings, artifacts
