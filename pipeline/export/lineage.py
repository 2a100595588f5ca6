"""What an adapter is made of, as a chain of hashes: dataset, encodings, settings, base, sources, weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.base_model import base_source
from pipeline.config import Params
from pipeline.errors import UserError
from pipeline.files import hash_file, hash_json
from pipeline.model_source import ModelSource, pin_of, resolve
from pipeline.stage import code_files
from pipeline.workspace import ADAPTER, DATASET, ENCODED, Workspace

LINKS = ("dataset", "encodings", "params", "base", "sources", "weights")
_MAKERS = ("prepare-dataset", "precompute-latents-and-embeddings", "train-lora", "export-and-card")
_SETTLING = ("model", "lora", "train")  # dataset and encode have done their work in the first two links


def lineage_of(workspace: Workspace, sections: dict[str, Any], base: str) -> dict[str, str]:
    """The chain as the project's files tell it now.

    Args:
        sections: the settings `model`, `lora` and `train`, as they were used.
        base: the base's revision (`revision_of`).
    """
    return {
        "dataset": manifest_hash(workspace),
        "encodings": encodings_hash(workspace),
        "params": settings_hash(sections),
        "base": base,
        "sources": sources_hash(workspace),
        "weights": hash_file(workspace.root / ADAPTER / "adapter.safetensors"),
    }


def manifest_hash(workspace: Workspace) -> str:
    """sha256 of the manifest, which names every picture by the hash of its pixels."""
    return hash_file(workspace.root / DATASET / "manifest.jsonl")


def encodings_hash(workspace: Workspace) -> str:
    """sha256 of the encodings' table of contents, which names every latent and text by the hash of what it is made from."""
    return hash_file(workspace.root / ENCODED / "index.json")


def settings_hash(sections: dict[str, Any]) -> str:
    """sha256 of the sections' canonical JSON. The pin is left out: the base has a link of its own."""
    kept = {name: dict(sections[name]) for name in _SETTLING}
    kept["model"].pop("revision", None)
    return hash_json(kept)


def sources_hash(workspace: Workspace) -> str:
    """sha256 over the code that `dvc.yaml` lists for the stages from the pictures to the file: names and bytes."""
    code = {dep: path for stage in _MAKERS for dep, path in code_files(workspace, stage).items()}
    return hash_json({dep: hash_file(path) for dep, path in code.items()})


def revision_of(source: ModelSource, root: Path) -> str:
    """The Hub commit, or `sha256:…` of the local folder's files: also where `model.revision` pins nothing."""
    if source.is_local(root):
        return source.revision or pin_of(root / source.base)
    model = resolve(source, root)
    return model.commit or pin_of(model.path)


def stated_lineage(metadata: dict[str, str]) -> dict[str, str]:
    """The chain in an adapter file's header; empty for a foreign file."""
    try:
        stated = json.loads(metadata["reprolora"])["lineage"]
        return {str(link): str(value) for link, value in stated.items()}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def present_link(workspace: Workspace, params: Params, link: str) -> str | None:
    """One link as the project's files tell it now; None where they do not."""
    source = base_source(params.model)
    try:
        if link == "dataset":
            return manifest_hash(workspace)
        if link == "encodings":
            return encodings_hash(workspace)
        if link == "params":
            return settings_hash({name: params.section(name) for name in _SETTLING})
        if link == "sources":
            return sources_hash(workspace)
        if link == "weights":
            return hash_file(workspace.root / ADAPTER / "adapter.safetensors")
        if source.is_local(workspace.root):
            return pin_of(workspace.root / source.base)
        return params.model.revision
    except (FileNotFoundError, NotADirectoryError, UserError):
        return None
