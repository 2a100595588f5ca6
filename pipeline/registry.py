"""The exported adapter as a version of a registered MLflow model that draws pictures from prompts.

An adapter whose gate failed is not registered. One that no threshold judged gets the alias `candidate`, one that passed `champion`.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipeline.config import load_params
from pipeline.families import family
from pipeline.files import write_json
from pipeline.workspace import ADAPTER, DIST, VALIDATE_REPORT, Workspace

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
    if not gate["passed"] or _known(client, name, fingerprint):
        return False
    from importlib.metadata import version as installed

    import mlflow
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    asked = [ColSpec("string", "prompt"), ColSpec("long", "seed", required=False), ColSpec("double", "scale", required=False)]
    signature = ModelSignature(Schema(asked), Schema([ColSpec("string")]))
    mlflow.set_tracking_uri(uri)
    with TemporaryDirectory() as folder, mlflow.start_run(run_id=run_id, log_system_metrics=False):
        settings, artifacts = _settings(workspace)
        write_json(Path(folder) / "settings.json", settings)
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("registered_model.py")),
            artifacts={**artifacts, "settings": str(Path(folder) / "settings.json")},
            signature=signature,
            pip_requirements=[f"{package}=={installed(package)}" for package in _REQUIREMENTS],
        )
    if not any(model.name == name for model in client.search_registered_models(f"name = '{name}'")):
        client.create_registered_model(name)
    version = client.create_model_version(name, logged.model_uri, run_id, tags={_MARK: fingerprint})
    client.set_registered_model_alias(name, "champion" if gate["findings"] else "candidate", version.version)
    return True


def _known(client: MlflowClient, name: str, fingerprint: str) -> bool:
    return any(v.tags.get(_MARK) == fingerprint for v in client.search_model_versions(f"name = '{name}'"))


def _settings(workspace: Workspace) -> tuple[dict[str, Any], dict[str, str]]:
    """What the model needs to know to draw, and the files that it takes along."""
    root = workspace.root
    validation = json.loads((root / VALIDATE_REPORT / "validation.json").read_text(encoding="utf-8"))
    model = json.loads((root / ADAPTER / "training.json").read_text(encoding="utf-8"))["params"]["model"]
    asked, base = validation["settings"], root / model["base"]
    adapter = next(
        p for p in sorted((root / DIST).glob("*.safetensors"), key=lambda p: p.name != "pytorch_lora_weights.safetensors")
    )
    artifacts = {"adapter": str(adapter)}
    local = base.is_dir()
    if local and sum(p.stat().st_size for p in base.rglob("*") if p.is_file()) <= _CARRIED:
        artifacts["base"] = str(base)
    settings = {
        "pipeline_class": family(model["family"]).pipeline_class,
        "base": str(base.resolve()) if local else model["base"],
        "revision": None if local else model["revision"],
        "variant": model["variant"],
        "adapter": adapter.name,
        "steps": asked["inference_steps"],
        "guidance_scale": asked["guidance_scale"],
        "negative_prompt": asked["negative_prompt"],
        "width": validation["width"],
        "height": validation["height"],
    }
    return settings, artifacts
